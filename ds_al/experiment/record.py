"""What a run leaves behind: a folder with config, metrics, summary and curves, and a W&B run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from ds_al.experiment.config import WandbConfig
from ds_al.trace import Event
from ds_al.trace.analysis import computing
from ds_al.trace.timeline import draw

if TYPE_CHECKING:
    from ds_al.experiment.job import Job

PACKAGES = ("ds_al", "torch", "deepspeed", "transformers", "datasets", "wandb", "numpy")


class Record:
    """Writes ``<output>/<name>/<time>/`` from the rank that makes it.

    Files: ``config.json`` (resolved), ``metrics.jsonl`` (a line per batch and per epoch), ``summary.json``,
    ``curves.png``, ``checkpoints/``, ``wandb/``; where it was traced, ``trace/`` and ``timeline.png``.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = _new_folder(Path(job.experiment.output) / job.experiment.name)
        self.facts = _facts(job)
        (self.folder / "config.json").write_text(json.dumps({**job.config, "resolved": self.facts}, indent=2) + "\n")
        self._metrics = (self.folder / "metrics.jsonl").open("w")
        self._wandb = start_wandb(
            job.experiment.wandb, folder=self.folder, name=f"{job.experiment.name}-{self.folder.name}", facts=self.facts
        )
        self._batches = 0

    def batches(self, epoch: int, losses: Tensor) -> None:
        """Local losses ``(batches, N, 2)`` of an epoch, batch by batch."""
        for row in losses.tolist():
            self._batches += 1
            self._write({"kind": "batch", "epoch": epoch + 1, "batch": self._batches, "losses": row})
            if self._wandb:
                self._wandb.log({"batch": self._batches, **self._per_stage(row)}, step=self._batches)

    def _per_stage(self, row: list[list[float]]) -> dict[str, float]:
        bounds, named = self.job.engine.module.parts, {}
        for stage in range(self.job.world):
            own = row[bounds[stage] : bounds[stage + 1]]
            for column, name in enumerate(("associated_loss", "autoencoder_loss")):
                named[f"stage_{stage}/{name}"] = sum(layer[column] for layer in own) / len(own)
        return named

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Metrics of an epoch."""
        self._write({"kind": "epoch", **row})
        if not self._wandb:
            return
        named = {
            "epoch": row["epoch"],
            "images_per_second": row["images_per_second"],
            "learning_rate": row["learning_rate"],
        }
        named |= {f"stage_{stage}/idle": idle for stage, idle in enumerate(row["idle"])}
        if "loss" in row:
            named["loss"] = row["loss"]
        for number, accuracy in enumerate(row.get("validation_accuracy", []), start=1):
            named[f"validation_accuracy/exit_{number}"] = accuracy
        self._wandb.log(named, step=self._batches or None)

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
        if self._wandb:
            import wandb

            self._wandb.summary.update(
                {
                    "test_accuracy": summary["test_accuracy"][-1],
                    "training_seconds": summary["training_seconds"],
                    "images_per_second": summary["images_per_second"],
                    **{f"stage_{s}/idle": idle for s, idle in enumerate(summary["idle"])},
                }
            )
            if history:
                self._wandb.log({"curves": wandb.Image(str(self.folder / "curves.png"))})
            self._wandb.finish()

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


def _facts(job: Job) -> dict[str, Any]:
    experiment = job.experiment
    return {
        "method": job.al.method,
        "stages": job.world,
        "micro_batches": job.micro_batches,
        "micro_batch_size": job.micro_batch,
        "partition": list(job.engine.module.parts),
        "model": experiment.model.model_dump(),
        "data": experiment.data.model_dump(),
        "seed": experiment.seed,
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cores": os.cpu_count(),
        "device": str(job.engine.device),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def start_wandb(config: WandbConfig, *, folder: Path, name: str, facts: Mapping[str, Any]) -> Any:
    """Starts a W&B run, or returns ``None`` where the config turns it off.

    ``WANDB_MODE`` decides the mode where it is set. Else a machine with an account logs online, and one
    without keeps the run offline in ``folder/wandb`` (``wandb sync`` sends it later). Never asks for a log-in.
    """
    if not config.enabled:
        return None
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if _has_account() else "offline")
    return wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        tags=config.tags,
        name=name,
        dir=str(folder),
        config=dict(facts),
        mode=mode,  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def draw_curves(history: list[dict[str, Any]], path: Path, *, bounds: list[int]) -> None:
    """Draws the local losses of each stage, and the validation accuracy of each exit, over the epochs."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), facecolor="white")
    if "loss" in history[0]:
        left.plot(epochs, [row["loss"] for row in history], label="loss")
    else:
        for stage, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            for key, style in (("associated_loss", "-"), ("autoencoder_loss", "--")):
                values = [sum(row[key][start:stop]) / (stop - start) for row in history]
                left.plot(epochs, values, style, color=f"C{stage}", label=f"stage {stage} {key.replace('_', ' ')}")
    left.set(xlabel="epoch", ylabel="mean local loss", yscale="log", title="loss of each stage")
    left.legend(fontsize=8)
    looked = [row for row in history if "validation_accuracy" in row]
    for number in range(len(looked[0]["validation_accuracy"]) if looked else 0):
        right.plot(
            [row["epoch"] for row in looked],
            [row["validation_accuracy"][number] for row in looked],
            color=f"C{number}",
            label=f"exit {number + 1}",
        )
    right.set(xlabel="epoch", ylabel="validation accuracy", title="accuracy at each exit")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
