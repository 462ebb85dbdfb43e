"""Writes the page of the study from its results file; parts without results are "not run yet"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.reliability.study import PROMISES
from ds_al.studies.results import Results, Row, origin
from ds_al.studies.tables import parts as tables
from ds_al.studies.tables.write import Template, document

Blocks = list[Table | str]
BROKEN = ("lost", "hung", "wrong")
"""Outcomes of a promise that was not kept."""


def page(results: Results | None) -> str:
    """Returns the text of ``docs/reliability.md``.

    Args:
        results: content of the results file; ``None`` where there is none.
    """
    rows = {row["part"]: row for row in results.rows} if results is not None else {}
    count = broken(row for part in rows.values() for row in part["rows"])
    blocks: Blocks = [
        f"# Reliability: {', '.join(f'{count[name]} {name}' for name in BROKEN)}" if rows else "# Reliability: not run",
        _ABOUT,
        tables.in_cells([{"promise": each.text, **_of(each.part, rows)} for each in PROMISES], _PROMISED),
    ]
    if results is not None:
        blocks += [origin(results.header), tables.parts(results.rows)]
    for promise in PROMISES:
        part = rows.get(promise.part)
        blocks.append(f"## {part['title'] if part else promise.part.capitalize()}")
        if part is None or not part["rows"]:
            blocks.append("Not run yet.")
        else:
            blocks += _SECTIONS.get(promise.part, _anything)(part["rows"])
            blocks += _failures(part["rows"])
    return document(*blocks, _HOW)


def broken(rows: Iterable[Row]) -> Counter[str]:
    """Counts the promises that were not kept, by outcome."""
    return Counter(row["outcome"] for row in rows if row["outcome"] in BROKEN)


def _of(part: str, rows: dict[str, Row]) -> Row:
    if part not in rows:
        return {"tried": "not run yet", "kept": ""}
    told = rows[part]["rows"]
    count = broken(told)
    what = ", ".join(f"{count[name]} {name}" for name in BROKEN)
    return {"tried": str(sum(row.get("inputs", row.get("kills", 1)) for row in told)), "kept": what}


_PROMISED: dict[str, Template] = {"promise": "{promise}", "tried": "{tried}", "not kept": "{kept}"}


def _faults(rows: Sequence[Row]) -> Blocks:
    """One line per place, one column per fault: seconds to the end of the last process."""
    names = list(dict.fromkeys(row["fault"] for row in rows))
    places: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        places.setdefault((row["place"], row["form"]), {})[row["fault"]] = row

    def cell(fault: str) -> Callable[[Row], str]:
        return lambda line: _seconds(line["cells"].get(fault))

    lines = [{"place": place, "form": form, "cells": cells} for (place, form), cells in places.items()]
    columns: dict[str, Template] = {"place": "{place}", "job": "{form}", **{name: cell(name) for name in names}}
    return [_FAULTS, tables.in_cells(lines, columns)]


def _seconds(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['seconds']:.1f} s" if row["outcome"] == "ok" else f"**{row['outcome']}**"


def _kills(rows: Sequence[Row]) -> Blocks:
    columns: dict[str, Template] = {
        "saves": "{saves}",
        "kills": "{kills}",
        "of which in a save": "{in_saves}",
        "stages": "{stages}",
        "batches": "{batches}",
        "rows of losses": "{rows}",
        "W&B runs": "{wandb_runs}",
        "outcome": "{outcome}",
    }
    return [_KILLS, tables.in_cells(rows, columns)]


def _inputs(rows: Sequence[Row]) -> Blocks:
    columns: dict[str, Template] = {
        "table": lambda row: f"[{row['table']}](../tests/robustness/{row['table']}.py)",
        "inputs": "{inputs}",
        "skipped": "{skipped}",
        "outcome": "{outcome}",
    }
    return ["The kinds of inputs are in [robustness.md](robustness.md).", tables.in_cells(rows, columns)]


def _anything(rows: Sequence[Row]) -> Blocks:
    """A table of all that the rows have, but texts of failures, which follow."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("failure", "output")]
    columns: dict[str, Template] = {name.replace("_", " "): _value_of(name) for name in names}
    return [tables.in_cells(rows, columns)]


def _value_of(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name, "")
        return f"{value:.4g}" if isinstance(value, float) else tables.cell(str(value))

    return show


def _failures(rows: Sequence[Row]) -> Blocks:
    failures = [row for row in rows if row.get("failure")]
    return ["\n".join(f"* {tables.cell(row['failure'])}" for row in failures)] if failures else []


_SECTIONS: dict[str, Callable[[Sequence[Row]], Blocks]] = {"faults": _faults, "kills": _kills, "inputs": _inputs}

_ABOUT = """\
What is promised of a job whose ranks, numbers, disks and machines fail, and what came of it: `make reliability` writes
`reliability.json` in [docs/results](results) and this page, within 30 minutes. A promise that was not kept is `lost`
(work or numbers are gone), `hung` (something did not end), or `wrong` (another number, cause or exit code)."""

_FAULTS = """\
Seconds from the fault to the end of the last process, of ranks that no launcher ends, without recovery. `stages` is a
pipeline of three stages whose objective decodes, `replicas` two stages twice, `group` two layers over four stages. The
job ends a stopped process after 20 s; here it does so after 2 s, except at the first place."""

_KILLS = """\
`run/train.py --resume auto`, started anew after every kill on a number of stages drawn from 1 to 4. Half of the kills
hit all processes, the others one of them; a third of them waits for a save to begin. Compared with a run on one stage
that nobody killed: every file of weights, optimizer state and losses of the last checkpoint, by its hash, and all rows
of `metrics.jsonl`."""

_HOW = """\
## How to run it

```
make reliability                                # all parts that are not done; 29 minutes at most
make reliability ARGS="--only faults kills"     # some parts
make reliability ARGS="--minutes 10"            # in another time
make reliability ARGS=--page-only               # the page of the results that are there
```

Each part runs in a process of its own, under a time limit: its share of what is left of `--minutes`. One that fails,
hangs or is late ends alone, and stays in the table with its reason and with the rows that it had. The file is written
after each part; the same command, on the same code, continues with the parts that are not done. A short form of every
part is among the tests (`tests/studies/test_reliability.py`)."""
