"""``Job``: one experiment. Loads data, builds model and engine, trains, evaluates, and reports to observers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_al.experiment.architecture import Architecture
from ds_al.experiment.budget import Budget
from ds_al.experiment.description import Description
from ds_al.experiment.display import Display
from ds_al.experiment.hyperparameters import hyperparameters
from ds_al.experiment.inputs import RunData
from ds_al.experiment.observer import Observers, RunInfo, Snapshot
from ds_al.experiment.process import quiet
from ds_al.experiment.resuming import Origin
from ds_al.experiment.run_folder import RunFolder, check_probe, epochs_of, make_folder, probed_folder
from ds_al.experiment.stopping import Stop
from ds_al.experiment.summary import best_epoch, run_facts, skipped_steps, summarize
from ds_al.experiment.wandb_run import WandbRun
from ds_al.parallel import meetings, presence
from ds_al.parallel.agreement import agreed
from ds_al.parallel.world import join_world
from ds_al.system.allocator import keep_freed_memory
from ds_al.system.secrets import without_secrets
from ds_al.trace import ActivationMeter

History = list[dict[str, Any]]
"""Metrics of each epoch of this run."""
_EPOCHS = "epochs"  # in the state of a checkpoint: epochs whose rows are written
_SECONDS = "seconds"  # seconds of the epoch after them, up to the checkpoint


def join() -> None:
    """Joins the other ranks, before anything can fail on this one alone. Every rank must call it."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with quiet():
        join_world(timeout=timedelta(minutes=10))


