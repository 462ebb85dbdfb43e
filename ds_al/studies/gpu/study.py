"""The parts of the study with their settings."""

from __future__ import annotations

import os
from pathlib import Path

from ds_al.studies import checks
from ds_al.studies.gpu import accuracy, cost
from ds_al.studies.parts import ROOT, Part

_HERE = "ds_al.studies.gpu"
DATA = "cifar10"


def study(*, data: str | None, accuracy_minutes: float) -> list[Part]:
    """Returns all parts; their shares are minutes of a run of ten.

    Args:
        data: folder of CIFAR-10; ``None`` where there is none.
        accuracy_minutes: time of all trainings together.
    """
    on_one_gpu = "tests/cuda/test_ranks_on_one_gpu.py"
    others = [file for file in checks.marked() if file != on_one_gpu]
    return [
        Part(
            "tests",
            "Tests on the GPU, and bits of one stage",
            "ds_al.studies.checks:run",
            2.25,
            {"arguments": [*others, "-m", "cuda"], "workers": min(8, os.cpu_count() or 1)},
        ),
        Part(
            "ranks",
            "Several ranks on the GPU",
            "ds_al.studies.checks:run",
            2.25,
            {"arguments": [on_one_gpu, "-m", "cuda", "--ranks-share-gpu"], "workers": 2},
        ),
        Part(
            "cost",
            "What the engine costs",
            f"{_HERE}.cost:measure",
            1.5,
            {"networks": cost.NETWORKS, "runs": cost.Runs()},
        ),
        Part(
            "accuracy",
            "Accuracy on CIFAR-10",
            f"{_HERE}.accuracy:measure",
            accuracy_minutes,
            {"data": data, "minutes": accuracy_minutes, "runs": accuracy.PAPER},
        ),
    ]


def data_path(given: str | None) -> str | None:
    """Returns the folder of CIFAR-10: as given, in ``DS_AL_DATA``, in ``shared/data``, or in that beside the root."""
    if given is not None:
        return str(Path(given).resolve())
    roots = [os.environ.get("DS_AL_DATA"), ROOT / "shared/data", ROOT.parent / "shared/data"]
    found = (Path(root, DATA).resolve() for root in roots if root is not None)
    return next((str(path) for path in found if path.is_dir()), None)
