"""One palette: every method has its look, no two share one, and no figure brings colours of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ds_al
from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.figures import palette
from ds_al.planner.predict import METHODS as PREDICTED
from ds_al.schedule import AL_SCHEDULES

SOURCES = Path(ds_al.__file__).parent


def lightness(colour: str) -> float:
    """Of a hexadecimal colour, as in print: relative luminance of ITU-R BT.709, 0 to 1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_method_has_a_look_of_its_own() -> None:
    assert {*AL_SCHEDULES, *BACKPROP_SCHEDULES, *PREDICTED, "bp_dp"} <= palette.METHODS.keys()
    assert len(set(palette.METHODS.values())) == len(palette.METHODS)
    without_colour = [(look.dash, look.marker) for look in palette.METHODS.values()]
    assert len(set(without_colour)) == len(without_colour)  # in print, and for those who see no colours


def test_what_stands_side_by_side_in_a_timeline_differs_in_lightness() -> None:
    shown = sorted(map(lightness, (palette.STEP, palette.FORWARD, palette.BACKWARD, palette.WAITING)))
    assert shown[1] - shown[0] > 0.1 and shown[-1] - shown[-2] > 0.1
    # Forwards and backwards are nearly as light: they alternate, and differ in hue for every reader.
    assert palette.FORWARD == palette.SKY and palette.BACKWARD == palette.ORANGE


def test_no_figure_brings_colours_of_its_own() -> None:
    own = {getattr(palette, name) for name in ("BLUE", "SKY", "GREEN", "VERMILION", "ORANGE", "PURPLE", "YELLOW")}
    for path in SOURCES.rglob("*.py"):
        if path.name != "palette.py":
            assert not own & set(re.findall(r"#[0-9A-Fa-f]{6}", path.read_text())), path


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["streaming", "bp_1f1b"], [0, 1]),
        (["bp_1f1b", "streaming"], [1, 0]),  # not by their order: a method looks the same in every report
        (["streaming", "streaming", "bp_gpipe"], [0, 1, 4]),
        (["sequential", "streaming"], [1, 0]),
        ([f"method {n}" for n in range(8)], list(range(8))),
    ],
)
def test_series_on_a_page_take_their_methods_colours(methods: list[str], expected: list[int]) -> None:
    assert palette.series_of(methods) == expected
