"""Logs a run to Weights & Biases: metrics by name, summary, media, artifacts. Its failures never end training."""

from __future__ import annotations

import configparser
import math
import netrc
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_al.experiment.config import WandbConfig
from ds_al.experiment.observer import Observer, RunInfo, stage_means
from ds_al.system import provenance
from ds_al.system.secrets import HIDDEN, hide

ID_FILE = "wandb_id"
"""File in the folder of a run with the id of its W&B run, which a resumed run continues."""
MEDIA = ("curves", "timeline")
"""Names of the figures ``<name>.png`` in the folder of a run that are logged, where they exist."""


class WandbRun(Observer):
    """Logs one W&B run; nothing where the config, ``WANDB_MODE=disabled`` or ``wandb disabled`` turns it off.

    A key of the config wins over W&B's variables and settings files, and these win over the defaults. A run that cannot
    log online is kept in ``<folder>/wandb``, and ``wandb sync`` uploads it later. It never asks for a log-in. After any
    later failure it warns once and stops logging.

    Args:
        config: the ``"experiment.wandb"`` block.
        facts: the W&B config.
        resumed_from: folder of checkpoints that the run resumes from; the W&B run next to it is continued.
    """

    def __init__(self, config: WandbConfig, facts: Mapping[str, Any], *, resumed_from: str | None = None) -> None:
        self._config, self._facts, self._resumed_from = config, facts, resumed_from
        self._run: Any = None

    def started(self, info: RunInfo) -> None:
        """Starts the W&B run, and writes its id into the folder."""
        self._info = info
        mode = wandb_mode() if self._config.enabled else "disabled"
        if mode != "disabled":
            with self._guarded():
                same = info.folder / "checkpoints" if (info.folder / ID_FILE).exists() else self._resumed_from
                earlier = _earlier_id(same)
                own = earlier or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
                (info.folder / ID_FILE).write_text(own + "\n")  # before W&B has it: a process may be killed meanwhile
                self._run = self._start(mode, own, resumes=earlier is not None)
                (info.folder / ID_FILE).write_text(self._run.id + "\n")

    def _start(self, mode: str, own: str, *, resumes: bool) -> Any:
        import wandb

        info = self._info
        # Older releases of wandb lack some of these settings.
        known = {"init_timeout": 30, "finish_timeout": 300}
        limits: dict[str, Any] = {key: value for key, value in known.items() if key in wandb.Settings.model_fields}
        if not self._config.console:
            limits["console"] = "off"
        if "WANDB_SILENT" not in os.environ:
            limits["silent"] = True
        if HIDDEN in provenance.command():  # the metadata of W&B hold the arguments as they are
            limits["x_disable_meta"] = True

        def start(mode: Any) -> Any:
            return wandb.init(
                project=self._chosen("project", "WANDB_PROJECT", self._config.project),
                entity=self._chosen("entity", "WANDB_ENTITY", None),
                group=self._chosen("group", "WANDB_RUN_GROUP", info.name),
                job_type=None if "WANDB_JOB_TYPE" in os.environ else info.method,
                tags=self._chosen("tags", "WANDB_TAGS", None),
                name=self._chosen("name", "WANDB_NAME", f"{info.name}-{info.method}-{info.folder.name}"),
                notes=self._chosen("notes", "WANDB_NOTES", None),
                dir=None if "WANDB_DIR" in os.environ else str(info.folder),
                config=dict(self._facts),
                mode=mode,
                id=own,
                resume="allow" if resumes else None,
                settings=wandb.Settings(x_disable_stats=not self._config.system_metrics, **limits),
            )

        try:
            return start(mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            warnings.warn(
                f"W&B is out of reach, so this run stays offline in {info.folder / 'wandb'} and `wandb sync` can "
                f"send it later: {_line(error)}",
                stacklevel=2,
            )
            return start("offline")

    def _chosen(self, key: str, variable: str, default: Any) -> Any:
        """Returns the config's value where it is set, ``None`` where W&B finds one itself, else the default."""
        if (value := getattr(self._config, key)) is not None and key in self._config.model_fields_set:
            return hide(value) if isinstance(value, str) else value
        return None if os.environ.get(variable) or key in settings_files() else default

    def logged(self, row: Mapping[str, Any]) -> None:
        """Logs the losses of a batch, by layer under ``layer_<number>/`` and by stage under ``stage_<number>/``."""
        values = {key: row[key] for key in ("epoch", "batch", "learning_rate", "samples_per_second")}
        if "loss" in row:
            values |= self._twin(row["loss"])
        else:
            named = named_losses(row["losses"], bounds=self._info.partition)
            values |= {name: value for name, value in named.items() if not math.isnan(value)}
        self.log(values, step=row["batch"])

    def _twin(self, loss: float) -> dict[str, float]:
        return {"loss": loss, f"stage_{self._info.stages - 1}/loss": loss}

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Logs the metrics of an epoch, those of a stage under ``stage_<number>/``."""
        named = {**{key: row[key] for key in ("epoch", "samples_per_second", "learning_rate")}, **_idle(row)}
        if "loss" in row:
            named |= self._twin(row["loss"])
        for layer, skipped in enumerate(row.get("skipped_steps", ())):
            named[f"layer_{layer}/skipped_steps"] = skipped
        for number, accuracy in enumerate(row.get("validation_accuracy", []), start=1):
            named[f"validation_accuracy/exit_{number}"] = accuracy
        self.log(named, step=min(row["epoch"] * self._info.batches_per_epoch, self._info.total_batches))

    def finished(self, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Logs summary, media and, by option, the last checkpoint, and closes the W&B run."""
        if not self._run:
            return
        import wandb

        with self._guarded():
            media = {name: self._info.folder / f"{name}.png" for name in MEDIA}
            if found := {name: wandb.Image(str(path)) for name, path in media.items() if path.exists()}:
                self._run.log(found)
            keys = ("best_validation_accuracy", "best_epoch", "training_seconds", "samples_per_second")
            self._run.summary.update({
                "test_accuracy": (summary["test_accuracy"] or [None])[-1],
                **{key: summary[key] for key in keys},
                **_idle(summary),
            })  # fmt: skip
            if self._config.checkpoints:
                self._log_checkpoint()
            self._run.finish()

    def failed(self) -> None:
        """Closes the W&B run as one that failed."""
        if self._run:
            with self._guarded():
                self._run.finish(exit_code=1)

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Logs values by name. Steps count batches."""
        if self._run:
            with self._guarded():
                self._run.log(dict(values), step=step)

    def _log_checkpoint(self) -> None:
        """Logs the latest checkpoint in the layout that ``--resume`` needs of the folder that W&B downloads."""
        import wandb

        latest = self._info.folder / "checkpoints" / "latest"
        if not latest.exists():  # a resumed run that had no epoch left
            return
        tag = latest.read_text().strip()
        name = re.sub(r"[^\w.-]", "_", f"{self._info.name}-{self._run.id}")
        artifact = wandb.Artifact(name, type="model", metadata={"tag": tag})
        # Immutable: uploaded from its place, not copied beforehand.
        artifact.add_dir(str(latest.parent / tag), name=tag, policy="immutable", skip_cache=True)
        artifact.add_file(str(latest), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", tag])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any error of wandb or of the network: training matters more
            self._run = None
            warnings.warn(
                f"logging to W&B stops, training goes on; {self._info.folder} has all the metrics: "
                f"{type(error).__name__}: {_line(error)}",
                stacklevel=4,
            )


def named_losses(row: Sequence[Sequence[float]], *, bounds: Sequence[int]) -> dict[str, float]:
    """Names the local losses ``(N, 2)`` of each layer, and the means of each stage and their sum."""
    named: dict[str, float] = {}
    for layer, (associated, autoencoder) in enumerate(row):
        named |= {f"layer_{layer}/associated_loss": associated, f"layer_{layer}/autoencoder_loss": autoencoder}
    local = (stage_means(values, bounds) for values in zip(*row, strict=True))
    for stage, (associated, autoencoder) in enumerate(zip(*local, strict=True)):
        losses = {"associated_loss": associated, "autoencoder_loss": autoencoder, "loss": associated + autoencoder}
        if not math.isnan(associated):  # a stage that computes no loss
            named |= {f"stage_{stage}/{name}": value for name, value in losses.items()}
    return named


def _idle(row: Mapping[str, Any]) -> dict[str, float]:
    return {f"stage_{stage}/idle": idle for stage, idle in enumerate(row["idle"])}


def wandb_mode() -> str:
    """Returns ``WANDB_MODE``, else the mode of W&B's settings files (``wandb offline``, ``wandb disabled`` write it),
    else ``online`` with an account and ``offline`` without one.

    ``online`` without an account, where W&B would ask for a log-in, becomes ``offline`` with a warning.
    """
    mode = os.environ.get("WANDB_MODE") or settings_files().get("mode")
    if not mode:
        return "online" if has_account() else "offline"
    if mode == "online" and not has_account():
        warnings.warn(
            "W&B is set to online, but this machine has no W&B account: the run stays offline. "
            "Run `wandb login` or set WANDB_API_KEY to log online",
            stacklevel=4,
        )
        return "offline"
    return mode


def settings_files() -> dict[str, str]:
    """Reads W&B's settings files: the one of the user, and over it that of the working folder."""
    root = Path(os.environ.get("WANDB_DIR") or ".")
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    found: dict[str, str] = {}
    for path in (user / "settings", root / ("wandb" if not (root / ".wandb").exists() else ".wandb") / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
            found |= dict(parser["default"]) if "default" in parser else {}
        except (OSError, UnicodeDecodeError, configparser.Error):  # W&B itself says so
            continue
    return found


def _earlier_id(checkpoints: str | Path | None) -> str | None:
    """Reads the id of the W&B run that belongs to a folder of checkpoints; ``None`` where there was none."""
    if checkpoints is None:
        return None
    try:
        return (Path(checkpoints).resolve().parent / ID_FILE).read_text().strip() or None
    except OSError:
        return None


def has_account() -> bool:
    """Whether this machine has credentials for W&B; they are not tested."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    address = os.environ.get("WANDB_BASE_URL") or settings_files().get("base_url") or "https://api.wandb.ai"
    host = address.split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
