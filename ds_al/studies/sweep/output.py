"""Writes the output of a sweep: tables, figures and a page of its runs, or the choice among its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_al.errors import ALConfigError
from ds_al.studies.results import header, write
from ds_al.studies.runs import Result, RunFile
from ds_al.studies.sweep.along import along
from ds_al.studies.sweep.budget import explanation
from ds_al.studies.sweep.choice import choose
from ds_al.studies.sweep.exits import exit_table
from ds_al.studies.sweep.page import groups_page, results_page
from ds_al.studies.sweep.picture import draw_group
from ds_al.studies.sweep.runner import is_done, result_of
from ds_al.studies.sweep.spec import Run, Sweep, read_sweep, runs_of, waiting, with_methods
from ds_al.studies.sweep.table import rows
from ds_al.studies.tables import sweep as tables
from ds_al.studies.tables.write import document


@dataclass
class Output:
    """A sweep and the locations of its results.

    Attributes:
        sweep: content of the sweep file.
        every: all runs of the sweep, ordered by seed.
        waits: groups whose settings are not chosen yet.
        file: file of run results.
        seeds: number of seeds.
        json: file of results; tables and figures are written to the same folder.
        budget: how the epochs of each group were found; empty if the sweep sets them.
        methods: names of the methods that were asked for; empty for all.
    """

    sweep: Sweep
    every: list[Run]
    waits: list[str]
    file: RunFile
    seeds: int
    json: Path
    budget: str = ""
    methods: Sequence[str] = ()

    @classmethod
    def of(
        cls, path: Path, *, seeds: int, json: Path, runs: Path | None = None, methods: str = "",
        assignments: Sequence[str] = (),
    ) -> Output:  # fmt: skip
        """Reads a sweep.

        Args:
            path: the sweep file.
            seeds: number of seeds.
            json: file of results.
            runs: file of run results; by default in the folder of ``json``.
            methods: comma-separated methods, which are added to all groups if no group defines them.
            assignments: ``"key=value"`` for all runs.

        Raises:
            ALConfigError: the sweep or a config is invalid.
            StudyError: the file of runs is invalid.
        """
        sweep = read_sweep(path)
        asked = with_methods(sweep, methods)
        every = list(runs_of(sweep, folder=path.parent, seeds=seeds, assignments=assignments))
        file = RunFile(runs) if runs else RunFile.beside(json)
        file.read()
        waits, budget = waiting(sweep, path.parent), explanation(sweep, path.parent)
        return cls(sweep, every, waits, file, seeds, json, budget, asked)

    @property
    def chooses(self) -> bool:
        """Whether the sweep has trials."""
        return any(group.trials or group.own_trials for group in self.sweep.groups)

    def results(self) -> list[Result]:
        """Returns the existing results, in the order of the runs."""
        found = self.file.read()
        return [result for run in self.every if (result := result_of(run, found)) is not None]

    def write_choice(self, results: Sequence[Result]) -> str:
        """Writes all trials and the choice, made by validation accuracy alone; returns the tables.

        Raises:
            ALConfigError: no method has finished all of its trials.
        """
        found = choose(results, self.sweep)
        if not found:
            raise ALConfigError("no method has all of its trials yet: nothing is chosen")
        text = document(*tables.trials(found))
        write(self.json, kind="trials", header=self._header(results), rows=found, as_csv=False)
        self.json.with_suffix(".md").write_text(text)
        return text

    def write_tables(self, results: Sequence[Result], *, page: Path | None, tell: Callable[[str], None]) -> str:
        """Writes tables, figures and optionally a page; returns the tables.

        Args:
            results: results of the runs.
            page: path of the page, or ``None``.
            tell: called with a line for each figure.
        """
        table, exits, about = rows(results), exit_table(results), self._header(results)
        text = document(*tables.sweep(table))
        if table:
            write(self.json, kind="sweep", header=about, rows=table)
            self.json.with_suffix(".md").write_text(text)
        if curves := along(results):
            write(self.json.with_suffix(".along.json"), kind="along", header=about, rows=curves)
        if exits:
            write(self.json.with_suffix(".exits.json"), kind="exits", header=about, rows=exits)
        pictures: dict[str, Path] = {}
        for number, group in enumerate(self.sweep.groups, start=1):
            own = [result for result in results if result["group"] == group.name]
            for file in draw_group(own, self.json.with_name(f"{self.json.stem}-{number}.png")):
                tell(f"{group.name}: {file}")
                pictures.setdefault(group.name, file)
        if page is not None:
            for path, content in self.pages(results, pictures=pictures, header=about, page=page).items():
                path.write_text(content)
        return text

    def pages(
        self, results: Sequence[Result], *, pictures: Mapping[str, Path], header: Mapping[str, Any], page: Path
    ) -> dict[Path, str]:
        """Returns the page of what to decide by and the page of all groups, by path."""
        found, table = self.file.read(), rows(results)
        done = [is_done(run, found) for run in self.every]
        whole = page.with_name(f"{page.stem}_groups.md")
        shared: dict[str, Any] = {"table": table, "header": header, "seeds": self.seeds, "page": page}
        return {
            page: results_page(
                self.every,
                done,
                waits=self.waits,
                pictures=pictures,
                groups_page=whole,
                budget=self.budget,
                **shared,
            ),
            whole: groups_page(results=results, exits=exit_table(results), curves=along(results), **shared),
        }

    def _header(self, results: Sequence[Result]) -> dict[str, Any]:
        return header(runs=results, suite=self.sweep.name, seeds=self.seeds)
