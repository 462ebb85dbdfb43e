"""Trains and evaluates one run of the fine-tuning study, all layers in this process."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import ds_al
from ds_al.baseline.twin import TwinModule
from ds_al.convert.hugging_face import dissect, twin_layers
from ds_al.convert.loading import load
from ds_al.convert.new_parts import groups
from ds_al.data.splits import Splits
from ds_al.errors import ALConfigError
from ds_al.optim.held import Held
from ds_al.parallel.world import join_world
from ds_al.studies.pretrained.texts import held_out, micro_batches
from ds_al.system.provenance import boot

TWIN = "backprop"
BY_WORK = "-by-work"
"""Ends the method of an objective whose layers are cut where they have even work, instead of as many blocks each."""
TASK = "sequence-classification"
Adapt = Literal["all", "frozen", "lora"]


@dataclass(frozen=True)
class Settings:
    """Settings that all runs share.

    Attributes:
        batch: texts per step, B.
        new_rate: learning rate of new parts, in the twin the classifier.
        new_first: samples on which new parts train alone, in the twin too.
        held_out, tested: validation and test texts of an evaluation.
        rank: rank of the adapters.
        targets: linear layers with an adapter, by the end of their names.
    """

    batch: int = 16
    new_rate: float = 1e-3
    new_first: int = 512
    held_out: int = 999
    tested: int = 2000
    rank: int = 8
    targets: tuple[str, ...] = ("query", "value")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        data: name of the texts.
        method: ``"backprop"``, or an objective, perhaps with :data:`BY_WORK`.
        adapt: weights of the model that train: all, all but embeddings and the lower half of the blocks, or low-rank
            adapters.
        layers: K; 1 for back-propagation.
        seed: seed of new weights, of dropout and of the order of the texts.
        lr: peak learning rate of the model's own weights (AdamW).
        samples: texts to train on.
        budget: ``"trial"``, which chooses the rate by validation texts, or ``"run"``.
        pooling: what the head reads, see ``classifier_pooling`` of :func:`ds_al.from_pretrained`; in the twin too.
    """

    data: str
    method: str
    adapt: Adapt
    layers: int
    seed: int
    lr: float
    samples: int
    budget: Literal["trial", "run"]
    pooling: str | None = None

    @property
    def key(self) -> str:
        """Unique name of the run, apart from the shared settings."""
        parts = [self.budget, self.data, self.method, self.adapt, f"K{self.layers}", f"lr{self.lr:g}"]
        pooling = [] if self.pooling is None else [self.pooling]
        return "_".join([*parts, *pooling, f"samples{self.samples}", f"seed{self.seed}"])


