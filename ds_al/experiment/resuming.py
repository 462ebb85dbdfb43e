"""Where a run goes on: from a folder that is given, or with ``auto`` in the latest run of its experiment.

::

    --resume runs/name/time     a new run, from the latest checkpoint of that one
    --resume auto               the latest run of runs/name itself, from its last complete checkpoint; or from the start
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_al.checkpoint.folder import newest
from ds_al.checkpoint.own import LATEST
from ds_al.experiment.run_folder import CONFIG_FILE, checkpoints_of

AUTO = "auto"


@dataclass(frozen=True)
class Origin:
    """What a run goes on from.

    Attributes:
        checkpoints: folder of checkpoints; ``None`` for a run that starts anew.
        tag: tag of the checkpoint; ``None`` is the latest.
        run: folder of the run that goes on in it; ``None`` for a run in a new folder.
        trained: whether there is a checkpoint.
    """

    checkpoints: str | None = None
    tag: str | None = None
    run: str | None = None
    trained: bool = False

    @classmethod
    def of(cls, resume: str | None, runs: Path) -> Origin:
        """Finds out where a run goes on.

        Args:
            resume: folder of an earlier run or of its checkpoints, :data:`AUTO`, or ``None``.
            runs: folder of all runs of the experiment.

        Raises:
            ALConfigError: the folder is none.
        """
        if resume is None:
            return cls()
        if resume != AUTO:
            return cls(str(checkpoints_of(resume)), trained=True)
        latest = max(runs.glob(f"*/{CONFIG_FILE}"), key=lambda path: (path.stat().st_mtime_ns, path), default=None)
        if latest is None:
            return cls()
        checkpoints = latest.parent / "checkpoints"
        tag = newest(checkpoints)
        trained = tag is not None or (checkpoints / LATEST).is_file()  # back-propagation saves as DeepSpeed does
        return cls(str(checkpoints), tag, str(latest.parent.resolve()), trained)

    def facts(self) -> Mapping[str, Any]:
        """Returns what all ranks have to find alike."""
        return {"the run": self.run, "the tag": self.tag, "whether there is a checkpoint": self.trained}
