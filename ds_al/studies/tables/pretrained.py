"""Declares the tables of the fine-tuning study: accuracy, trials, seeds, two stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.tables.parts import in_cells
from ds_al.studies.tables.write import Template

TWIN = "backprop"
"""Method name of back-propagation, which has no K and one exit."""

EXACT = "bp_"
"""How names of schedules of back-propagation begin."""


def accuracy(rows: Sequence[Row]) -> Table:
    """Returns one line per method, what trains, and K."""

    def local(show: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: "" if row["method"] == TWIN else show(row)

    columns: dict[str, Template] = {
        "method": "`{method}`",
        "trains": lambda row: f"{row['adapt']} ({100 * row['trained_share']:.1f} %)",
        "K": local(lambda row: str(row["K"])),
        "lr": lambda row: f"**{row['lr']:g}**" if row["best"] else f"{row['lr']:g}",
        "seeds": "{seeds}",
        "accuracy": lambda row: _points(row["accuracy"], row["accuracy_sd"]),
        "gap": local(lambda row: "" if row["gap"] is None else _points(row["gap"], row["gap_sd"], sign="+")),
        "at each exit": local(lambda row: ", ".join(f"{100 * value:.1f}" for value in row["exits"])),
        "chosen exit": local(_chosen),
        "averaged": local(lambda row: "" if row["averaged"] is None else f"{100 * row['averaged']:.1f}"),
        "after 100 steps": lambda row: "" if row["early"] is None else f"{100 * row['early']:.1f}",
        "processor time per text": lambda row: "" if row["cpu_ms"] is None else f"{row['cpu_ms']:.0f} ms",
    }
    return in_cells(rows, columns)


def trials(rows: Sequence[Row]) -> Table:
    """Returns all trials and the chosen learning rates.

    Args:
        rows: ``data, method, adapt, pooling, tried, chosen``.
    """
    columns: dict[str, Template] = {
        "texts": "{data}",
        "method": "`{method}`",
        "trains": "{adapt}",
        "head reads": lambda row: row["pooling"] or "a token",
        "validation accuracy by learning rate": "{tried}",
        "chosen": "{chosen}",
    }
    return in_cells(rows, columns)


def seeds(rows: Sequence[Row]) -> Table:
    """Returns how many seeds of each method have run.

    Args:
        rows: ``texts, trains``, and one text per method that is planned for them.
    """
    methods = list(dict.fromkeys(name for row in rows for name in row if name not in ("texts", "trains")))

    def of(name: str) -> Callable[[Row], str]:
        return lambda row: row.get(name, "")

    columns: dict[str, Template] = {"texts": "{texts}", "trains": "{trains}"}
    return in_cells(rows, columns | {f"`{name}`": of(name) for name in methods})


def speed(rows: Sequence[Row]) -> Table:
    """Returns one line per method and stage, beside 1F1B and the fastest exact schedule of the same texts and weights
    that train."""

    def beside(method: str) -> Callable[[Row], str]:
        def ratio(row: Row) -> str:
            rivals = [
                each["samples_per_second"] for each in rows
                if each["method"].startswith(method) and all(each[name] == row[name] for name in ("data", "adapt"))
            ]  # fmt: skip
            if not rivals or _is_exact(row):
                return ""
            return f"{row['samples_per_second'] / max(rivals):.2f}"

        return ratio

    columns: dict[str, Template] = {
        "texts": "{data}",
        "method": lambda row: f"`{row['method']}`" + ("" if _is_exact(row) else ", K = 2"),
        "trains": "{adapt}",
        "M": "{micro_batches}",
        "stage": "{stage}",
        "samples/s (least to most)": (
            "{samples_per_second:.1f} ({samples_per_second_low:.1f} to {samples_per_second_high:.1f})"
        ),
        "times 1F1B": beside("bp_1f1b"),
        "times the fastest exact": beside(EXACT),
        "weights": lambda row: _mebibytes(row["weight_bytes"]),
        "gradients and moments": lambda row: _mebibytes(row["training_bytes"]),
        "held for backward": lambda row: _mebibytes(row["held_bytes"]),
    }
    return in_cells(rows, columns)


def _is_exact(row: Row) -> bool:
    return bool(row["method"].startswith(EXACT))


def _chosen(row: Row) -> str:
    gap = "" if row["chosen_gap"] is None else f" ({100 * row['chosen_gap']:+.2f})"
    return f"{100 * row['chosen']:.2f}{gap}"


def _points(share: float, sd: float | None, *, sign: str = "") -> str:
    return f"{100 * share:{sign}.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
