"""Renders the tables of a results file, for the terminal and for documents.

A document holds them between ``<!-- NAME -->`` and ``<!-- end NAME -->``, where NAME is the name of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ds_al.figures.parts import Table
from ds_al.figures.terminal import Console
from ds_al.studies.results import Results, Row, StudyError, origin, read
from ds_al.studies.tables import costs, frontier, links, recovery, rivals, scaling, schedules, sweep
from ds_al.studies.tables.write import document, terminal

Blocks = Callable[[Sequence[Row]], list[Table | str]]

TABLES: Mapping[str, Blocks] = {
    "sleeping": schedules.sleeping,
    "dial": rivals.dial,
    "cores": rivals.cores,
    "recovery": recovery.recovery,
    "repartition": schedules.repartition,
    "features": schedules.features,
    "overhead": schedules.overhead,
    "tracing_cost": schedules.tracing_cost,
    "profile": schedules.profile,
    "memory": schedules.memory,
    "scaling": scaling.scaling,
    "ceiling": scaling.ceiling,
    "bound": scaling.bound,
    "planner": scaling.planner,
    "frontier": frontier.frontier,
    "traffic": links.traffic,
    "slow_link": links.slow_link,
    "costs": costs.costs,
    "layers": costs.layers,
    "recipe_time": costs.recipe_time,
    "sweep": sweep.sweep,
    "trials": sweep.trials,
}
"""Tables of a document, by kind of results."""
SHOWN: Mapping[str, Blocks] = {
    **TABLES,
    "sleeping": schedules.sleeping_listed,
    "dial": rivals.dial_listed,
    "cores": rivals.cores_listed,
    "profile": schedules.profile_listed,
    "memory": schedules.memory_by_size,
    "scaling": scaling.scaling_listed,
}
"""Tables on the terminal, by kind of results; some kinds show more than in a document."""


def tables_of(results: Results) -> str:
    """Returns the tables of a results file in Markdown.

    Raises:
        StudyError: this kind of results has no tables.
    """
    if results.kind not in TABLES:
        raise StudyError(f"{results.name}: got results of kind {results.kind!r}, expected one of {', '.join(TABLES)}")
    return document(*TABLES[results.kind](results.rows))


def show(console: Console, kind: str, rows: Sequence[Row]) -> None:
    """Prints the tables of rows of one kind of results."""
    for block in SHOWN[kind](rows):
        console.print(terminal(block) if isinstance(block, Table) else block, highlight=False, soft_wrap=True)


def fill(page: Path, files: Sequence[Path]) -> list[str]:
    """Writes the tables of each results file between the markers of its name.

    Returns:
        The names.

    Raises:
        StudyError: the document has no markers for a name, or a file cannot be read.
    """
    text, names = page.read_text(), []
    for results in map(read, files):
        start, end = f"<!-- {results.name} -->\n", f"<!-- end {results.name} -->"
        if not 0 <= text.find(start) < text.find(end):
            raise StudyError(f"{page} has no markers {start.strip()!r} and {end!r}: add them")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{tables_of(results)}\n{origin(results.header)}\n\n{end}{after}"
        names.append(results.name)
    page.write_text(text)
    return names
