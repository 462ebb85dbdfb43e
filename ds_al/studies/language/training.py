"""One run of the study: trains a small GPT-2 by one method, and evaluates its loss at each exit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ds_al
from ds_al.convert.hugging_face import twin_layers
from ds_al.objectives.per_token import next_token_loss
from ds_al.parallel.world import join_world
from ds_al.studies.language.corpus import Corpus

TWIN = "backprop"
LM = "causal-lm"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the network and of a step, equal in all runs.

    Attributes:
        blocks, width, heads: sizes of the GPT-2, without dropout and with untied head and embedding.
        length: tokens per sequence, T.
        batch: sequences per step, B.
        held_out: number of validation and test sequences to evaluate.
    """

    blocks: int = 4
    width: int = 64
    heads: int = 4
    length: int = 64
    batch: int = 8
    held_out: int = 600


@dataclass(frozen=True)
class Run:
    """Settings of one run.

    Attributes:
        method: ``"backprop"``, or the name of a method, which is that of its objective unless ``objective`` has one.
        layers: K; ignored by the twin, which is the same network for every K.
        seed: seed of the weights and of the data order.
        lr: peak learning rate of AdamW, with warm-up over a tenth of the steps, then cosine decay to a tenth of it.
        steps: optimizer steps, each on ``B T`` tokens.
        bridge_blocks: number of bridge blocks, H.
        objective: options of the objective, as pairs.
        budget: quantity that equals the twin's: ``"tokens"`` or ``"operations"``; ``"trial"`` for runs that choose
            settings.
        code_width: width K of the codes that private heads read; ``None`` for that of the model.
    """

    method: str
    layers: int
    seed: int
    lr: float
    steps: int
    bridge_blocks: int = 0
    objective: tuple[tuple[str, Any], ...] = ()
    budget: str = "tokens"
    code_width: int | None = None

    @property
    def key(self) -> str:
        """Unique name of the run, which encodes its settings."""
        parts = [self.budget, self.method, f"K{self.layers}", f"H{self.bridge_blocks}", f"lr{self.lr:g}"]
        parts += [f"{name}-{value}" for name, value in self.objective]
        parts += [] if self.code_width is None else [f"width-{self.code_width}"]
        return "_".join([*parts, f"steps{self.steps}", f"seed{self.seed}"])


def train(
    run: Run, sizes: Sizes, corpus: Corpus, *, test: bool, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Trains and evaluates one run.

    Args:
        run: settings of the run.
        sizes: sizes of the network and of a step.
        corpus: the data.
        test: whether to also evaluate the test part; trials do not.
        tell: called with progress lines.

    Returns:
        The run, losses in nats per token at every exit, operations per token of a training step, and seconds.
    """
    engine = make_engine(run, sizes, corpus)
    batches = pieces(corpus.train, size=sizes.batch, seed=run.seed)
    seconds, losses = 0.0, []
    for step in range(run.steps):
        start = time.perf_counter()
        loss = engine.train_batch(batches)
        seconds += time.perf_counter() - start
        losses.append(float(loss))
        if (step + 1) % max(1, run.steps // 8) == 0:
            tell(f"{run.key}: step {step + 1} of {run.steps}, loss {losses[-1]:.3f}, {seconds:.0f} s")
    found = {
        **asdict(run),
        "sizes": asdict(sizes),
        "vocabulary": corpus.vocabulary,
        "tokens": run.steps * sizes.batch * sizes.length,
        "training_seconds": seconds,
        "operations_per_token": operations(run, sizes, corpus),
        "validation_loss": evaluate(engine, corpus.validation[: sizes.held_out], sizes.batch),
        "training_loss": losses[:: max(1, run.steps // 50)],
    }
    if test:
        found["test_loss"] = evaluate(engine, corpus.test[: sizes.held_out], sizes.batch)
    engine.destroy()
    return found


def make_engine(run: Run, sizes: Sizes, corpus: Corpus, *, attention: str = "sdpa") -> Any:
    """Builds the engine of a run, all layers in this process; the twin has the initial weights of the AL form's f."""
    import transformers  # imported here: its model classes take seconds to import

    join_world()
    torch.manual_seed(run.seed)
    options: dict[str, Any] = {"attn_implementation": attention}
    config = transformers.GPT2Config(
        vocab_size=corpus.vocabulary,
        n_positions=sizes.length,
        n_embd=sizes.width,
        n_layer=sizes.blocks,
        n_head=sizes.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    model = transformers.GPT2LMHeadModel(config)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": sizes.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "optimizer": {"type": "AdamW", "params": {"lr": run.lr, "betas": [0.9, 0.95], "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": run.steps,
                "warmup_num_steps": max(2, run.steps // 10),
                "cos_min_ratio": 0.1,
            },
        },
    }
    if run.method == TWIN:
        settings["associated_learning"] = {"method": "bp_1f1b"}
        layers = twin_layers(model, task=LM, num_al_layers=1)
        module: Any = PipelineModule(layers, num_stages=1, loss_fn=next_token_loss, base_seed=run.seed)
    else:
        del settings["gradient_clipping"]
        module = ds_al.from_pretrained(
            model,
            task=LM,
            num_al_layers=run.layers,
            objective={"name": run.method, **dict(run.objective)},
            code_width=run.code_width or sizes.width,
            bridge_blocks=run.bridge_blocks,
            base_seed=run.seed,
        )
    engine, *_ = ds_al.initialize(model=module, config=settings)
    return engine


def pieces(part: Tensor, *, size: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
    """Yields micro-batches ``((ids, mask), labels)`` endlessly, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(part), generator=generator)
        for start in range(0, len(part) - size + 1, size):
            yield _batch(part[order[start : start + size]])


def _batch(ids: Tensor) -> tuple[Any, Tensor]:
    return (ids, torch.ones_like(ids)), ids


@torch.no_grad()
def evaluate(engine: Any, part: Tensor, size: int) -> list[float]:
    """Returns the loss in nats per token at every exit; the twin has one exit."""
    batches = [_batch(ids) for ids in part.split(size)]
    if isinstance(engine, ds_al.ALPipelineEngine):
        return list(engine.evaluate(batches)["loss"])
    engine.module.eval()
    total = sum(float(next_token_loss(engine.module(x), labels)) * len(labels) for x, labels in batches)
    engine.module.train()
    return [total / len(part)]


def operations(run: Run, sizes: Sizes, corpus: Corpus) -> float:
    """Returns the operations of a training step per token: matrix products, forward and backward, counted by torch.

    Attention is computed with plain matrix products so that it is counted; norms, softmax and the optimizer are not.
    """
    engine = make_engine(run, sizes, corpus, attention="eager")
    batches = pieces(corpus.train, size=sizes.batch, seed=run.seed)
    engine.train_batch(batches)
    with FlopCounterMode(display=False) as counter:
        engine.train_batch(batches)
    engine.destroy()
    return counter.get_total_flops() / (sizes.batch * sizes.length)
