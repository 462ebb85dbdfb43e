"""Detects performance regressions: compares two measurements by ratios that do not depend on the machine's speed.

Higher ratios are better. The kind of a results file determines its ratios:

    sleeping   ideal over measured time of each method; speed of streaming over that of 1F1B
    scaling    ideal over measured time of each method
    overhead   processor time of DeepSpeed's own engine over that of each other engine
    ceiling    share of the ceiling, the throughput that the machine allows
    bound      share of the upper bound of streaming's speed-up over 1F1B
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from ds_al.figures.parts import Table
from ds_al.studies.results import Results, Row, StudyError
from ds_al.studies.tables.write import Column, listed

TOLERANCE = 0.1
STOCK = ("deepspeed_1f1b", "bp_1f1b")
"""Names of DeepSpeed's own engine; the first one found in a file is used."""
_FREE = ("repeat",)  # settings that may differ
_SIZES = {
    "stages": "P = {}",
    "layers": "{} layers",
    "micro_batches": "M = {}",
    "batches": "{} batches",
    "micro_batch": "{} samples",
}


class GuardError(StudyError):
    """Two measurements cannot be compared."""


@dataclass(frozen=True)
class Verdict:
    """One ratio in the baseline and in the current measurement."""

    name: str
    before: float
    now: float
    tolerance: float = TOLERANCE

    @property
    def change(self) -> float:
        """Relative."""
        return self.now / self.before - 1

    @property
    def holds(self) -> bool:
        """Whether the ratio fell by no more than the tolerance."""
        return self.now >= self.before * (1 - self.tolerance)


def check(baseline: Results, current: Results, *, tolerance: float = TOLERANCE, part: bool = False) -> list[Verdict]:
    """Compares all ratios of two measurements.

    Args:
        baseline: results to compare with.
        current: results to check.
        tolerance: share of its value by which a ratio may fall.
        part: whether ``current`` may contain only some of the baseline's cases.

    Raises:
        GuardError: kinds or settings differ, or a case is missing.
    """
    if baseline.kind != current.kind:
        raise GuardError(
            f"the baseline is of kind {baseline.kind!r} and the current one of kind {current.kind!r}: compare alike"
        )
    _check_settings(baseline, current)
    before, now = ratios(baseline), ratios(current)
    if unknown := [name for name in now if name not in before]:
        raise GuardError(f"the baseline has no case {unknown[0]!r}: measure the baseline anew, with it")
    if (missing := [name for name in before if name not in now]) and not part:
        raise GuardError(f"the current measurement has no case {missing[0]!r}, which the baseline has: measure it")
    return [Verdict(name, before[name], value, tolerance) for name, value in now.items()]


def ratios(results: Results) -> dict[str, float]:
    """Returns all ratios of a measurement by a name that describes the ratio and the case.

    Raises:
        GuardError: this kind of results has no ratios.
    """
    if results.kind not in _KINDS:
        raise GuardError(f"got results of kind {results.kind!r}: expected one of {', '.join(_KINDS)}")
    return dict(_KINDS[results.kind](results.rows))


def table(verdicts: Sequence[Verdict]) -> Table:
    """Returns the table of both measurements; ratios that fell too far are marked."""
    columns = (
        Column("ratio", "{name}", left=True),
        Column("baseline", "{before:.3f}"),
        Column("now", "{now:.3f}"),
        Column("change", "{change:+.1f} %"),
        Column("", "{mark}"),
    )
    rows = [{**asdict(each), "change": 100 * each.change, "mark": "" if each.holds else "FALLEN"} for each in verdicts]
    return listed(rows, columns, caption="ratios, higher is better")


def _check_settings(baseline: Results, current: Results) -> None:
    before, now = baseline.header.get("settings", {}), current.header.get("settings", {})
    for key in sorted((before.keys() & now.keys()) - set(_FREE)):
        if before[key] != now[key]:
            raise GuardError(
                f"the baseline was measured with {key} = {before[key]!r}, the current one with {now[key]!r}: "
                "measure one of them anew, with the settings of the other"
            )


def _sleeping(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    yield from _column("efficiency", "time: ideal over measured")(rows)
    seconds = {(row["method"], row["stages"], row["micro_batches"]): row["seconds"] for row in rows}
    for (method, stages, m), value in seconds.items():
        if method == "streaming" and ("bp_1f1b", stages, m) in seconds:
            yield f"speed: streaming over bp_1f1b, P = {stages}, M = {m}", seconds["bp_1f1b", stages, m] / value


def _overhead(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    stock = next((name for name in STOCK if any(row["method"] == name for row in rows)), None)
    if stock is None:
        raise GuardError(f"the rows have none of the methods {', '.join(STOCK)}: measure one beside the others")
    averages = [row for row in rows if row.get("stage", "mean") == "mean"]
    for unit in ("cpu_us", "engine_us"):
        times = {(row["method"], _sizes(row)): row[unit] for row in averages if unit in row}
        for (method, sizes), value in times.items():
            if method != stock and (stock, sizes) in times:
                yield f"{unit}: {stock} over {method}, {sizes}", times[stock, sizes] / value


def _column(column: str, what: str) -> Callable[[Sequence[Row]], Iterator[tuple[str, float]]]:
    def found(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
        for row in rows:
            if row.get(column) is not None:
                yield f"{what}, {_case(row)}", row[column]

    return found


def _case(row: Row) -> str:
    names = [str(row[key]) for key in ("study", "workload", "model", "method") if key in row]
    return ", ".join([*names, _sizes(row)])


def _sizes(row: Row) -> str:
    return ", ".join(words.format(row[key]) for key, words in _SIZES.items() if key in row)


_KINDS: dict[str, Callable[[Sequence[Row]], Iterator[tuple[str, float]]]] = {
    "overhead": _overhead,
    "ceiling": _column("share_of_ceiling", "share of the ceiling"),
    "bound": _column("share_of_bound", "share of the bound"),
    "scaling": _column("efficiency", "time: ideal over measured"),
    "sleeping": _sleeping,
}
