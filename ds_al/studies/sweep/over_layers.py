"""Accuracy over K, read from the results of a sweep: for the planner and the frontier."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ds_al.studies.results import Row, StudyError
from ds_al.studies.tables.sweep import twin_of


@dataclass(frozen=True)
class Accuracies:
    """Test accuracies of one group of a sweep, means over seeds.

    Attributes:
        group: name of the group.
        twin: row of back-propagation.
        methods: rows of methods with AL layers by name, each in the order of K.
        rivals: rows of all methods of back-propagation by name.
    """

    group: str
    twin: Row
    methods: dict[str, list[Row]]
    rivals: dict[str, Row]

    @classmethod
    def of(cls, rows: Sequence[Row], *, group: str = "") -> Accuracies:
        """Takes the first group whose name contains a text and that has back-propagation and a method with AL layers.

        Args:
            rows: rows of a sweep (:mod:`ds_al.studies.sweep.table`).
            group: text of the group's name.

        Raises:
            StudyError: there is no such group.
        """
        for name in dict.fromkeys(row["group"] for row in rows if group in row["group"]):
            own = [row for row in rows if row["group"] == name and row["test_accuracy"] is not None]
            rivals = {row["method"]: row for row in own if row["K"] is None}
            twin = twin_of(own)
            methods: dict[str, list[Row]] = {}
            for row in sorted((row for row in own if row["K"] is not None), key=lambda row: row["K"]):
                methods.setdefault(row["method"], []).append(row)
            if twin is not None and methods:
                return cls(name, twin, methods, rivals)
        raise StudyError(f"no finished group with {group!r} in its name: expected back-propagation and AL layers")

    @property
    def best(self) -> str:
        """The method with the best validation accuracy, mean over the K that all have, among those with the most runs:
        a sweep that was stopped has methods that ran at some K or seeds alone."""

        def runs(name: str) -> int:
            return sum(row["seeds"] for row in self.methods[name])

        most = max(map(runs, self.methods))
        complete = [name for name in self.methods if runs(name) == most]
        common = set.intersection(*({row["K"] for row in self.methods[name]} for name in complete))

        def score(name: str) -> float:
            return statistics.mean(row["validation_accuracy"] for row in self.methods[name] if row["K"] in common)

        return max(complete, key=score) if common else complete[0]

    def points(self, method: str | None = None) -> dict[int, float]:
        """Returns the last exit's difference to the twin in points, by K; by default of the :attr:`best` method."""
        rows = self.methods[self.best if method is None else method]
        return {row["K"]: 100 * (row["test_accuracy"] - self.twin["test_accuracy"]) for row in rows}
