"""Declares the tables of a sweep: accuracy and time of every method, trials and choices, accuracy at each exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_al.config.methods import EMULATED
from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, crossed, groups, listed, number

_EXITS = {
    "exit": "all samples leave at exit {exit}",
    "averaged": "mean of the last {averaged}",
    "confidence": "confident to {confidence}",
}


def twin_of(rows: Sequence[Row]) -> Row | None:
    """Returns the row of back-propagation in a group, of several that with the best validation accuracy, without those
    with late gradients."""
    own = [row for row in rows if row["K"] is None and row["test_accuracy"] is not None]
    own = [row for row in own if row["method"] not in EMULATED]
    return max(own, key=lambda row: (row["seeds"], row["validation_accuracy"] or 0.0), default=None)


def group(rows: Sequence[Row], *, seeds: int = 1) -> Table:
    """Returns the table of one group.

    Args:
        rows: rows of the group.
        seeds: minimum number of seeds of a method and the twin for which their difference, in points, is shown.
    """
    twin = twin_of(rows)
    if twin is not None and twin["seeds"] < seeds:
        twin = None

    def beside(column: str) -> Column:
        def show(row: Row) -> str:
            if twin is None or row is twin or row["seeds"] < seeds or row[column] is None:
                return "-"
            return f"{100 * (row[column] - twin['test_accuracy']):+.2f}"

        return Column("to the twin", show)

    columns = (
        Column("method", "`{method}`", left=True),
        Column("K", number("K", "d")),
        _percent("test accuracy, %", "test_accuracy"),
        beside("test_accuracy"),
        _percent("all exits averaged", "averaged_accuracy"),
        beside("averaged_accuracy"),
        _percent("at best validation", "test_accuracy_at_best_validation"),
        _percent("after epoch 1", "first_validation_accuracy"),
        _percent("train", "train_accuracy"),
        Column("s per epoch", number("seconds_per_epoch", ".1f")),
        Column("to the twin's accuracy", _seconds_to_twin),
        Column("held for backward", number("peak_activation_bytes", ".1f", unit=" MiB", times=2**-20)),
        Column("parameters", number("parameters", ",d")),
        Column("FLOPs / twin", number("rho", ".3f")),
        Column("seeds", lambda row: f"{row['seeds']}" + (f", {row['failed']} failed" if row["failed"] else "")),
    )
    return listed(rows, columns)


def _seconds_to_twin(row: Row) -> str:
    reached = number("seconds_to_twin", ".0f", unit=" s", missing="not reached")
    return reached(row) if row["seconds_per_epoch"] is not None else "-"


def decision(rows: Sequence[Row], *, seeds: int) -> Table:
    """Returns one line per group and method: the difference to the twin at each K, in points, and the operations.

    Args:
        rows: rows of all groups.
        seeds: minimum number of seeds of a method and the twin for which their difference is shown.
    """
    depths = sorted({row["K"] for row in rows if row["K"] is not None})
    lines: list[Row] = []
    for own in groups(rows, "group"):
        twin = twin_of(own)
        if twin is None:
            continue
        for place, same in enumerate(groups([row for row in own if row["K"] is not None], "method")):
            at = {row["K"]: _apart(row, twin, seeds=seeds) for row in same}
            deepest = max(same, key=lambda row: row["K"])
            lines.append({
                "group": own[0]["group"] if not place else "", "method": same[0]["method"],
                "twin": f"{100 * twin['test_accuracy']:.2f}" if not place else "", "rho": deepest["rho"],
                **{f"K{k}": at.get(k, "") for k in depths},
            })  # fmt: skip
    columns = (
        Column("group", "{group}", left=True),
        Column("twin, %", "{twin}"),
        Column("method", "`{method}`", left=True),
        *(Column(f"K = {k}", f"{{K{k}}}") for k in depths),
        Column("FLOPs / twin", number("rho", ".2f")),
    )
    return listed(lines, columns)


def _apart(row: Row, twin: Row, *, seeds: int) -> str:
    if min(row["seeds"], twin["seeds"]) < seeds or row["test_accuracy"] is None:
        return "-"
    last = f"{100 * (row['test_accuracy'] - twin['test_accuracy']):+.2f}"
    if row["averaged_accuracy"] is None or row["K"] == 1:  # which has one exit
        return last
    return f"{last} ({100 * (row['averaged_accuracy'] - twin['test_accuracy']):+.2f})"


def sweep(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the tables of all groups, each below its title."""
    return [block for own in groups(rows, "group") for block in (f"### {own[0]['group']}", group(own))]


