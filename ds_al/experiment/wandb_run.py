"""A run on Weights & Biases: names of metrics, summary, media, artifacts. Training never ends because of it."""

from __future__ import annotations

import netrc
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_al.experiment.config import WandbConfig

ID_FILE = "wandb_id"
"""File of a run's folder that holds the id of its W&B run, for a resumed run to continue it."""
MEDIA = ("curves", "timeline")
"""Pictures ``<name>.png`` of a run's folder that are logged, where they are there."""
_INIT_SECONDS, _UPLOAD_SECONDS = 30, 300
_LOSSES = ("associated_loss", "autoencoder_loss")


class WandbRun:
    """One W&B run, or nothing, where the config or ``WANDB_MODE=disabled`` turns it off.

    ``WANDB_MODE`` decides the mode where it is set. Else a machine with an account logs online, and one
    without keeps the run offline in ``folder/wandb`` (``wandb sync`` sends it later). Never asks for a log-in.
    Without a network, a run that should log online is kept offline. Whatever fails later is
    warned of once, and then logging stops.

    Args:
        config: the config's block.
        folder: of the run's files.
        name: of the experiment: the W&B group unless the config has one.
        facts: the W&B config; ``facts["method"]`` is the job type.
        resume: folder of checkpoints the run goes on from; the W&B run beside it is continued.
    """

    def __init__(
        self, config: WandbConfig, *, folder: Path, name: str, facts: Mapping[str, Any], resume: Path | None = None
    ) -> None:
        self.config, self.folder, self.name = config, folder, name
        self.stages = int(facts["stages"])
        self._run: Any = None
        mode = wandb_mode() if config.enabled else "disabled"
        if mode != "disabled":
            with self._guarded():
                self._run = self._start(mode, facts, _earlier_id(resume))
                (folder / ID_FILE).write_text(self._run.id + "\n")

    def _start(self, mode: str, facts: Mapping[str, Any], earlier: str | None) -> Any:
        import wandb

        # Older versions lack some.
        known = {"init_timeout": _INIT_SECONDS, "finish_timeout": _UPLOAD_SECONDS}
        limits: dict[str, Any] = {key: value for key, value in known.items() if key in wandb.Settings.model_fields}

        def start(mode: Any) -> Any:
            return wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                group=self.config.group or self.name,
                job_type=facts["method"],
                tags=self.config.tags,
                name=f"{self.name}-{facts['method']}-{self.folder.name}",
                dir=str(self.folder),
                config=dict(facts),
                mode=mode,
                id=earlier,
                resume="allow" if earlier else None,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,
                    **limits,
                ),
            )

        try:
            return start(mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            warnings.warn(
                f"W&B is out of reach, so this run stays offline in {self.folder / 'wandb'} and `wandb sync` can "
                f"send it later: {_line(error)}",
                stacklevel=2,
            )
            return start("offline")

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Logs values by name. Steps count batches."""
        if self._run:
            with self._guarded():
                self._run.log(dict(values), step=step)

    def epoch(self, row: Mapping[str, Any], *, step: int) -> None:
        """Logs the metrics of an epoch, with those of a stage under ``stage_<number>/``."""
        named = {key: row[key] for key in ("epoch", "samples_per_second", "learning_rate")}
        named |= {f"stage_{stage}/idle": idle for stage, idle in enumerate(row["idle"])}
        if "loss" in row:
            named |= {"loss": row["loss"], f"stage_{self.stages - 1}/loss": row["loss"]}
        for number, accuracy in enumerate(row.get("validation_accuracy", []), start=1):
            named[f"validation_accuracy/exit_{number}"] = accuracy
        self.log(named, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Logs what a run ends with (summary, media, by option the last checkpoint), and closes it."""
        if self._run:
            with self._guarded():
                self._finish(summary)

    def _finish(self, summary: Mapping[str, Any]) -> None:
        import wandb

        media = {name: self.folder / f"{name}.png" for name in MEDIA}
        if found := {name: wandb.Image(str(path)) for name, path in media.items() if path.exists()}:
            self._run.log(found)
        keys = ("best_validation_accuracy", "best_epoch", "training_seconds", "samples_per_second")
        self._run.summary.update(
            {
                "test_accuracy": (summary["test_accuracy"] or [None])[-1],
                **{key: summary[key] for key in keys},
                **{f"stage_{stage}/idle": idle for stage, idle in enumerate(summary["idle"])},
            }
        )
        if self.config.checkpoints:
            self._log_checkpoint()
        self._run.finish()

    def _log_checkpoint(self) -> None:
        """Logs the latest checkpoint, laid out so that ``--resume`` takes the folder that W&B downloads."""
        import wandb

        latest = self.folder / "checkpoints" / "latest"
        if not latest.exists():  # a resumed run that had no epoch left
            return
        tag = latest.read_text().strip()
        name = re.sub(r"[^\w.-]", "_", f"{self.name}-{self._run.id}")
        artifact = wandb.Artifact(name, type="model", metadata={"tag": tag})
        # Immutable: uploaded from where it lies, not copied beforehand.
        artifact.add_dir(str(latest.parent / tag), name=tag, policy="immutable", skip_cache=True)
        artifact.add_file(str(latest), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", tag])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a third party, and of the network: the run matters more
            self._run = None
            warnings.warn(
                f"logging to W&B stops, training goes on; {self.folder} has all the metrics: "
                f"{type(error).__name__}: {_line(error)}",
                stacklevel=4,
            )


def named_losses(row: Sequence[Sequence[float]], *, bounds: Sequence[int]) -> dict[str, float]:
    """Losses of a batch by stage: the mean of its layers' associated and autoencoder losses, and their sum.

    Args:
        row: ``(N, 2)``, the two losses of each AL layer.
        bounds: AL layers ``bounds[i]..bounds[i + 1]`` are those of stage i.
    """
    named: dict[str, float] = {}
    for stage, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        means = [sum(layer[column] for layer in row[start:stop]) / (stop - start) for column in range(2)]
        named |= {f"stage_{stage}/{name}": mean for name, mean in zip(_LOSSES, means, strict=True)}
        named[f"stage_{stage}/loss"] = sum(means)
    return named


def wandb_mode() -> str:
    """``WANDB_MODE`` where it is set, else ``online`` with an account and ``offline`` without one.

    ``online`` without an account, where W&B would ask for a log-in, becomes ``offline`` with a warning.
    """
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        return "online" if has_account() else "offline"
    if mode == "online" and not has_account():
        warnings.warn(
            "WANDB_MODE=online, but this machine has no W&B account: the run stays offline. "
            "Run `wandb login` or set WANDB_API_KEY to log online",
            stacklevel=4,
        )
        return "offline"
    return mode


def _earlier_id(checkpoints: Path | None) -> str | None:
    """Id of the W&B run that wrote a folder of checkpoints; ``None`` where it had none."""
    if checkpoints is None:
        return None
    try:
        return (checkpoints.resolve().parent / ID_FILE).read_text().strip() or None
    except OSError:
        return None


def has_account() -> bool:
    """Whether this machine has credentials for W&B. They are not tried out."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
