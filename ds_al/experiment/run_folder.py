"""The folder of a run: config, metrics, summary and figures."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ds_al.errors import ALConfigError
from ds_al.experiment.config import ExperimentConfig
from ds_al.experiment.description import RESOLVED
from ds_al.experiment.exits import draw_exits
from ds_al.experiment.observer import Observer, RunInfo, stage_means
from ds_al.figures import palette
from ds_al.figures.timeline import draw
from ds_al.parallel import meetings
from ds_al.system.secrets import without_secrets
from ds_al.trace import Event
from ds_al.trace.analysis import computing
from ds_al.trace.timelines import timeline

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
_PROBE = ".probe"  # removed when the run starts


class RunFolder(Observer):
    """Writes the files of a run into its folder.

    Files: ``config.json`` (resolved, without secrets), ``metrics.jsonl``, ``summary.json``, ``curves.png``,
    ``early_exit.png``; for a traced run ``timeline.png``. The engine adds ``checkpoints/`` and ``trace/``, W&B
    ``wandb/`` and ``wandb_id``. A resumed run continues the count of batches; one that goes on in its folder keeps the
    rows up to its checkpoint.

    Lines of ``metrics.jsonl``, by ``kind``: ``log``, as they happen (``experiment.log_every``); at the end of an epoch
    ``batch``, one per batch with its losses, means over the replicas, and ``epoch``.

    Args:
        config: the whole config.
        facts: facts of the run (:func:`~ds_al.experiment.summary.run_facts`).
    """

    def __init__(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self._config, self._facts = config, facts

    def started(self, info: RunInfo) -> None:
        """Writes ``config.json``, and opens ``metrics.jsonl``, whose lines a process that has died left there."""
        self._info = info
        (info.folder / _PROBE).unlink(missing_ok=True)
        self._there = _keep_rows(info)
        write_json(info.folder / CONFIG_FILE, {**without_secrets(self._config), RESOLVED: self._facts})
        self._metrics: TextIO = (info.folder / METRICS_FILE).open("a")

    def logged(self, row: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._write({"kind": "log", **row})

    def losses(self, epoch: int, losses: Tensor) -> None:
        """Writes one line per batch."""
        for batch, row in enumerate(losses.tolist(), start=self._info.batches_until(epoch) + 1 - len(losses)):
            self._write({"kind": "batch", "epoch": epoch + 1, "batch": batch, "losses": row})

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._write({"kind": "epoch", **row})

    def trained(self, events: Sequence[Event]) -> None:
        """Draws ``timeline.png`` of a traced run."""
        if computing(events):
            drawn = timeline(events, name=self._info.method, micro_batches=self._info.micro_batches)
            draw([drawn], self._info.folder / "timeline.png", suffixes=(".png", ".svg"))

    def finished(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Writes ``summary.json`` and the figures."""
        folder = self._info.folder
        write_json(folder / "summary.json", {**summary, **self._facts})
        self._metrics.close()
        if history:
            draw_curves(history, folder / "curves.png", bounds=self._info.partition)
        if summary["early_exit"]:
            draw_exits(summary["exits"], summary["early_exit"], folder / "early_exit.png")

    def failed(self) -> None:
        """Closes ``metrics.jsonl``."""
        self._metrics.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._there:
            self._there -= 1
            return
        self._metrics.write(json.dumps(_known(row)) + "\n")
        self._metrics.flush()


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of ``metrics.jsonl``; the last one may be cut where the process was killed."""
    try:
        lines = (folder / METRICS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _keep_rows(info: RunInfo) -> int:
    """Leaves the rows in ``metrics.jsonl`` that are not written again, of a run that goes on in its folder.

    Returns:
        The number of rows that this run has written already, by a process whose place this one takes.
    """
    trained = info.batches_until(info.first_epoch - 1)
    limits = {"log": ("batch", info.first_batch), "batch": ("batch", trained), "epoch": ("epoch", info.first_epoch)}
    rows = list(_rows(info.folder))
    kept = [row for row in rows if row[limits[row["kind"]][0]] <= limits[row["kind"]][1]]
    there = len(rows) - len(kept) if meetings.repeat() else 0
    part = info.folder / f".{METRICS_FILE}.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in (rows if there else kept)))
    part.replace(info.folder / METRICS_FILE)
    return there


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of the epochs that are in ``metrics.jsonl``."""
    rows = [row for row in _rows(folder) if row["kind"] == "epoch"]
    return [{name: value for name, value in row.items() if name != "kind"} for row in rows]