def trials(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the trials, one table per group; the chosen trial is bold."""
    columns = (
        Column("method", "`{method}`", left=True),
        Column("trial", "{mark}{trial}{mark}", left=True),
        Column("validation accuracy, %", "{mark}{score*100:.2f}{mark}"),
        Column("all exits averaged", number("averaged", ".2f", times=100)),
        Column("FLOPs / twin", number("rho", ".3f")),
        *([Column("seeds", "{seeds}")] if all("seeds" in row for row in rows) else []),
    )
    blocks: list[Table | str] = []
    for own in groups(rows, "group"):
        tried = [
            {
                "method": row["method"], "trial": name, "score": score, "mark": "**" if name == row["trial"] else "",
                "averaged": row.get("averaged", {}).get(name), "rho": row["rho"][name], "seeds": row.get("seeds"),
            }
            for row in own for name, score in row["trials"].items()
        ]  # fmt: skip
        blocks += [f"### {own[0]['group']}", listed(tried, columns)]
    return blocks


def exits(rows: Sequence[Row], of_group: str) -> list[Table | str]:
    """Returns accuracy and cost at the exits of one group, one table per kind of exit; empty without exit results."""
    own = [row for row in rows if row["group"] == of_group]
    several = len({row["P"] for row in own}) > 1
    lines = [Column("method", "`{method}`", left=True), Column("K", "{K}, P = {P}" if several else "{K}")]
    blocks: list[Table | str] = []
    for name, head in _EXITS.items():
        # The mean of the last exit alone is the exit itself.
        known = [row for row in own if row[name] is not None and (name, row[name]) != ("averaged", 1)]
        if known:
            cells = [Column(head, "{accuracy*100:.2f} at {cost*100:.0f} %")]
            blocks.append(crossed(known, lines, cells, by=name))
    return blocks


def along(rows: Sequence[Row]) -> Table:
    """Returns the difference to the twin in points at shares of what the twin spends, of one group.

    Args:
        rows: rows of :func:`ds_al.studies.sweep.along.along` of one group.
    """
    lines = [Column("method", "`{method}`", left=True), Column("K", "{K}"), Column("at equal", "{by}", left=True)]
    return crossed(rows, lines, [Column("{share*100:.0f} %", _difference)], by="share")


def _difference(row: Row) -> str:
    error = "" if row["error"] is None else f" ± {100 * row['error']:.2f}"
    return f"{100 * row['difference']:+.2f}{error}, {row['verdict']}"


def missing(runs: Sequence[Row], waits: Sequence[str]) -> Table:
    """Returns the budget, the number of finished runs and the missing runs of each group.

    Args:
        runs: rows ``group, method, K, seed, epochs, done`` of all runs of the sweep.
        waits: groups that have no runs yet.
    """
    lines: list[Mapping[str, object]] = []
    for own in groups(runs, "group"):
        left: dict[str, list[str]] = {}
        for run in own:
            if not run["done"]:
                name = f"`{run['method']}`" + ("" if run["K"] is None else f" K = {run['K']}")
                left.setdefault(name, []).append(str(run["seed"]))
        count = sum(run["done"] for run in own)
        what = "; ".join(f"{name} (seed {', '.join(seeds)})" for name, seeds in left.items()) if count else "all"
        about = {"group": own[0]["group"], "epochs": own[0]["epochs"]}
        lines.append({**about, "count": f"{count} of {len(own)}", "missing": what or "none"})
    waiting = {"epochs": "", "count": "0", "missing": "all: its settings, or its epochs, are not chosen yet"}
    lines += [{"group": name, **waiting} for name in waits]
    columns = (
        Column("group", "{group}", left=True),
        Column("epochs", "{epochs}"),
        Column("runs done", "{count}"),
        Column("missing", "{missing}", left=True),
    )
    return listed(lines, columns)


def _percent(title: str, name: str) -> Column:
    def show(row: Row) -> str:
        if row[name] is None:
            return "-"
        sd = row.get(f"{name}_sd")
        return f"{100 * row[name]:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")

    return Column(title, show)
