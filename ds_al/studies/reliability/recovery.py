"""Lets a stage die, with recovery and without it, and compares the weights with those of a job in which nobody dies.

The jobs are those of ``run/bench.py --recovery``, each once.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ds_al.launch.ranks import free_port
from ds_al.studies.bench.recovery import FORMS, PARTS, RecoveryCases, measured
from ds_al.studies.bench.recovery_job import launch, result
from ds_al.studies.parts import tell_row

_WHOLE = "nobody dies"
_TAIL = 2000  # characters kept of what a job printed


def run(*, seconds: float, batches: int) -> None:
    """Part of the study: tells a row for each job.

    Args:
        seconds: time limit.
        batches: batches of a job.
    """
    end, expected = time.monotonic() + seconds, None
    cases = RecoveryCases(stages=3, micro_batches=4, batches=batches, every=16, repeat=1)
    with tempfile.TemporaryDirectory() as folder:
        for form, options in {_WHOLE: {"recovers": True, "kills": ()}, **FORMS}.items():
            job = cases.job(Path(folder, form.replace(" ", "_")), 0, **options)
            ended = launch(job, port=free_port(), again=not job.recovers, timeout=max(end - time.monotonic(), 1.0))
            code, failure, found = ended.exits[-1][1], "", {}
            if code:
                failure = f"the job ended with {code}\n{ended.output[-_TAIL:]}"
            else:
                if job.method == "streaming":  # 1F1B has other gradients, and so other weights
                    hashes = result(Path(job.folder))["hashes"]
                    expected = expected or hashes
                    if hashes != expected:
                        failure = "the weights have other bits than those of the job in which nobody dies"
                found = measured(job, ended)
            tell_row(
                {
                    "form": form,
                    **{name: found.get(name) for name in ("seconds", *PARTS, "recomputed") if job.kills},
                    "outcome": ("lost" if code else "wrong") if failure else "ok",
                    "failure": failure,
                }
            )
