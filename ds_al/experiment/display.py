"""Progress of a run on the console: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from ds_al.config.methods import BACKPROP_METHODS, EMULATED
from ds_al.experiment.live import Averages, advice, slowest, stage_table
from ds_al.experiment.observer import Observer, RunInfo, Snapshot, stage_means
from ds_al.figures.terminal import Console
from ds_al.trace import Event


class Display(Observer):
    """Shows the progress of a run, and its result.

    Args:
        console: where to print; by default this process's standard output.
    """

    _SECONDS = 0.5  # between two snapshots, which wait for the device

    def __init__(self, *, console: Console | None = None) -> None:
        self.console = console or Console()
        speed, left = TextColumn("{task.fields[speed]}"), TextColumn("left")
        columns = (TextColumn("{task.description}"), BarColumn(), speed, left, TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console)
        self._live = Live(self._progress, console=self.console, refresh_per_second=4, transient=True)
        self._batches = 0
        self._averages = Averages()

    def started(self, info: RunInfo) -> None:
        """Prints what the run is, and starts the live display."""
        self._info = info
        total = info.total_batches - info.first_batch
        self._task = self._progress.add_task("epoch", total=total, speed="")
        replicas = f", {info.replicas} replicas" if info.replicas > 1 else ""
        steps = f"{info.optimizer_steps} optimizer step{'s' * (info.optimizer_steps > 1)}"
        spanned = ""
        if info.groups:
            layers, sizes = len(info.groups), ", ".join(map(str, info.groups))
            spanned = f" in groups of {sizes} for {layers} AL layer{'s' * (layers > 1)} ({info.group_schedule})"
        self.console.print(
            f"{info.name}: {info.method}, {info.stages} stage{'s' * (info.stages > 1)}{spanned}{replicas}, "
            f"{info.training_samples} training samples, micro-batches of {info.micro_batch_size}, "
            f"{info.micro_batches_per_batch} a batch, {info.batches_per_epoch} batches an epoch, "
            f"seed {info.seed}\n"
            f"rank {info.writer} prints, and writes to {info.folder}; {steps} a batch; {info.loss}",
            highlight=False,
            soft_wrap=True,
        )
        if info.partition_table:
            self.console.print(info.partition_table, highlight=False, soft_wrap=True)
        self._drawn = self._started = time.perf_counter()
        if self.console.is_terminal:
            self._live.start()

    def batch(self, epoch: int, snapshot: Callable[[], Snapshot]) -> None:
        """Counts the batch; takes a snapshot and redraws the live display only now and then."""
        self._batches += 1
        now = time.perf_counter()
        if not self.console.is_terminal or now - self._drawn < self._SECONDS:
            return
        self._drawn = now
        speed = self._batches * self._info.batch_samples / (now - self._started)
        self._progress.update(
            self._task,
            completed=self._batches,
            description=f"epoch {epoch + 1}/{self._info.epochs}",
            speed=f"{speed:,.0f} samples/s",
        )
        self._live.update(Group(self._progress, self._stages(snapshot())))

    def _stages(self, snapshot: Snapshot) -> Group:
        """The table of stages, and under it a sentence about the slowest one, if there is one."""
        bounds, stage_metrics = self._info.partition, snapshot.stage_metrics
        busy = self._averages.busy(stage_metrics)
        marked = slowest(busy)
        table = stage_table(stage_metrics, busy, snapshot.losses, marked)
        lines: list[Any] = [table, Text(f"lr {snapshot.learning_rate:.2e}", "dim")]
        if marked is not None:
            data = stage_metrics[marked.stage].data
            layers = 0 if self._info.groups else bounds[marked.stage + 1] - bounds[marked.stage]
            sentence = advice(marked, data=data, layers=layers, partition_method=self._info.partition_method)
            lines.append(Text(sentence, "yellow"))
        return Group(*lines)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Prints one line."""
        info = self._info
        parts = [f"epoch {row['epoch']:>3}/{info.epochs}", f"{row['samples_per_second']:>7,.0f} samples/s"]
        if "associated_loss" in row:
            local = (stage_means(row[key], info.partition) for key in ("associated_loss", "autoencoder_loss"))
            for stage, (associated, autoencoder) in enumerate(zip(*local, strict=True)):
                if not math.isnan(associated):  # a stage that computes no loss
                    # An objective without a target side has no autoencoder loss: a constant 0.
                    own = f" E {autoencoder:.4f}" if autoencoder else ""
                    parts.append(f"stage {stage} A {associated:.4f}{own}")
        else:
            parts.append(f"loss {row['loss']:.4f}")
        parts.append(f"lr {row['learning_rate']:.1e}")
        if skipped := sum(row.get("skipped_steps", ())):
            parts.append(f"skipped {skipped:,} steps")
        if "validation_accuracy" in row:
            parts.append(f"validation {row['validation_accuracy'][-1]:.4f}")
        done = row["epoch"] - info.first_epoch
        left = (time.perf_counter() - self._started) / done * (info.epochs - row["epoch"])
        self.console.print("  ".join([*parts, f"left {left:,.0f} s"]), highlight=False, soft_wrap=True)

    def trained(self, events: Sequence[Event]) -> None:
        """Ends the live display."""
        self._live.stop()

    def failed(self) -> None:
        """Ends the live display, so that the error is printed below it."""
        self._live.stop()

    def finished(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Prints the final tables, and at last the line with the test accuracy."""
        title, bounds = f"{summary['name']}: {summary['method']}", summary["partition"]
        backprop = summary["method"] in BACKPROP_METHODS
        layers = "layers" if backprop else "AL layers"
        stages = _table(title, "stage", layers, "parameters", "idle", "peak activations", "sent")
        for stage, sent in enumerate(summary["bytes_sent"]):
            stages.add_row(
                str(stage), _layers_on(bounds, stage, len(summary["bytes_sent"]), spanned="groups" in summary),
                f"{summary['parameters'][stage]:,}",
                f"{summary['idle'][stage]:.1%}", _bytes(summary["peak_activation_bytes"][stage]),
                "-" if sent is None else _bytes(sent),
            )  # fmt: skip
        emulated = ", emulated in one process: not the times of a pipeline" if summary["method"] in EMULATED else ""
        part = "validation" if summary["test_accuracy"] is None else "test"
        found = summary[f"{part}_accuracy"] or []
        exits = _table(f"{part} accuracy at every exit", "exit", "accuracy", "cost")
        exits.columns[0].justify = "left"
        costs = [f"{row['cost']:.1%}" for row in summary["exits"] or ()] or [""] * len(found)
        for number, (accuracy, cost) in enumerate(zip(found, costs, strict=True), start=1):
            exits.add_row(str(number), f"{accuracy:.4f}", cost)
        self.console.print(stages, *([] if backprop else [exits]))
        if summary["early_exit"]:
            title = "test samples that leave at the first confident exit"
            early = _table(title, "confidence", "accuracy", "cost", "left at each exit")
            for row in summary["early_exit"]:
                left = "  ".join(f"{share:.1%}" for share in row["left"])
                early.add_row(f"{row['confidence']:g}", f"{row['accuracy']:.4f}", f"{row['cost']:.1%}", left)
            self.console.print(early)
        self.console.print(
            f"{summary['seconds']:.1f} s in all, {summary['training_seconds']:.1f} s of training, "
            f"{summary['samples_per_second']:,.0f} samples/s, seed {summary['seed']}{emulated}\n"
            f"files in {self._info.folder}\n{part} accuracy {f'{found[-1]:.4f}' if found else 'not known'}",
            highlight=False,
            soft_wrap=True,
        )


def _layers_of(start: int, stop: int, *, spanned: bool) -> str:
    """Names the layers of a stage, or the one of which it holds a part without an exit."""
    if stop > start:
        return f"{start + 1}..{stop}"
    return f"a part of {start + 1}" if spanned else "none"


def _layers_on(bounds: Sequence[int], stage: int, stages: int, *, spanned: bool) -> str:
    """Names the layers of a stage, which with ``bp_dualpipev`` holds two parts of the network."""
    parts = [stage] if len(bounds) == stages + 1 else [stage, 2 * stages - 1 - stage]
    return ", ".join(_layers_of(bounds[part], bounds[part + 1], spanned=spanned) for part in parts)


def _table(title: str, *columns: str) -> Table:
    return Table(*(Column(name, justify="right") for name in columns), title=title, title_justify="left")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
