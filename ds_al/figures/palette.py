"""The common palette of all figures: methods, stages and kinds of work have the same style in every figure.

The colours of Okabe and Ito are distinguishable for colour-blind readers and differ in lightness in print. Each has its
own dash and marker, so that colour is never the only cue. Source: M. Okabe & K. Ito, Color Universal Design, 2008.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PURPLE, YELLOW = "#D55E00", "#E69F00", "#CC79A7", "#F0E442"
GREY, LIGHT_GREY = "#777777", "#D5D5D5"

SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""Colours of series without a style of their own, in this order, without black (invisible on a dark page) and yellow
(invisible on a light page)."""
STAGES = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, YELLOW)
"""Colours of stages on a white background."""
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FORWARD, BACKWARD, STEP, EVALUATION, WAITING = SKY, ORANGE, BLACK, GREEN, LIGHT_GREY
CRITICAL_PATH = VERMILION


class Kind(NamedTuple):
    """Fill of a timeline slice: a colour, or a hatch of this colour on white, in matplotlib's notation."""

    colour: str
    hatch: str = ""


BUSY = ("forward", "backward", "step")
"""Kinds of slices in which a stage computes; in all others it waits or transfers data."""
KINDS: dict[str, Kind] = {
    "forward": Kind(FORWARD),
    "backward": Kind(BACKWARD),
    "step": Kind(STEP),
    "receive": Kind(GREY, "/"),
    "send": Kind(GREY, "\\"),
    "load data": Kind(GREY, "."),
    "barrier": Kind(GREY, "x"),
    "evaluation": Kind(EVALUATION, "-"),
    "trains": Kind(BLUE),
    "trains again": Kind(PURPLE),
    "no process": Kind(VERMILION, "/"),
    "waits for a message": Kind(WAITING),
    "waits for other ranks": Kind(WAITING, "/"),
    "other": Kind(GREY, "|"),
}
"""Kinds of timeline slices, in the order of the legend."""


class Look(NamedTuple):
    """Style of a line, in matplotlib's notation."""

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
    "bp_zb_h1": Look(GREEN, "--", "<"),
    "bp_zb_h2": Look(GREEN, "-", ">"),
    "bp_dualpipev": Look(PURPLE, "--", "*"),
    "bp_async": Look(GREY, "--", "h"),
    "bp_interleaved": Look(PURPLE, "-.", "D"),
    "bp_dp": Look(BLACK, ":", "X"),
}
"""Style of every method that can be run or predicted."""


def series_of(methods: Sequence[str]) -> list[int]:
    """Returns indices into :data:`SERIES`, for figures on light or dark pages, which exclude grey and black.

    The first series of a method has the method's own colour if :data:`SERIES` contains it; all others use the remaining
    colours, then repeat them.
    """
    own = [SERIES.index(METHODS[m].colour) if m in METHODS and METHODS[m].colour in SERIES else None for m in methods]
    found: list[int | None] = [n if n not in own[:place] else None for place, n in enumerate(own)]
    free = [n for n in range(len(SERIES)) if n not in found]
    free += range(
        len(SERIES), len(SERIES) + len(methods)
    )  # indices beyond the end repeat the colours with another dash
    return [free.pop(0) if n is None else n for n in found]
