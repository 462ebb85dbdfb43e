"""The one palette of every figure: a method, a stage or a kind of work looks the same wherever it is drawn.

Okabe and Ito's colours, which colour-blind readers tell apart and whose lightness differs in print; with a dash and a
marker each, so that colour is never the only cue. Source: M. Okabe & K. Ito, Color Universal Design, 2008.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PURPLE, YELLOW = "#D55E00", "#E69F00", "#CC79A7", "#F0E442"
GREY, LIGHT_GREY = "#777777", "#D5D5D5"

SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""For what has no look of its own, in this order. Without black, which a dark page hides, and yellow, which a light
one does."""
STAGES = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, YELLOW)
"""Of stages, on white."""
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FORWARD, BACKWARD, STEP, EVALUATION, WAITING = SKY, ORANGE, BLACK, GREEN, LIGHT_GREY
CRITICAL_PATH = VERMILION


class Kind(NamedTuple):
    """How a slice of a timeline is filled: with a colour, or hatched with it on white, in matplotlib's letters."""

    colour: str
    hatch: str = ""


BUSY = ("forward", "backward", "step")
"""Kinds of slices in which a stage computes; in all others it waits or moves data."""
KINDS: dict[str, Kind] = {
    "forward": Kind(FORWARD),
    "backward": Kind(BACKWARD),
    "step": Kind(STEP),
    "receive": Kind(GREY, "/"),
    "send": Kind(GREY, "\\"),
    "load data": Kind(GREY, "."),
    "barrier": Kind(GREY, "x"),
    "evaluation": Kind(EVALUATION, "-"),
    "waits for a message": Kind(WAITING),
    "waits for other ranks": Kind(WAITING, "/"),
    "other": Kind(GREY, "|"),
}
"""Of the slices of a timeline, in the order of its legend."""


class Look(NamedTuple):
    """How a line is drawn, in matplotlib's names."""

    colour: str
    dash: str
    marker: str


METHODS: dict[str, Look] = {
    "streaming": Look(BLUE, "-", "o"),
    "forward_first": Look(SKY, "--", "s"),
    "parallel_backward": Look(GREY, "--", "d"),
    "sequential": Look(GREY, "-.", "o"),
    "bp_1f1b": Look(VERMILION, "-", "^"),
    "bp_gpipe": Look(ORANGE, "--", "v"),
    "bp_naive": Look(GREY, ":", "v"),
    "bp_interleaved": Look(PURPLE, "-.", "D"),
    "bp_zero_bubble": Look(GREEN, "-.", "P"),
    "bp_dp": Look(BLACK, ":", "X"),
}
"""Of every method that is run or predicted."""


def series_of(methods: Sequence[str]) -> list[int]:
    """Numbers in :data:`SERIES` for drawings that may be dark, where grey and black are not to be had.

    The first series of a method has the method's own colour, if that is one of them; all others have those that are
    left over, then the same ones again.
    """
    own = [SERIES.index(METHODS[m].colour) if m in METHODS and METHODS[m].colour in SERIES else None for m in methods]
    found: list[int | None] = [n if n not in own[:place] else None for place, n in enumerate(own)]
    free = [n for n in range(len(SERIES)) if n not in found]
    free += range(len(SERIES), len(SERIES) + len(methods))  # those beyond come round again, with another dash
    return [free.pop(0) if n is None else n for n in found]