def _known(value: Any) -> Any:
    """Replaces NaN, which stands for what is not known yet, by ``None``: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON for programs, and makes the folder of the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def make_folder(experiment: ExperimentConfig) -> Path:
    """Makes the folder ``<output>/<name>`` of an experiment, unless it exists.

    Raises:
        ALConfigError: it cannot be made, or cannot be written to.
    """
    folder = Path(experiment.output).expanduser() / experiment.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ALConfigError(
            f"got experiment.output={experiment.output!r}: {str(folder)!r} cannot be written to ({error.strerror}): "
            "expected a folder for all runs, see --output"
        ) from error
    return folder


def checkpoints_of(folder: str | Path) -> Path:
    """Returns the folder of checkpoints of a run, of which ``folder`` is either this one or the run's.

    Raises:
        ALConfigError: there is no such folder.
    """
    given, folder = str(folder), Path(folder).expanduser()
    inside = folder / "checkpoints"
    if not given or not folder.is_dir():
        raise ALConfigError(
            f"got --resume {given!r}, which is no folder: give runs/<name>/<time> of a run, or auto for the latest one"
        )
    return inside if inside.is_dir() and not (folder / "latest").exists() else folder


def new_folder(parent: Path) -> Path:
    """Makes a folder named by the time, with a number added where that name is taken."""
    stamp, count = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        folder = parent / (stamp if not count else f"{stamp}-{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1


def probed_folder(parent: Path, *, run: str | None = None) -> tuple[Path, str]:
    """Makes a folder with a file by which other ranks recognize it; returns its absolute path, and the file's text.

    Args:
        run: folder of a run that goes on in it, instead of a new one.

    Raises:
        ALConfigError: the folder cannot be made, or nothing can be written to it.
    """
    text = uuid.uuid4().hex
    try:
        folder = new_folder(parent.resolve()) if run is None else Path(run)
        (folder / _PROBE).write_text(text)
    except (OSError, ValueError) as error:
        raise ALConfigError(
            f"cannot write to {str(parent)!r} (experiment.output and experiment.name): {error}: choose another --output"
        ) from None
    return folder, text


def check_probe(folder: Path, text: str, *, seconds: float = 10.0) -> None:
    """Checks that this rank sees a folder that another one has made; waits a little for a network's file system.

    Raises:
        ALConfigError: it does not.
    """
    limit = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if (folder / _PROBE).read_text() == text:
                return
        if time.monotonic() > limit:
            raise ALConfigError(
                f"this host does not see {str(folder)!r}, which the rank that writes has just made: --output has to be "
                "a folder that all hosts share, since every stage writes its part of a checkpoint there"
            )
        time.sleep(0.1)


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, *, bounds: Sequence[int]) -> None:
    """Draws the local losses of each stage, and the validation accuracy of each exit, over the epochs."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4.6), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    if "loss" in history[0]:
        left.plot(epochs, [row["loss"] for row in history], color=palette.BLUE, label="loss")
    else:
        for stage in range(len(bounds) - 1):
            colour = palette.STAGES[stage % len(palette.STAGES)]
            for key, style in (("associated_loss", "-"), ("autoencoder_loss", "--")):
                values = [stage_means(row[key], bounds)[stage] for row in history]
                left.plot(epochs, values, style, color=colour, label=f"stage {stage} {key.replace('_', ' ')}")
    backprop = "loss" in history[0]
    left.set(xlabel="epoch", ylabel="loss" if backprop else "mean local loss", yscale="log")
    left.set_title("loss" if backprop else "loss of each stage")
    evaluated = {row["epoch"]: row["validation_accuracy"] for row in history if "validation_accuracy" in row}
    for number, accuracies in enumerate(zip(*evaluated.values(), strict=True)):
        colour = palette.STAGES[number % len(palette.STAGES)]
        right.plot(list(evaluated), accuracies, color=colour, label="" if backprop else f"exit {number + 1}")
    right.set(xlabel="epoch", ylabel="validation accuracy", title="accuracy" if backprop else "accuracy at each exit")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