class Job:
    """Trains and evaluates what a config describes. Every rank makes one and calls :meth:`run`.

    What depends on the training method is in :attr:`form`; what shows and records the run are its observers. They run
    on the last stage's rank, which receives all local losses, of the first replica. Losses are means over replicas;
    times, idle shares and bytes are those of the first one.

    Args:
        config: the whole config, DeepSpeed's keys and both blocks.
        resume: folder of an earlier run, or of its checkpoints, to continue from; ``"auto"`` continues the latest run
            of the experiment in its own folder (:mod:`ds_al.experiment.resuming`).

    Attributes:
        form: the form of the run (:mod:`ds_al.experiment.forms`).
        layout: stage and replica of this process.
        loader: training micro-batches; ``None`` where this process reads no data.
        engine: what trains.
        writes: whether this process writes the files of the run.
    """

    def __init__(self, config: dict[str, Any], *, resume: str | None = None) -> None:
        join()
        self.description = described = Description.of(config, world=dist.get_world_size(), rank=dist.get_rank())
        self.config, self.experiment, self.form = described.config, described.experiment, described.form
        self.layout, self.sizes = layout, sizes = described.layout, described.sizes
        experiment = self.experiment
        agreed("the output folder", lambda: make_folder(experiment))
        found = agreed("the checkpoint", lambda: Origin.of(resume, make_folder(experiment)), facts=Origin.facts)
        self.origin = origin = Origin(**meetings.broadcast(vars(found), source=layout.writer))
        self.stop = Stop()
        if experiment.keep_freed_memory and get_accelerator().device_name() == "cpu":
            keep_freed_memory()
        self.writes = layout.rank == layout.writer

        self.data = RunData.load(experiment.data, seed=experiment.seed, read=self.form.reads_data(layout))
        self.network = Architecture(experiment, self.data.facts)
        self.network.check(is_al=self.form.has_exits)
        self.spanned = self.form.has_exits and len(self.network.al_layers()) < layout.stages
        per_epoch = sizes.batches_per_epoch(self.data.facts.sizes["train"])
        self.budget = Budget(per_epoch, experiment.epochs, experiment.max_batches, experiment.max_seconds)
        share = (layout.replica, layout.replicas)
        self.loader = self.data.training_loader(batch_size=sizes.micro_batch, share=share)

        with quiet():
            config = self._engine_config()
            self.engine = self.form.build(self.network, config, num_stages=layout.stages, loader=self.loader)
            state: Mapping[str, Any] = {}
            if origin.checkpoints is not None and origin.trained:
                state = self.form.resume(self.engine, origin.checkpoints, tag=origin.tag, loader=self.loader)
        self._epochs = state.get(_EPOCHS)
        self._spent = 0.0 if origin.run is None else float(state.get(_SECONDS, 0.0))
        self._peak_activation_bytes: int | None = None

    def run(self) -> dict[str, Any]:
        """Trains all epochs, then evaluates once on the test part. Returns the summary, on every rank."""
        self.info = self._info()
        tracing = self.engine.tracing
        observers = self._observers()
        observers.started(self.info)
        try:
            if tracing is not None:
                tracing.folder = self.info.folder / "trace"
            if self.layout.rank == 0:
                self.data.save_vocabulary(self.info.folder / "vocabulary.json")
            meetings.barrier()  # the time that the observers take to start is no idle time of a stage
            start = time.perf_counter()
            with self.stop.by_signals():
                history = self._train(observers)
            if tracing is not None:
                tracing.finish()
            observers.trained((tracing.events or ()) if tracing is not None else ())
            summary = {**self._summary(history, seconds=time.perf_counter() - start), "folder": str(self.info.folder)}
            observers.finished(summary, history)
            return summary
        except BaseException:
            observers.failed()
            raise

    def close(self) -> None:
        """Ends prefetching and, once all ranks have called this, leaves the process group."""
        if self.loader is not None:
            self.loader.close()
        presence.here().end()
        meetings.barrier()
        dist.destroy_process_group()

    def _engine_config(self) -> dict[str, Any]:
        steps = self.budget.total_batches * self.form.schedule_steps(self.sizes.per_replica, spanned=self.spanned)
        return self.description.engine_config(steps=steps)

    def _info(self) -> RunInfo:
        first_batch = self.engine.global_samples // self.sizes.samples
        first_epoch = self.budget.position(first_batch)[0] if self._epochs is None else self._epochs
        parameters = sum(parameter.numel() for parameter in self.engine.module.parameters())
        return RunInfo(
            name=self.experiment.name,
            method=self.form.config.method,
            folder=self._new_folder(),
            stages=self.layout.stages,
            replicas=self.layout.replicas,
            partition=self.form.bounds(self.engine),
            partition_method=self.experiment.partition_method,
            partition_table=self.form.partition_table(self.engine),
            parameters=self.engine.gather(parameters),
            seed=self.experiment.seed,
            training_samples=self.data.facts.sizes["train"],
            micro_batch_size=self.sizes.micro_batch,
            micro_batches=self.sizes.micro_batches,
            micro_batches_per_batch=self.sizes.per_replica * self.sizes.replicas,
            batches_per_epoch=self.budget.batches_per_epoch,
            total_batches=self.budget.total_batches,
            epochs=self.budget.epochs,
            first_epoch=first_epoch,
            first_batch=first_batch,
            optimizer_steps=self.form.optimizer_steps(self.sizes.per_replica, spanned=self.spanned),
            loss=self.form.loss,
            writer=self.layout.writer,
            groups=self.engine.module.groups if self.spanned else (),
            group_schedule=self.engine.al.group_schedule if self.spanned else "",
        )

    def _new_folder(self) -> Path:
        """Makes the folder of the run; every rank gets its path.

        Raises:
            ALConfigError: on all ranks: it cannot be made, or one of them does not see it.
        """
        made = agreed("the output folder", self._probed_folder)
        folder, probe = meetings.broadcast(made, source=self.layout.writer)
        agreed("the output folder", lambda: None if meetings.repeat() else check_probe(Path(folder), probe))
        return Path(folder)

    def _probed_folder(self) -> tuple[str, str] | None:
        parent = make_folder(self.experiment)
        if not self.writes or meetings.repeat():
            return None
        folder, probe = probed_folder(parent, run=self.origin.run)
        return str(folder), probe

    def _observers(self) -> Observers:
        if not self.writes:
            return Observers()
        facts = without_secrets(run_facts(self.info, self.network, device=self.engine.device))
        settings = {**hyperparameters(self.config, self.info), **facts}
        wandb = WandbRun(self.experiment.wandb, settings, resumed_from=self.origin.checkpoints)
        return Observers(RunFolder(self.config, facts), wandb, Display())

    def _train(self, observers: Observers) -> History:
        """Trains, evaluates and saves, epoch by epoch, until the budget is used up.

        Raises:
            Stopped: a signal has stopped the run; its checkpoint is saved.
        """
        history = self._earlier()
        for epoch in range(self.info.first_epoch, self.budget.epochs):
            row = self._train_epoch(epoch, observers)
            history.append(row)
            last = self.budget.ends(epoch, seconds=sum(each["seconds"] for each in history))
            if last or (epoch + 1) % self.experiment.evaluate_every == 0:
                row |= self._validate(history[:-1])
            observers.epoch(row)
            self._spent = 0.0
            every = self.experiment.checkpoint_every
            if last or (every and (epoch + 1) % every == 0):
                self._save(f"epoch_{epoch + 1}", complete=last, epochs=epoch + 1, seconds=0.0)
            if last:
                break
        return history

    def _earlier(self) -> History:
        """Returns the rows of the epochs that the run in this folder has trained before; every rank gets them."""
        rows = epochs_of(self.info.folder) if self.writes else None
        return meetings.broadcast(rows, source=self.layout.writer)  # type: ignore[no-any-return]

    def _save(self, tag: str, *, complete: bool, epochs: int, seconds: float | None = None) -> None:
        """Saves a checkpoint, after so many epochs whose rows are written, and by default the seconds since then."""
        state = {_EPOCHS: epochs, _SECONDS: self._epoch_seconds() if seconds is None else seconds}
        with quiet():
            self.form.save(self.engine, self.info.folder / "checkpoints", tag=tag, complete=complete, state=state)

    def _save_at_stop(self, epoch: int) -> Path:
        """Saves where ``"non_finite": "save_and_stop"`` ends the run; returns the path."""
        tag = f"batch_{self.engine.global_samples // self.sizes.samples}"
        self._save(tag, complete=True, epochs=epoch)
        return self.info.folder / "checkpoints" / tag

    def _epoch_seconds(self) -> float:
        """Returns the seconds of the slowest stage in this epoch, those before an interruption included."""
        return self._spent + max(each.wall for each in self.engine.gather(self.engine.stats()))

    def _train_epoch(self, epoch: int, observers: Observers) -> dict[str, Any]:
        """Trains the batches of an epoch that are left, and returns its metrics.

        Raises:
            Stopped: a signal has stopped the run; its checkpoint is saved.
        """
        engine, before = self.engine, max(self.info.first_batch, epoch * self.budget.batches_per_epoch)
        self.form.at_stop(engine, lambda: self._save_at_stop(epoch))
        engine.reset_stats()
        end = epoch * self.budget.batches_per_epoch + self.budget.batches(epoch)
        logged, since = before, time.perf_counter()
        for batch in range(before + 1, end + 1):
            self._train_batch()
            observers.batch(epoch, self._snapshot)
            if self.writes and batch % self.experiment.log_every == 0:
                rate = (batch - logged) * self.sizes.samples / (time.perf_counter() - since)
                observers.logged(self._row(epoch, batch, samples_per_second=rate))
                logged, since = batch, time.perf_counter()
            within = self.experiment.checkpoint_batches
            if within is not None and batch % within == 0 and batch != end:
                self._save(f"batch_{batch}", complete=False, epochs=epoch)
            if self.stop.after(batch):
                self._save(f"batch_{batch}", complete=True, epochs=epoch)
                raise self.stop.stopped(batch, folder=self.info.folder / "checkpoints")
        stats = engine.gather(engine.stats())
        seconds = max(each.wall for each in stats)
        means, losses = self.form.epoch_losses(engine)
        if losses is not None:
            observers.losses(epoch, losses)
        return {
            "epoch": epoch + 1,
            "seconds": self._spent + seconds,
            "samples_per_second": (end - before) * self.sizes.samples / seconds if seconds else 0.0,
            "learning_rate": engine.get_lr()[0],
            "idle": [each.idle for each in stats],
            "wait_data": stats[0].wait_data,
            "bytes_sent": [each.bytes_sent for each in stats],
            **skipped_steps([each.skipped for each in stats]),
            **means,
        }

    def _train_batch(self) -> None:
        """Trains one batch; the activations of the first one are measured."""
        if self._peak_activation_bytes is not None:
            self.engine.train_batch()
            return
        with ActivationMeter(exclude=self.engine.module.parameters()) as meter:
            self.engine.train_batch()
        self._peak_activation_bytes = meter.peak_bytes

    def _row(self, epoch: int, batch: int, *, samples_per_second: float) -> dict[str, Any]:
        """What is logged after a batch, of those since the last row of this epoch."""
        return {
            "epoch": epoch + 1,
            "batch": batch,
            "learning_rate": self.engine.get_lr()[0],
            "samples_per_second": samples_per_second,
            **self.form.batch_losses(self.engine),
        }

    def _snapshot(self) -> Snapshot:
        metrics = self.engine.stage_metrics()
        return Snapshot(metrics, self.form.latest_losses(self.engine, metrics), learning_rate=self.engine.get_lr()[0])

    def _validate(self, earlier: History) -> dict[str, Any]:
        """Evaluates on the validation part, and by option on the test part where that is the best epoch so far."""
        validation = self._evaluate("validation")["accuracy"]
        found = {"validation_accuracy": validation}
        if self.experiment.evaluate_fully and self.experiment.test:
            best = best_epoch(earlier)
            if best is None or validation[-1] > best["validation_accuracy"][-1]:
                found["test_accuracy"] = self._evaluate("test")["accuracy"]
        return found

    def _evaluate(self, part: str, **options: Any) -> dict[str, Any]:
        return self.form.evaluate(self.engine, self.data.evaluation_batches(part), **options)

    def _summary(self, history: History, *, seconds: float) -> dict[str, Any]:
        """Evaluates on the test part, and by option on the other parts, and summarizes the run."""
        costs = self.network.exit_costs(self.sizes.micro_batch) if self.form.has_exits else None
        confidence, fully = self.experiment.exit_confidence if costs else (), self.experiment.evaluate_fully
        return summarize(
            self.info,
            history,
            test=self._evaluate("test", exit_confidence=confidence, averaged=fully) if self.experiment.test else {},
            full=self._full_evaluation(history) if fully else {},
            exit_costs=costs,
            peak_activation_bytes=self.engine.gather(self._peak_activation_bytes or 0),
            seconds=seconds,
        )

    def _full_evaluation(self, history: History) -> dict[str, Any]:
        """Evaluates on the training part, and averages of exits on the validation part."""
        train = self._evaluate("train")["accuracy"]
        averaged = self._evaluate("validation", averaged=True)["averaged"] if self.form.has_exits else None
        best = best_epoch(history)
        return {
            "train_accuracy": train[-1],
            "averaged_validation_accuracy": averaged,
            "test_accuracy_at_best_validation": best["test_accuracy"][-1] if best and self.experiment.test else None,
        }
