"""One run: data, model, engine, epochs, the look at the test set, and what is left of it on disk."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.utils import set_random_seed
from torch import nn

import ds_al
from ds_al.config.associated_learning import al_config
from ds_al.config.base import with_scheduler_steps
from ds_al.config.methods import AL_METHODS, BACKPROP_METHODS
from ds_al.data import ShuffledLoader, Splits, load_data, ordered_batches
from ds_al.errors import ALConfigError, ALLayerError
from ds_al.experiment.budget import Budget
from ds_al.experiment.config import BLOCK, ExperimentConfig, experiment_config
from ds_al.experiment.display import Display
from ds_al.experiment.exits import averaged_rows, confidence_rows, exit_rows
from ds_al.experiment.inputs import DataFacts, training_loader
from ds_al.experiment.layout import Layout
from ds_al.experiment.recipes import with_recipe
from ds_al.experiment.record import Record
from ds_al.models import build_al, build_twin
from ds_al.models.exit_cost import ExitCost, exit_costs
from ds_al.parallel.world import join_world
from ds_al.system.allocator import keep_freed_memory
from ds_al.trace import ActivationMeter


class Job:
    """Trains and evaluates what a config describes. Every rank makes one and calls :meth:`run`.

    The last stage's rank shows progress and writes files: local losses travel downstream, so it knows all. Of data
    parallel copies it is the first one's; losses are means over copies, times, idle shares and bytes are of that copy.

    Args:
        config: the whole config, DeepSpeed's keys and both blocks.
        resume: folder of checkpoints of an earlier run to go on from.
    """

    def __init__(self, config: dict[str, Any], *, resume: str | None = None) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with quiet():
            join_world(timeout=timedelta(minutes=10))
        self.config = config = with_recipe(config)
        self.resume = resume
        self.experiment: ExperimentConfig = experiment_config(config)
        if self.experiment.keep_freed_memory and get_accelerator().device_name() == "cpu":
            keep_freed_memory()
        self.al = al_config(config)
        self.layout = Layout.of(
            method=self.al.method,
            num_stages=self.experiment.num_stages,
            world=dist.get_world_size(),
            rank=dist.get_rank(),
        )
        self.records = self.layout.rank == self.layout.recorder
        self.splits, self.data = self._data()
        self.micro_batch = self._key("train_micro_batch_size_per_gpu")
        self.micro_batches = self._key("gradient_accumulation_steps")
        self.own_micro_batches = self.layout.micro_batches_of_a_copy(self.micro_batches, method=self.al.method)
        self.batch_samples = self.micro_batch * self.own_micro_batches * self.layout.copies
        self.batches_per_epoch = self.data.sizes["train"] // self.batch_samples
        if not self.batches_per_epoch:
            raise ALConfigError(
                f"{self.data.sizes['train']} training samples make no batch of {self.batch_samples}, "
                f"{self.own_micro_batches} micro-batches of {self.micro_batch} in each of {self.layout.copies} copies: "
                "lower train_micro_batch_size_per_gpu or gradient_accumulation_steps"
            )
        self.budget = Budget(
            self.batches_per_epoch, self.experiment.epochs, self.experiment.max_batches, self.experiment.max_seconds
        )
        self.loader = self._loader()
        with quiet():
            self.engine = self._engine()
            if resume is not None:
                self.engine.load_checkpoint(resume)
                if self.loader is not None and self.al.method in BACKPROP_METHODS:
                    # An AL engine does this itself, DeepSpeed's does not.
                    self.loader.seek(self.engine.global_samples // self.micro_batch // self.layout.copies)
        self.first_epoch = self.engine.global_samples // (self.batches_per_epoch * self.batch_samples)
        self.parameters: list[int] = self.engine.gather(sum(p.numel() for p in self.engine.module.parameters()))
        self.peak_activations = 0

    @property
    def model_options(self) -> dict[str, Any]:
        """Options of both forms of the network: the config's, and what the data says."""
        model = self.experiment.model
        return {**self.data.options(model.name), **model.options}

    def run(self) -> dict[str, Any]:
        """Trains all epochs, then looks at the test samples once. Returns the summary, on every rank."""
        record = Record(self) if self.records else None
        display = Display(self) if self.records else None
        tracing = self.engine.tracing
        if tracing is not None:
            tracing.folder = self._folder(record) / "trace"
        if self.data.builds_vocabulary:
            folder = self._folder(record)
            if self.layout.rank == 0 and self.splits is not None and self.splits.save_vocabulary is not None:
                self.splits.save_vocabulary(folder / "vocabulary.json")
        dist.barrier()  # what the record needs to start is no time that a stage idles
        start = time.perf_counter()
        history: list[dict[str, Any]] = []
        with display or contextlib.nullcontext():
            for epoch in range(self.first_epoch, self.budget.epochs):
                row = self._epoch(epoch, display, record)
                history.append(row)
                last = self.budget.ends(epoch, seconds=sum(each["seconds"] for each in history))
                if last or not (epoch + 1) % self.experiment.evaluate_every:
                    self._evaluate(row, history[:-1])
                if record and display:
                    record.epoch(row)
                    display.epoch(row)
                self._checkpoint(epoch, record, last=last)
                if last:
                    break
        if tracing is not None:
            tracing.finish()
            if record and tracing.events:
                record.timeline(tracing.events)
        seconds = time.perf_counter() - start
        summary = self._summary(seconds=seconds, history=history)
        summary["folder"] = str(self._folder(record))
        if record and display:
            record.finish(summary, history)
            display.table(summary, folder=record.folder)
        return summary

    def close(self) -> None:
        """Ends what prefetches and leaves the process group, once all ranks have come here."""
        if self.loader is not None:
            self.loader.close()
        dist.barrier()
        dist.destroy_process_group()

    # ---- parts -------------------------------------------------------------------------------------

    def _key(self, name: str) -> int:
        value = self.config.get(name)
        if not isinstance(value, int) or value < 1:
            raise ALConfigError(f'"{name}": got {value!r}, expected a whole number of 1 or more')
        return value

    def _folder(self, record: Record | None) -> Path:
        """The run's folder, on every rank."""
        folder: list[Any] = [str(record.folder) if record else None]
        dist.broadcast_object_list(folder, src=self.layout.recorder)
        return Path(folder[0])

    def _data(self) -> tuple[Splits | None, DataFacts]:
        """The first stage's data; the others learn only what the model needs to know of them.

        Back-propagation reads labels on the last stage, so there it needs the data, too.
        """
        first, last = self.layout.stage == 0, self.layout.stage == self.layout.stages - 1
        reads = first or (last and self.al.method in BACKPROP_METHODS)
        splits = load_data(self.experiment.data, seed=self.experiment.seed) if reads else None
        facts: list[Any] = [DataFacts.of(splits) if self.layout.rank == 0 and splits is not None else None]
        dist.broadcast_object_list(facts, src=0)
        return splits, facts[0]

    def _batches(self, part: str) -> Any:
        if self.splits is None:
            # Stages that read no data take part in the evaluation all the same.
            return [(None, None)] * -(-self.data.sizes[part] // self.experiment.data.eval_batch_size)
        return ordered_batches(getattr(self.splits, part), batch_size=self.experiment.data.eval_batch_size)

    def _loader(self) -> ShuffledLoader | None:
        if self.splits is None:
            return None
        return training_loader(
            self.splits,
            self.experiment.data,
            batch_size=self.micro_batch,
            seed=self.experiment.seed,
            share=(self.layout.copy, self.layout.copies),
        )

    def _engine(self) -> Any:
        model, seed, method = self.experiment.model, self.experiment.seed, self.experiment.partition_method
        if self.al.method in BACKPROP_METHODS and method.startswith(("measured", "cuts:")):
            raise ALConfigError(
                f'"{BLOCK}.partition_method": got {method!r}, which is for AL methods: a {self.al.method} run is '
                "DeepSpeed's own, use uniform, parameters or type:<regex>"
            )
        if method != "measured":
            for key, default in {"partition_memory": None, "partition_cache": "use"}.items():
                if getattr(self.experiment, key) != default:
                    raise ALConfigError(
                        f'"{BLOCK}.{key}" with partition_method {method!r}: it is for "measured", leave it out'
                    )
        ds_config = {key: value for key, value in self.config.items() if key != BLOCK}
        ds_config["gradient_accumulation_steps"] = self.own_micro_batches
        ds_config = with_scheduler_steps(ds_config, self._scheduler_steps())
        if self.al.method in AL_METHODS:
            if self.experiment.label_smoothing is not None:
                raise ALConfigError(
                    f'"{BLOCK}.label_smoothing" is for bp_* methods: got {self.al.method}, give it to its objective, '
                    f'as "{BLOCK}.model.al_options.objective.label_smoothing"'
                )
            module: PipelineModule = ds_al.ALPipelineModule(
                build_al(model.name, **self.model_options, **model.al_options),
                num_stages=self.layout.stages,
                num_classes=len(self.data.classes),
                base_seed=seed,
                partition_method=method,
                dynamic_shape=self.data.varying,
                example=self.data.example(self.micro_batch) if method == "measured" else None,
                config=ds_config,
                memory_limit=self.experiment.partition_memory and self.experiment.partition_memory * 2**30,
                partition_cache=self.experiment.partition_cache,
            )
            return ds_al.initialize(model=module, config=ds_config, training_data=self.loader)[0]
        module = PipelineModule(
            build_twin(model.name, **self.model_options, **model.twin_options),
            num_stages=self.layout.stages,
            loss_fn=nn.CrossEntropyLoss(label_smoothing=self.experiment.label_smoothing or 0.0),
            seed_layers=True,
            seed_fn=lambda number: set_random_seed(int(number)),  # DeepSpeed's own chokes on its numpy bounds
            base_seed=seed,
            partition_method=self.experiment.partition_method,
            dynamic_shape=self.data.varying,
        )
        engine = ds_al.initialize(model=module, config=ds_config)[0]
        if self.loader is not None:
            engine.set_dataiterator(iter(self.loader))
        return engine

    def _scheduler_steps(self) -> int:
        """What the LR schedule counts, over the whole run."""
        batches = self.budget.total_batches
        if self.al.count == "step" and self.al.method in AL_METHODS:
            return batches * (self.al.steps_per_batch or self.own_micro_batches)
        return batches

    def _epoch(self, epoch: int, display: Display | None, record: Record | None) -> dict[str, Any]:
        engine = self.engine
        engine.reset_stats()
        batches = self.budget.batches(epoch)
        for batch in range(batches):
            if epoch == self.first_epoch and batch == 0:
                with ActivationMeter(exclude=engine.module.parameters()) as meter:
                    engine.train_batch()
                self.peak_activations = meter.peak_bytes
            else:
                engine.train_batch()
            if display:
                display.batch(epoch, batch)
        stats = engine.gather(engine.stats())
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "seconds": max(s.wall for s in stats),
            "samples_per_second": batches * self.batch_samples / max(s.wall for s in stats),
            "learning_rate": engine.get_lr()[0],
            "idle": [s.idle for s in stats],
            "wait_data": stats[0].wait_data,
            "bytes_sent": [s.bytes_sent for s in stats],
        }
        if self.al.method in AL_METHODS:
            losses = engine.gather_losses()
            row["associated_loss"], row["autoencoder_loss"] = losses.mean(dim=0).t().tolist()
            if record:
                record.batches(epoch, losses)
        else:
            row["loss"] = float(engine.agg_train_loss)
        return row

    def _evaluate(self, row: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
        """Looks at the validation samples and adds to the epoch's row what is seen."""
        row["validation_accuracy"] = self.engine.evaluate(self._batches("validation"))["accuracy"]
        best = max((r["validation_accuracy"][-1] for r in earlier if "validation_accuracy" in r), default=-1.0)
        if self.experiment.evaluate_fully and self.experiment.test and row["validation_accuracy"][-1] > best:
            row["test_accuracy"] = self.engine.evaluate(self._batches("test"))["accuracy"]

    def _checkpoint(self, epoch: int, record: Record | None, *, last: bool) -> None:
        every = self.experiment.checkpoint_every
        if last or (every and (epoch + 1) % every == 0):
            folder = self._folder(record) / "checkpoints"
            with quiet():
                self.engine.save_checkpoint(str(folder), tag=f"epoch_{epoch + 1}")
                if last and self.al.checkpoint.asynchronous:
                    self.engine.flush()  # what comes next looks at it

    def _summary(self, *, seconds: float, history: list[dict[str, Any]]) -> dict[str, Any]:
        test = self._test() if self.experiment.test else {}
        trained = sum(row["seconds"] for row in history)
        looked = [row for row in history if "validation_accuracy" in row]
        best = max(looked, key=lambda row: row["validation_accuracy"][-1], default=None)  # the first of equals
        return {
            "name": self.experiment.name,
            "method": self.al.method,
            "stages": self.layout.stages,
            "copies": self.layout.copies,
            "micro_batches": self.micro_batches,
            "micro_batch_size": self.micro_batch,
            "partition": list(self.engine.module.parts),
            "seed": self.experiment.seed,
            "epochs": history[-1]["epoch"] if history else self.first_epoch,
            "test_accuracy": test.get("accuracy"),
            "test_samples": test.get("samples"),
            "averaged_accuracy": test.get("averaged"),
            "exits": exit_rows(test["accuracy"], self.exit_costs) if test and self.exit_costs else None,
            "averaged": averaged_rows(test["averaged"], self.exit_costs)
            if test.get("averaged") and self.exit_costs
            else None,
            "early_exit": confidence_rows(test.get("early_exit", ()), self.exit_costs) if self.exit_costs else None,
            "validation_accuracy": history[-1].get("validation_accuracy") if history else None,
            "best_validation_accuracy": best["validation_accuracy"][-1] if best else None,
            "best_epoch": best["epoch"] if best else None,
            **self._full_evaluation(best),
            "seconds": seconds,
            "training_seconds": trained,
            "samples_per_second": sum(r["samples_per_second"] * r["seconds"] for r in history) / trained
            if trained
            else 0,
            "idle": [
                sum(r["idle"][stage] * r["seconds"] for r in history) / trained if trained else 0
                for stage in range(self.layout.stages)
            ],
            "wait_data_seconds": sum(row["wait_data"] for row in history),
            "peak_activation_bytes": self.engine.gather(self.peak_activations),
            "bytes_sent": [
                sum(row["bytes_sent"][s] for row in history)
                if history and history[0]["bytes_sent"][s] is not None
                else None
                for s in range(self.layout.stages)
            ],
            "parameters": self.parameters,
        }

    def _test(self) -> dict[str, Any]:
        """The look at the test samples."""
        if self.al.method in BACKPROP_METHODS:
            return self.engine.evaluate(self._batches("test"))
        return self.engine.inference.evaluate(
            self._batches("test"),
            exit_confidence=self.experiment.exit_confidence if self.exit_costs else (),
            averaged=self.experiment.evaluate_fully,
        )

    @functools.cached_property
    def exit_costs(self) -> list[ExitCost] | None:
        """What inference costs at every exit; ``None`` for back-propagation, and where it cannot be counted."""
        if self.al.method in BACKPROP_METHODS:
            return None
        model, shape = self.experiment.model, (self.micro_batch, *self.data.shape)
        try:
            al = build_al(model.name, **self.model_options, **model.al_options)
            return exit_costs(al, shape=shape, num_classes=len(self.data.classes), dtype=self.data.dtype)
        except ALLayerError as error:
            warnings.warn(f"exits have no cost: {error}", stacklevel=2)
            return None

    def _full_evaluation(self, best: dict[str, Any] | None) -> dict[str, Any]:
        if not self.experiment.evaluate_fully:
            return {}
        train = self.engine.evaluate(self._batches("train"))["accuracy"]
        averaged = None
        if self.al.method in AL_METHODS:
            averaged = self.engine.inference.evaluate(self._batches("validation"), averaged=True)["averaged"]
        return {
            "train_accuracy": train[-1],
            "averaged_validation_accuracy": averaged,
            "test_accuracy_at_best_validation": best["test_accuracy"][-1] if best and self.experiment.test else None,
        }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps DeepSpeed's start-up prints from the display; what it prints is shown if it then fails."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    except BaseException:
        print(text.getvalue(), end="")
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value for programs, creating the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
