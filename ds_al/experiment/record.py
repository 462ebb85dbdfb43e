"""What a run leaves behind: a folder with config, metrics, summary and curves, and a W&B run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from ds_al.experiment.exits import draw_exits
from ds_al.experiment.facts import facts
from ds_al.experiment.wandb_run import WandbRun, named_losses
from ds_al.figures import palette
from ds_al.figures.timeline import draw
from ds_al.trace import Event
from ds_al.trace.analysis import computing

if TYPE_CHECKING:
    from ds_al.experiment.job import Job


class Record:
    """Writes ``<output>/<name>/<time>/`` from the rank that makes it.

    Files: ``config.json`` (resolved), ``metrics.jsonl`` (a line per batch and per epoch), ``summary.json``,
    ``curves.png``, ``early_exit.png``, ``checkpoints/``, ``wandb/`` and ``wandb_id``; where it was traced, ``trace/``
    and ``timeline.png``. A resumed run counts its batches on.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = _new_folder(Path(job.experiment.output) / job.experiment.name)
        self.facts = facts(job)
        (self.folder / "config.json").write_text(json.dumps({**job.config, "resolved": self.facts}, indent=2) + "\n")
        self._metrics = (self.folder / "metrics.jsonl").open("w")
        self._wandb = WandbRun(
            job.experiment.wandb,
            folder=self.folder,
            name=job.experiment.name,
            facts=self.facts,
            resume=None if job.resume is None else Path(job.resume),
        )
        self._batches = job.first_epoch * job.batches_per_epoch

    def batches(self, epoch: int, losses: Tensor) -> None:
        """Local losses ``(batches, N, 2)`` of an epoch, batch by batch."""
        for row in losses.tolist():
            self._batches += 1
            self._write({"kind": "batch", "epoch": epoch + 1, "batch": self._batches, "losses": row})
            named = named_losses(row, bounds=self.job.engine.module.parts)
            self._wandb.log({"batch": self._batches, **named}, step=self._batches)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Metrics of an epoch."""
        self._write({"kind": "epoch", **row})
        self._wandb.epoch(row, step=row["epoch"] * self.job.batches_per_epoch)

    def timeline(self, events: Sequence[Event]) -> None:
        """Draws what was traced, as ``timeline.png``."""
        if computing(events):
            draw({self.job.al.method: events}, self.folder / "timeline.png", micro_batches=self.job.micro_batches)

    def finish(self, summary: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
        """Writes summary and curves, and closes all."""
        (self.folder / "summary.json").write_text(json.dumps({**summary, **self.facts}, indent=2) + "\n")
        self._metrics.close()
        if history:
            draw_curves(history, self.folder / "curves.png", bounds=list(self.job.engine.module.parts))
        if summary["early_exit"]:
            draw_exits(summary["exits"], summary["early_exit"], self.folder / "early_exit.png")
        self._wandb.finish(summary)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()


def _new_folder(parent: Path) -> Path:
    stamp, count = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        folder = parent / (stamp if not count else f"{stamp}-{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1


def draw_curves(history: list[dict[str, Any]], path: Path, *, bounds: list[int]) -> None:
    """Draws the local losses of each stage, and the validation accuracy of each exit, over the epochs."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), facecolor="white")
    if "loss" in history[0]:
        left.plot(epochs, [row["loss"] for row in history], color=palette.BLUE, label="loss")
    else:
        for stage, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            colour = palette.STAGES[stage % len(palette.STAGES)]
            for key, style in (("associated_loss", "-"), ("autoencoder_loss", "--")):
                values = [sum(row[key][start:stop]) / (stop - start) for row in history]
                left.plot(epochs, values, style, color=colour, label=f"stage {stage} {key.replace('_', ' ')}")
    left.set(xlabel="epoch", ylabel="mean local loss", yscale="log", title="loss of each stage")
    left.legend(fontsize=8)
    looked = [row for row in history if "validation_accuracy" in row]
    for number in range(len(looked[0]["validation_accuracy"]) if looked else 0):
        right.plot(
            [row["epoch"] for row in looked],
            [row["validation_accuracy"][number] for row in looked],
            color=palette.STAGES[number % len(palette.STAGES)],
            label=f"exit {number + 1}",
        )
    right.set(xlabel="epoch", ylabel="validation accuracy", title="accuracy at each exit")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