def train(
    run: Run, settings: Settings, texts: Splits, *, pretrained: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Trains and evaluates one run; only a run that is not a trial looks at test texts.

    Returns:
        The run, accuracies at every exit after the first 100 steps (validation) and at the end, there also that of the
        mean softmax of all exits, weights, seconds of wall and of processor time, the machine.
    """
    engine = make_engine(run, settings, classes=len(texts.classes), pretrained=pretrained)
    batches = micro_batches(texts.train, size=settings.batch, seed=run.seed)
    known = held_out(texts.validation, count=settings.held_out, size=2 * settings.batch)
    steps = run.samples // settings.batch
    wall = cpu = 0.0
    early: list[float] | None = None
    rest = _rest_of_twin(engine, settings)
    for step in range(steps):
        if rest is not None:
            rest.before_batch(step * settings.batch)
        start = time.perf_counter(), time.process_time()
        loss = engine.train_batch(batches)
        wall, cpu = wall + time.perf_counter() - start[0], cpu + time.process_time() - start[1]
        if step + 1 == 100 < steps:
            early = accuracies(engine, known)[0]
        if (step + 1) % max(1, steps // 8) == 0:
            tell(f"{run.key}: step {step + 1} of {steps}, loss {float(loss):.3f}, {wall:.0f} s")
    validation, validation_of_all = accuracies(engine, known)
    trained = {weight for weight in engine.module.parameters() if weight.requires_grad}
    found = {
        **asdict(run),
        "settings": asdict(settings),
        "training_seconds": wall,
        "cpu_seconds": cpu,
        "boot": boot(),
        "weights": sum(weight.numel() for weight in engine.module.parameters()),
        "trained_weights": sum(weight.numel() for weight in trained),
        "early_accuracy": early,
        "validation_accuracy": validation,
        "averaged_validation_accuracy": validation_of_all,
    }
    if run.budget == "run":
        tested = held_out(texts.test, count=settings.tested, size=2 * settings.batch)
        found["test_accuracy"], found["averaged_test_accuracy"] = accuracies(engine, tested)
    engine.destroy()
    return found


def make_engine(
    run: Run,
    settings: Settings,
    *,
    classes: int,
    pretrained: Path,
    stages: int = 1,
    micro_batches: int = 1,
    schedule: str = "bp_1f1b",
) -> Any:
    """Builds the engine of a run; blocks and classifier start from the same weights in all of its methods.

    Args:
        run: the run.
        settings: shared settings.
        classes: number of classes, V.
        pretrained: folder of the model.
        stages: number of processes.
        micro_batches: micro-batches of a batch.
        schedule: method of back-propagation.
    """
    join_world()
    torch.manual_seed(run.seed)
    model = adapted(
        load(str(pretrained), task=TASK, base_seed=run.seed, model_options={"num_labels": classes}), run.adapt, settings
    )
    module: Any
    if run.method == TWIN:
        layers = twin_layers(
            load(model, task=TASK),
            task=TASK,
            num_al_layers=stages,
            groups="by-work",
            classifier_pooling=run.pooling,
        )
        cuts = ",".join(str(stage) for stage in range(1, stages))  # the head is one more layer, of the last stage
        module = TwinModule(
            layers,
            num_stages=stages,
            loss_fn=F.cross_entropy,
            base_seed=run.seed,
            partition_method=f"cuts:{cuts}" if cuts else "uniform",
            dynamic_shape=True,
        )
    else:
        objective = run.method.removesuffix(BY_WORK)
        module = ds_al.from_pretrained(
            model,
            task=TASK,
            num_al_layers=run.layers,
            groups=None if objective == run.method else "by-work",
            objective=objective,
            classifier_pooling=run.pooling,
            new_parts_first=settings.new_first,
            base_seed=run.seed,
            dynamic_shape=True,
        )
    steps = run.samples // (settings.batch * micro_batches)
    config = {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": None,
        "optimizer": {"type": "AdamW", "params": {"lr": run.lr, "weight_decay": 0.01, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": steps, "warmup_num_steps": max(2, steps // 10), "cos_min_ratio": 0.1},
        },
        **({"associated_learning": {"method": schedule}, "gradient_clipping": 0.0} if run.method == TWIN else {}),
    }
    parameters = groups(module, lr=run.lr, new_lr=settings.new_rate)
    engine, *_ = ds_al.initialize(model=module, config=config, model_parameters=parameters)
    return engine


def adapted(model: Any, adapt: Adapt, settings: Settings) -> Any:
    """Freezes weights of a model, or adds adapters; the classifier always trains.

    Raises:
        ALConfigError: ``peft`` is not installed.
    """
    if adapt == "lora":
        check_peft()
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=list(settings.targets))
        )
    if adapt != "all":
        anatomy = dissect(load(model, task=TASK), TASK)
        if adapt == "frozen":
            anatomy.group(range(anatomy.blocks // 2)).requires_grad_(False)
        load(model, task=TASK).get_submodule(anatomy.scores).requires_grad_(True)
    return model


def check_peft() -> None:
    """Raises :class:`~ds_al.errors.ALConfigError` if ``peft`` is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ALConfigError("low-rank adapters need peft: pip install peft, or leave them out: --adapt all,frozen")


@torch.no_grad()
def accuracies(engine: Any, batches: list[tuple[Any, Tensor]]) -> tuple[list[float], float | None]:
    """Returns the accuracy at every exit, and that of the mean softmax of all exits; back-propagation has one exit."""
    if isinstance(engine, ds_al.ALPipelineEngine):
        found = engine.inference.evaluate(batches, averaged=True)
        return list(found["accuracy"]), found["averaged"][-1]
    engine.module.eval()
    hits = sum(int((engine.module(x).argmax(dim=1) == labels).sum()) for x, labels in batches)
    engine.module.train()
    return [hits / sum(len(labels) for _, labels in batches)], None


def _rest_of_twin(engine: Any, settings: Settings) -> Held | None:
    if isinstance(engine, ds_al.ALPipelineEngine) or not settings.new_first:
        return None
    return Held([engine.module], samples=settings.new_first)
