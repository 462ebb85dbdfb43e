"""Measures what a death costs: ``run/bench.py --recovery``. A stage is replaced alone, or the whole job starts again.

    one stage    streaming with ``"recovery"``: the dead stage's process alone is replaced, by a new one or a standby
    all stages   streaming without it: DeepSpeed's launcher ends the job, and starts it again from its checkpoint
    1F1B         the same for the backprop twin

All forms save every n micro-batches, and the same stage dies at the same micro-batch. A repetition is a job of each
form; the forms alternate. Two more jobs in which nobody dies give the cost of running with recovery.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_al.launch.ranks import free_port
from ds_al.recovery import events
from ds_al.studies.bench.interleaved import quartiles, turns
from ds_al.studies.bench.recovery_job import Ended, Job, launch, lines
from ds_al.studies.results import Row, StudyError

FORMS: Mapping[str, Mapping[str, Any]] = {
    "one stage": {"recovers": True},
    "one stage, standby": {"recovers": True, "standby": True},
    "all stages": {},
    "1F1B": {"method": "bp_1f1b"},
}
RUNNING: Mapping[str, Mapping[str, Any]] = {
    "recovery on, nobody dies": {"recovers": True, "kills": ()},
    "recovery off, nobody dies": {"kills": (), "every": 10**9},
}
PARTS = ("detect", "start", "load", "reform", "replay")
"""Parts of the seconds from a death to the dead stage's next micro-batch, in their order."""
_TIMEOUT = 600.0  # seconds of a job

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RecoveryCases:
    """Settings of the measurement."""

    stages: int
    micro_batches: int
    """Micro-batches per batch."""
    batches: int
    every: int
    """Micro-batches between two saves."""
    repeat: int
    """Jobs of each form."""

    def job(self, folder: Path, number: int, **form: Any) -> Job:
        """Returns a job whose middle stage dies, each time at another micro-batch between the same two saves."""
        last = self.batches * self.micro_batches // self.every - 1
        at = self.every * max(last // 2, 1) + 1 + number * (self.every - 2) // max(self.repeat - 1, 1)
        job = Job(
            folder=str(folder),
            stages=self.stages,
            micro_batches=self.micro_batches,
            batches=self.batches,
            every=self.every,
            kills=((self.stages // 2, at),),
        )
        return replace(job, **form)


def measure_recovery(
    cases: RecoveryCases, folder: Path, *, progress: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Runs all jobs.

    Args:
        folder: for their files.
        progress: called with a line after every job.

    Returns:
        Of every form a row: ``form, deaths, seconds`` (median from the death until the dead stage has trained the
        micro-batch at which it died), ``seconds_low, seconds_high`` (quartiles), medians of its parts, ``recomputed``
        micro-batches of all stages, ``replayed_bytes``, and ``per_micro_batch``, the seconds of the last stage per
        micro-batch where nobody dies.

    Raises:
        StudyError: a job has not come to its end.
    """
    forms = {**FORMS, **RUNNING}
    found: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for number in range(cases.repeat):
        for form in turns(list(forms), number):
            own = folder / f"{len(found[form])}_{form.replace(' ', '_').replace(',', '')}"
            job = cases.job(own, number, **forms[form])
            ended = launch(job, port=free_port(), again=not job.recovers, timeout=_TIMEOUT)
            if ended.exits[-1][1]:
                raise StudyError(f"the job {own} ended with exit code {ended.exits[-1][1]}:\n{ended.output[-3000:]}")
            found[form].append(measured(job, ended))
            values = ", ".join(f"{name} {value:.4g}" for name, value in found[form][-1].items())
            progress(f"{form}: {values}")
    return [_row(form, own) for form, own in found.items()]


def measured(job: Job, ended: Ended) -> dict[str, float]:
    """Returns what the lines of a job say."""
    folder = Path(job.folder)
    by_stage = [lines(folder, stage) for stage in range(job.stages)]
    trained = [[line for line in own if line["what"] == "BackwardPass"] for own in by_stage]
    seen = Counter((stage, line["number"]) for stage, own in enumerate(trained) for line in own)
    found: dict[str, float] = {"recomputed": sum(count - 1 for count in seen.values())}
    found["replayed_bytes"] = sum(line["nbytes"] for own in by_stage for line in own if line["what"] == "reformed")
    if not job.kills:
        first, last = trained[-1][len(trained[-1]) // 4], trained[-1][-1]
        found["per_micro_batch"] = (last["end"] - first["end"]) / (last["number"] - first["number"])
        return found
    ((stage, number),) = job.kills
    own = by_stage[stage]
    killed = next(line["moment"] for line in own if line["what"] == "killed")
    after = [line for line in own if line["moment"] > killed]
    caught_up = next(line["end"] for line in after if line["what"] == "BackwardPass" and line["number"] == number)
    told = events.read(folder / "recovery") if job.recovers else _told_by_launcher(after, ended)
    death, ready, loaded, reformed = (
        next(line for line in told if line["event"] == event and line.get("rank", stage) == stage)
        for event in ("death", "ready", "loaded", "recovered")
    )
    parts = {
        "detect": death["moment"] - killed,
        "start": ready["moment"] - death["moment"] - reformed["reform"],
        "load": loaded["load"],
        "reform": reformed["reform"],
        "replay": caught_up - ready["moment"] - loaded["load"],
    }
    return {"seconds": sum(parts.values()), **parts, **found}


def _told_by_launcher(after: Sequence[Line], ended: Ended) -> list[Line]:
    """The events of a job that was started again as a whole, in the form of those of keepers."""
    ready, loaded = (next(line for line in after if line["what"] == what) for what in ("ready", "loaded"))
    return [
        {"event": "death", "moment": ended.exits[0][0]},
        {"event": "ready", "moment": ready["moment"]},
        {"event": "loaded", "load": loaded["seconds"]},
        {"event": "recovered", "reform": 0.0},
    ]


def _row(form: str, jobs: Sequence[Mapping[str, float]]) -> Row:
    def median(name: str) -> float | None:
        values = [job[name] for job in jobs if name in job]
        return statistics.median(values) if values else None

    seconds = [job["seconds"] for job in jobs if "seconds" in job]
    low, _, high = quartiles(seconds) if seconds else (None, None, None)
    return {
        "form": form,
        "deaths": len(seconds),
        "seconds": median("seconds"),
        "seconds_low": low,
        "seconds_high": high,
        **{part: median(part) for part in PARTS},
        "recomputed": median("recomputed"),
        "replayed_bytes": median("replayed_bytes"),
        "per_micro_batch": median("per_micro_batch"),
    }
