"""The parts of the study, independent of each other, and what each of them has to show."""

from __future__ import annotations

from dataclasses import dataclass

from ds_al.studies.parts import Part

KIND = "reliability"
_HERE = "ds_al.studies.reliability"


@dataclass(frozen=True)
class Promise:
    """What a part has to show.

    Attributes:
        part: the part, by its name.
        text: the promise, in one sentence.
    """

    part: str
    text: str


PROMISES = (
    Promise(
        "faults",
        "A rank that is killed, stopped, out of memory, out of disk, or that raises or leaves, at any instruction and "
        "in any call, ends the job within 30 s: no exit code of another rank is 0, the cause is shown first, and no "
        "process, port or shared memory is left.",
    ),
    Promise(
        "kills",
        "A run that is killed at any moment, during saves too, goes on with `--resume auto` on any number of stages: "
        "weights and optimizers end on the bits of a run that nobody killed, and so do the losses, in one file of "
        "metrics without gaps or doubles, under one W&B run.",
    ),
    Promise(
        "soak",
        "A long run is flat in memory, descriptors and threads, and ends on the bits of the sequential loop.",
    ),
    Promise("inputs", "An input that is not what a tutorial shows is honoured, or refused by an error that names it."),
    Promise(
        "recovery",
        "A stage that dies is replaced while the others wait for its messages alone; the weights are the same bits.",
    ),
)


def study() -> list[Part]:
    """Returns the parts, with their shares of the time, which are minutes of a whole run on two cores."""
    return [
        Part("faults", "Faults of a rank", f"{_HERE}.faults:run", 9),
        Part("kills", "Kills and resumes", f"{_HERE}.kills:run", 8, {"kills": 50}),
        Part("soak", "Soak", f"{_HERE}.soak:run", 5),
        Part("inputs", "Inputs", f"{_HERE}.inputs:run", 4, {"workers": 2}),
        Part("recovery", "Recovery of a stage", f"{_HERE}.recovery:run", 3, {"batches": 30}),
    ]
