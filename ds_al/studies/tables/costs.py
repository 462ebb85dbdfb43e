"""Declares the tables of costs: operations and parameters, layer times, recipe times."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, crossed, groups, listed

LAYERS = (
    Column("model", "`{model}`", left=True),
    Column("layer", "{layer} `{name}`", left=True),
    Column("parameters", "{parameters:,}"),
    Column("forward ms", "{forward_ms:.2f}"),
    Column("backward ms", "{backward_ms:.2f}"),
    Column("step ms", "{step_ms:.2f}"),
    Column("step ms, not fused", "{step_loop_ms:.2f}"),
    Column("u", "{u:.3f}"),
)
RECIPE_TIME = (
    Column("network", lambda row: ", ".join(_recipe_and_variant(row)), True),
    Column("K", "{K}"),
    Column("samples", "{micro_batch}"),
    Column("twin, ms", "{twin_ms:.1f}"),
    Column("recipe, ms", "{al_ms:.1f}"),
    Column("times as long (quartiles)", "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})"),
    Column("pairs", "{repeats}"),
)
_KINDS = {"images": "Images `(3, 32, 32)`, 10 classes:", "texts": "128 tokens, 4 classes, a vocabulary of 30,000:"}
_STEPS, _MICRO_BATCHES = (8, 4, 2, 1), 8


def costs(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table for images and one for texts, with two numbers of layers side by side."""
    lines = [
        Column("network", "`{network}` `{preset}`, twin {twin_flops:,.1f}", left=True),
        Column("bridge", "{bridge}", left=True),
    ]
    cells = [
        Column("K = {K}: rho", "{rho:.3f}"),
        Column("bridges", "{bridge_share*100:.1f} %"),
        Column("parameters", "{parameters_f/1000:,.0f} / {parameters_bridges/1000:,.0f}"),
    ]
    blocks: list[Table | str] = []
    for kind, title in _KINDS.items():
        own = [{**row, "twin_flops": row["twin_flops"] / 1e6} for row in rows if row["kind"] == kind]
        blocks += [title, crossed(own, lines, cells)] if own else []
    return blocks


def layers(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the times of each layer, and the whole model's time per micro-batch by ``steps_per_batch``."""
    spent = []
    for own in groups(rows, "model"):
        maths, step = sum(r["forward_ms"] + r["backward_ms"] for r in own), sum(r["step_ms"] for r in own)
        most = maths + step * _STEPS[0] / _MICRO_BATCHES
        for n in _STEPS:
            ms = maths + step * n / _MICRO_BATCHES
            spent.append({"model": own[0]["model"], "u": step / maths, "steps": n, "ms": ms, "faster": most / ms})
    return [
        listed(rows, LAYERS, caption="milliseconds of a layer per micro-batch, and u"),
        f"All layers, ms per micro-batch, by optimizer steps in a batch of {_MICRO_BATCHES} micro-batches "
        "(in brackets, how much\nfaster than a step after each):",
        crossed(
            spent,
            [Column("model", "`{model}`", left=True), Column("u", "{u:.3f}")],
            [Column("`steps_per_batch` {steps}", "{ms:.2f} ({faster:.2f}x)")],
        ),
    ]


def recipe_time(rows: Sequence[Row]) -> list[Table | str]:
    """Returns one line per recipe, network, variant and K."""
    return [listed(rows, RECIPE_TIME)]


def _recipe_and_variant(row: Row) -> list[str]:
    parts = [f"`{row['network']}`"]
    if row["recipe"] != "ours":
        parts.append(f"`{row['recipe']}`")
    return [*parts, row["variant"]] if row.get("variant") else parts
