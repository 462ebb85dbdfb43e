"""Progress of a run: one live display where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean as mean
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ds_al.experiment.live import Averages, advice, slowest, stage_table

if TYPE_CHECKING:
    from ds_al.experiment.job import Job


class Display:
    """Shows a run on the rank that makes it. Use as a context manager around training.

    Args:
        job: the run.
        console: where to; by default this process's standard output.
    """

    _SECONDS = 0.5  # between two looks at the losses, which wait for the device

    def __init__(self, job: Job, *, console: Console | None = None) -> None:
        self.job = job
        self.console = console or Console()
        self.epochs = job.budget.epochs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        total = job.budget.total_batches - job.first_epoch * job.batches_per_epoch
        self._task = self._progress.add_task("epoch", total=total, speed="")
        self._live = Live(self._progress, console=self.console, refresh_per_second=4, transient=True)
        self._looked = self._started = time.perf_counter()
        self._done = 0
        self._averages = Averages()

    def __enter__(self) -> Display:
        job = self.job
        stages, copies = job.layout.stages, job.layout.copies
        times = f", {copies} copies" if copies > 1 else ""
        self.console.print(
            f"{job.experiment.name}: {job.al.method}, {stages} stage{'s' * (stages > 1)}{times}, "
            f"{job.data.sizes['train']} training samples, micro-batches of {job.micro_batch}, "
            f"{job.own_micro_batches * copies} a batch, {job.batches_per_epoch} batches an epoch, "
            f"seed {job.experiment.seed}",
            highlight=False,
            soft_wrap=True,
        )
        if getattr(job.engine.module, "partition_table", None):
            self.console.print(job.engine.module.partition_table, highlight=False, markup=False, soft_wrap=True)
        self._looked = self._started = time.perf_counter()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def batch(self, epoch: int, batch: int) -> None:
        """One batch is done. Looks at losses and redraws only now and then."""
        self._done += 1
        now = time.perf_counter()
        if not self.console.is_terminal or now - self._looked < self._SECONDS:
            return
        self._looked = now
        job = self.job
        speed = self._done * job.batch_samples / (now - self._started)
        self._progress.update(
            self._task,
            completed=self._done,
            description=f"epoch {epoch + 1}/{self.epochs}",
            speed=f"{speed:,.0f} samples/s",
        )
        self._live.update(Group(self._progress, self._stages()))

    def _stages(self) -> Group:
        """The table of stages, and under it the slowest of them, if one is."""
        engine, stage_metrics = self.job.engine, self.job.engine.stage_metrics()
        parts, busy = engine.module.parts, self._averages.busy(stage_metrics)
        marked = slowest(busy)
        if hasattr(engine, "report"):
            report = engine.report.tolist()
            losses = [
                [mean(rows) for rows in zip(*report[parts[s] : parts[s + 1]], strict=True)] for s in stage_metrics
            ]
        else:
            losses = [[float(engine.agg_train_loss)]] * len(stage_metrics)
        lines: list[Any] = [
            stage_table(stage_metrics, busy, losses, marked),
            Text(f"lr {engine.get_lr()[0]:.2e}", "dim"),
        ]
        if marked is not None:
            sentence = advice(
                marked,
                data=stage_metrics[marked.stage].data,
                layers=parts[marked.stage + 1] - parts[marked.stage],
                partition_method=self.job.experiment.partition_method,
            )
            lines.append(Text(sentence, "yellow"))
        return Group(*lines)

    def epoch(self, row: dict[str, Any]) -> None:
        """One line for an epoch."""
        parts = [f"epoch {row['epoch']:>3}/{self.epochs}", f"{row['samples_per_second']:>7,.0f} samples/s"]
        if "associated_loss" in row:
            bounds = self.job.engine.module.parts
            for stage in range(self.job.layout.stages):
                a, e = (
                    sum(row[key][bounds[stage] : bounds[stage + 1]]) / (bounds[stage + 1] - bounds[stage])
                    for key in ("associated_loss", "autoencoder_loss")
                )
                parts.append(f"stage {stage} A {a:.4f} E {e:.4f}")
        else:
            parts.append(f"loss {row['loss']:.4f}")
        parts.append(f"lr {row['learning_rate']:.1e}")
        if "validation_accuracy" in row:
            parts.append(f"validation {row['validation_accuracy'][-1]:.4f}")
        done = row["epoch"] - self.job.first_epoch
        left = (time.perf_counter() - self._started) / done * (self.epochs - row["epoch"])
        self.console.print("  ".join([*parts, f"left {left:,.0f} s"]), highlight=False, soft_wrap=True)

    def table(self, summary: dict[str, Any], *, folder: Path) -> None:
        """The final tables, then the line that holds the test accuracy."""
        stages = Table(title=f"{summary['name']}: {summary['method']}", title_justify="left")
        for column in ("stage", "AL layers", "parameters", "idle", "peak activations", "sent"):
            stages.add_column(column, justify="right")
        for stage in range(summary["stages"]):
            bounds = summary["partition"]
            sent = summary["bytes_sent"][stage]
            stages.add_row(
                str(stage),
                f"{bounds[stage] + 1}..{bounds[stage + 1]}",
                f"{summary['parameters'][stage]:,}",
                f"{summary['idle'][stage]:.1%}",
                _bytes(summary["peak_activation_bytes"][stage]),
                "-" if sent is None else _bytes(sent),
            )
        part = "validation" if summary["test_accuracy"] is None else "test"
        found = summary[f"{part}_accuracy"] or []
        exits = Table(title=f"{part} accuracy at every exit", title_justify="left")
        exits.add_column("exit")
        exits.add_column("accuracy", justify="right")
        exits.add_column("cost", justify="right")
        costs = [f"{row['cost']:.1%}" for row in summary["exits"] or ()] or [""] * len(found)
        for number, (accuracy, cost) in enumerate(zip(found, costs, strict=True), start=1):
            exits.add_row(str(number), f"{accuracy:.4f}", cost)
        self.console.print(stages, exits)
        if summary["early_exit"]:
            early = Table(title="test samples that leave at the first confident exit", title_justify="left")
            for column in ("confidence", "accuracy", "cost", "left at each exit"):
                early.add_column(column, justify="right")
            for row in summary["early_exit"]:
                left = "  ".join(f"{share:.1%}" for share in row["left"])
                early.add_row(f"{row['confidence']:g}", f"{row['accuracy']:.4f}", f"{row['cost']:.1%}", left)
            self.console.print(early)
        self.console.print(
            f"{summary['seconds']:.1f} s in all, {summary['training_seconds']:.1f} s of training, "
            f"{summary['samples_per_second']:,.0f} samples/s, seed {summary['seed']}\n"
            f"files in {folder}\n{part} accuracy {f'{found[-1]:.4f}' if found else 'not known'}",
            highlight=False,
            soft_wrap=True,
        )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
