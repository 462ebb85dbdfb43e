"""``ALTrainer`` leaves the bits of the plain loop, on one rank and on two, and honours callbacks of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, TrainerCallback, default_data_collator

import ds_al
from ds_al.convert import batch_fn
from ds_al.convert.hugging_face import layer_specs
from ds_al.data import ShuffledLoader
from ds_al.errors import ALCheckpointError, ALConfigError, ALLayerError
from ds_al.launch.ranks import run_ranks
from ds_al.layer import predict
from tests.convert.test_training import built, state, weights
from tests.optim.test_non_finite import spike
from tests.support import reference
from tests.support.engines import SEED, different, engine_config, merge
from tests.support.hugging_face_models import CASES, WORDS

pytestmark = pytest.mark.distributed

TASK, SAMPLES, TOKENS, V = "sequence-classification", 48, 6, 5
MICRO_BATCH, MICRO_BATCHES, LR = 8, 2, 3e-3
AL: dict[str, Any] = {"num_al_layers": 2, "code_width": 6, "objective": "mse"}
STEPS_PER_EPOCH = SAMPLES // (MICRO_BATCH * MICRO_BATCHES)
CONFIG = engine_config(micro_batches=MICRO_BATCHES, params={"lr": LR, "torch_adam": True})


def rows(seed: int = 0) -> Any:
    """A ``datasets.Dataset`` of token ids, with a column that no model takes."""
    import datasets

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (SAMPLES, TOKENS), generator=generator)
    labels = torch.randint(V, (SAMPLES,), generator=generator)
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "label": labels.tolist()}
    return datasets.Dataset.from_dict({**columns, "text": ["..."] * SAMPLES})


class Diary(TrainerCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("train begin")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("epoch begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.events.append("log")
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.events.append("evaluate")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("save")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("epoch end")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("train end")


class StopAt(TrainerCallback):
    """Stops after a batch, on one rank alone."""

    def __init__(self, step: int, *, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and torch.distributed.get_rank() == self.rank:
            control.should_training_stop = True


def accuracy(prediction: Any) -> dict[str, Any]:
    return {"right": (prediction.predictions.argmax(axis=1) == prediction.label_ids).mean()}


def trainer(folder: str, *callbacks: Any, al: Mapping[str, Any] | None = None, **args: Any) -> ds_al.ALTrainer:
    module = ds_al.from_pretrained(CASES["bert"].build(), task=TASK, base_seed=SEED, **AL)
    return ds_al.ALTrainer(
        module,
        {"output_dir": folder, "disable_tqdm": True, "num_train_epochs": 2, "save_strategy": "no", **args},
        config={**CONFIG, "associated_learning": {**CONFIG["associated_learning"], **(al or {})}},
        train_dataset=rows(),
        eval_dataset=rows(1),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def diverged(folder: str) -> tuple[str, list[int]]:
    """Worker: the error of a training in which a number is infinite, and the steps until there and to the end."""
    al = {"non_finite": "save_and_stop"}
    first = trainer(folder, al=al)
    spike(first.engine.layers[0][1].b, "output", (3,))
    with pytest.raises(ALLayerError) as error:
        first.train()
    second = trainer(folder, al=al)
    return str(error.value), [first.state.global_step, second.train(resume_from_checkpoint=True).global_step]


def test_a_number_that_is_not_finite_stops_training_which_can_be_resumed(tmp_path: Path) -> None:
    (told, steps), (other, _) = run_ranks(f"{__name__}:diverged", 2, folder=str(tmp_path))
    assert told == other and f"checkpoint-{steps[0]}'" in told and (tmp_path / f"checkpoint-{steps[0]}").is_dir()
    assert 1 < steps[0] <= 2 * STEPS_PER_EPOCH == steps[1]


def work(folder: str) -> dict[str, Any]:
    """Worker: one training after the other."""
    found: dict[str, Any] = {}
    diary = Diary()
    options = {"logging_steps": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    whole = trainer(f"{folder}/whole", diary, **options)
    found["output"] = whole.train()
    found["weights"], found["events"], found["logs"] = weights(whole.engine), [*diary.events], diary.logs
    found["metrics"] = whole.evaluate()
    found["predicted"] = whole.predict(rows(1))
    found["unlabelled"] = whole.predict(rows(1).remove_columns("label"))
    found["written"] = whole.save_model(f"{folder}/plain")

    # From the first epoch's checkpoint to the end, by a trainer that begins anew.
    resumed = trainer(f"{folder}/whole", **options)
    resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-{STEPS_PER_EPOCH}")
    found["resumed"] = weights(resumed.engine)
    found["resumed history"] = [row["step"] for row in resumed.state.log_history]

    # The last complete checkpoint counts, though a process was killed before it could write `latest`; where there is
    # none, "auto" begins anew.
    if torch.distributed.get_rank() == 0:
        Path(f"{folder}/whole/latest").write_text(f"checkpoint-{STEPS_PER_EPOCH}")
    again, anew = trainer(f"{folder}/whole", **options), trainer(f"{folder}/anew", logging_strategy="no", max_steps=1)
    found["trained again"] = again.train(resume_from_checkpoint=True).metrics["train_steps_per_second"]
    found["again"], found["anew"] = weights(again.engine), anew.train(resume_from_checkpoint="auto").global_step

    # What the first rank's callbacks decide holds; what another one's do does not.
    for name, rank in (("stopped", 0), ("not stopped", 1)):
        stopped = trainer(f"{folder}/{name}", StopAt(2, rank=rank), logging_strategy="no")
        found[name] = stopped.train().global_step

    # An evaluation that never gets better: the first is the best, its weights come back.
    never = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    best = trainer(
        f"{folder}/best", never, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="right", num_train_epochs=9,
    )  # fmt: skip
    best.train()
    found["best"] = (best.state.global_step, best.state.best_model_checkpoint, never.early_stopping_patience_counter)
    index = {path.name: path for path in Path(f"{folder}/best").glob("checkpoint-*")}
    best_weights = weights(best.engine)
    best.engine.load_checkpoint(f"{folder}/best", tag=Path(best.state.best_model_checkpoint).name)
    found["best is loaded"] = different(best_weights, weights(best.engine)) == [] and sorted(index)
    best.engine.save_checkpoint(f"{folder}/foreign")
    with pytest.raises(ALCheckpointError, match="was not saved by an ALTrainer"):
        best.train(resume_from_checkpoint=f"{folder}/foreign")
    # A temporary folder has another name on each rank: each once waited for the others' part of the checkpoint.
    if torch.distributed.get_world_size() > 1:
        with pytest.raises(ALConfigError, match="expected the same on all"):
            trainer(f"{folder}/{torch.distributed.get_rank()}")
    return found


def alone() -> Any:
    """The same two epochs in a plain loop."""
    layers = built(layer_specs(CASES["bert"].build(), task=TASK, **AL)[0])
    data = rows().remove_columns("text")
    loader = ShuffledLoader(
        data, batch_size=MICRO_BATCH, seed=SEED, collate_fn=lambda samples: batch_fn(default_data_collator(samples))
    )
    reference.train(
        layers,
        [next(loader) for _ in range(2 * STEPS_PER_EPOCH * MICRO_BATCHES)],
        num_classes=V,
        base_seed=SEED,
        make_optimizer=lambda group: torch.optim.AdamW(group, lr=LR, fused=True),
    )
    return layers


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_trains_to_the_bits_of_the_plain_loop(tmp_path: Path, world: int) -> None:
    import transformers

    ranks = run_ranks(f"{__name__}:work", world, folder=str(tmp_path))
    one, layers = ranks[0], alone()
    assert different(merge([rank["weights"] for rank in ranks]), state(layers)) == []
    assert different(merge([rank["resumed"] for rank in ranks]), state(layers)) == []
    assert different(merge([rank["again"] for rank in ranks]), state(layers)) == []
    assert (one["trained again"], one["anew"]) == (0, 1)
    steps = 2 * STEPS_PER_EPOCH
    for rank in ranks:
        assert rank["events"] == one["events"] and rank["output"].global_step == steps == 6
        assert rank["stopped"] == 2 and rank["not stopped"] == steps
        assert rank["written"] == "classifier"
        assert rank["best"] == one["best"] and (rank["best"][0], rank["best"][2]) == (2, 1), "stopped at once"
        assert rank["best is loaded"]
    epoch = [*(f"step {n}" for n in (1, 2)), "log", "step 3", "epoch end", "log", "evaluate", "save"]
    other = ["step 4", "log", "step 5", "step 6", "log", "epoch end", "log", "evaluate", "save"]
    assert one["events"] == ["train begin", "epoch begin", *epoch, "epoch begin", *other, "log", "train end"]
    assert one["resumed history"] == [2, 3, 4, 6, 6, 6], "those of the first epoch are kept"

    # Scores are those of the layers, in the order of the data set.
    samples = default_data_collator([row for row in rows(1).remove_columns("text")])
    x, labels = batch_fn(samples)
    want = predict([layer.eval() for layer in layers], x, num_classes=V)
    for kind in ("predicted", "unlabelled"):
        torch.testing.assert_close(torch.from_numpy(one[kind].predictions), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.from_numpy(one["predicted"].label_ids), labels) and one["unlabelled"].label_ids is None
    share = (want.argmax(dim=1) == labels).float().mean().item()
    for prefix, metrics in (("eval", one["metrics"]), ("test", one["predicted"].metrics)):
        assert metrics[f"{prefix}_right"] == pytest.approx(share) == metrics[f"{prefix}_accuracy"]
        assert metrics[f"{prefix}_accuracy_exit_2"] == metrics[f"{prefix}_accuracy"]
        assert metrics[f"{prefix}_loss"] == pytest.approx(float(F.cross_entropy(want, labels)), rel=1e-4)
    assert one["logs"][0]["loss"] > 0 and one["logs"][0]["learning_rate"] == LR
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(x[0], attention_mask=x[1]).logits, want, rtol=1e-4, atol=1e-5)


def limited(folder: str) -> tuple[Any, ...]:
    """Worker: evaluations of which the third is the best and the first has no number; one checkpoint is kept."""
    values = iter([math.nan, 0.5, 0.9, 0.1, 0.2, 0.3])
    told = trainer(
        folder, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="value",
    )  # fmt: skip
    told.compute_metrics = lambda prediction: {"value": next(values)}
    told.train()
    left = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    best, ended = told.state.best_metric, weights(told.engine)
    told.engine.load_checkpoint(folder, tag="checkpoint-3", load_module_only=True)
    loaded = different(ended, weights(told.engine)) == []
    told.compute_metrics = lambda prediction: {"value": "high"}
    with pytest.raises(ALConfigError, match="'eval_value' is 'high': expected a number"):
        told.train()
    return best, left, loaded


def test_the_best_checkpoint_is_kept_beside_the_latest(tmp_path: Path) -> None:
    """Where ``keep_last`` was set in the config, it was removed and training ended in an error at its end; and an
    evaluation without a number was the best of all, when it was the first."""
    for found in run_ranks(f"{__name__}:limited", 2, folder=str(tmp_path)):
        assert found == (0.9, ["checkpoint-3", "checkpoint-6"], True)


def refused(folder: str) -> list[str]:
    """Worker: what cannot be honoured is named, before training."""

    class Late(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    class Cuts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = True

    messages = []
    for callbacks, args in (
        ([Late()], {}),
        ([object()], {}),
        ([], {"learning_rate": 1.0}),
        ([], {"evaluation_strategy": "epoch"}),
        ([], {"load_best_model_at_end": True}),
        ([], {"al": {"recovery": {"every": 4}}}),
    ):
        with pytest.raises(ALConfigError) as error:
            trainer(folder, *callbacks, **args)
        messages.append(str(error.value))
    with pytest.raises(ALConfigError) as error:
        trainer(folder, Cuts()).train()
    return [*messages, str(error.value)]


def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path) -> None:
    ((late, foreign, rate, name, best, recovery, epoch),) = run_ranks(f"{__name__}:refused", 1, folder=str(tmp_path))
    assert "Late listens to on_optimizer_step" in late and "use on_step_end" in late
    assert "got a callback of object" in foreign
    assert '"args.learning_rate": give it in the DeepSpeed config, as "optimizer.params.lr"' in rate
    assert "did you mean 'eval_strategy'?" in name
    assert "load_best_model_at_end needs an eval_strategy" in best
    assert '"associated_learning.recovery"' in recovery and "call its callbacks again" in recovery
    assert "should_epoch_stop" in epoch


def pairs(folder: str) -> tuple[int, Any, dict[str, float]]:
    """Worker: a layer list, rows ``(x, label)`` without a collator, and predictions made of the scores of a batch."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(SAMPLES, 8, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)
    data = torch.utils.data.TensorDataset(x, labels)
    blocks = [torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)]
    told = ds_al.ALTrainer(
        ds_al.from_layers(blocks, num_al_layers=1, num_classes=3, example=x[:2], base_seed=SEED),
        {"output_dir": folder, "disable_tqdm": True, "num_train_epochs": 1, "save_strategy": "no"},
        config=CONFIG,
        train_dataset=data,
        compute_metrics=lambda found: {"right": float((found.predictions == found.label_ids).mean())},
        preprocess_logits_for_metrics=lambda scores, labels: scores.argmax(dim=1),
    )
    told.train()
    with pytest.raises(ALConfigError, match="eval_dataset of generator"):
        told.evaluate(row for row in data)
    output = told.predict(data)
    return told.state.global_step, output.predictions.shape, output.metrics


def test_pairs_and_predictions_made_of_scores(tmp_path: Path) -> None:
    ((steps, shape, metrics),) = run_ranks(f"{__name__}:pairs", 1, folder=str(tmp_path))
    assert (steps, shape) == (STEPS_PER_EPOCH, (SAMPLES,))
    assert metrics["test_right"] == pytest.approx(metrics["test_accuracy"])
