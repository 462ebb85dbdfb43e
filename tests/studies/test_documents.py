"""Every table between markers, and every page made of results, is what the stored results give, byte for byte."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ds_al.studies.language.page import rows as perplexity_rows
from ds_al.studies.language.page import whole_page
from ds_al.studies.language.plan import Plan
from ds_al.studies.language.speed import speed_of
from ds_al.studies.results import read
from ds_al.studies.runs import RunFile
from ds_al.studies.scale.page import page as scale_page
from ds_al.studies.sweep.choice import choose
from ds_al.studies.sweep.exits import exit_table
from ds_al.studies.sweep.output import Output
from ds_al.studies.sweep.table import rows
from ds_al.studies.tables.documents import TABLES, fill, tables_of
from ds_al.studies.tables.schedules import memory_page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
SWEEPS = ROOT / "ds_configs" / "suites"
DOCUMENTS = {
    path: re.findall(r"^<!-- (\w+) -->$", path.read_text(), re.MULTILINE)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


@pytest.mark.parametrize("document", [path for path, names in DOCUMENTS.items() if names], ids=lambda path: path.name)
def test_tables_between_markers_are_those_of_the_stored_results(document: Path, tmp_path: Path) -> None:
    copy = tmp_path / document.name
    copy.write_text(document.read_text())
    assert fill(copy, [RESULTS / f"{name}.json" for name in DOCUMENTS[document]]) == DOCUMENTS[document]
    assert copy.read_text() == document.read_text()


def test_every_file_of_results_that_has_a_table_is_in_a_document() -> None:
    shown = {name for names in DOCUMENTS.values() for name in names} | {"small", "long"}  # with pages of their own
    stored = [read(path) for path in RESULTS.glob("*.json") if not path.stem.startswith("bench")]
    assert {results.name for results in stored if results.kind in TABLES} == shown


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.md")), ids=lambda path: path.stem)
def test_tables_beside_results_are_those_of_the_results(path: Path) -> None:
    assert path.read_text() == tables_of(read(path.with_suffix(".json")))


def test_pages_of_measurements_and_predictions() -> None:
    memory = read(RESULTS / "memory.json")
    assert (ROOT / "docs/memory.md").read_text() == memory_page(memory.header, memory.rows)
    scale = read(RESULTS / "scale.json")
    figures = {name: f"figures/scale-{name}.png" for name in ("links", "sweep", "stragglers")}
    assert (ROOT / "docs/scale.md").read_text() == scale_page(scale.header, scale.rows, figures=figures)


def test_the_page_of_language_models_is_that_of_its_runs() -> None:
    stored, plan = read(RESULTS / "perplexity.json"), Plan()
    results = list(RunFile.beside(RESULTS / "perplexity.json").read().values())
    table = perplexity_rows(results, plan)
    flat = [{**row, "exits": " ".join(f"{value:.2f}" for value in row["exits"])} for row in table]
    assert flat == stored.rows
    places = {"picture": RESULTS / "perplexity.png", "page": ROOT / "docs/language_models.md"}
    places["speed"] = speed_of(RESULTS / "perplexity.json")
    assert places["page"].read_text() == whole_page(results, table, plan, stored.header, **places)


def stored_sweep(name: str) -> tuple[Output, list[Any]]:
    """A sweep, and what is stored of its runs."""
    json = RESULTS / f"{name}.json"
    sweep = Output.of(SWEEPS / f"{name}.yaml", seeds=read(json).header["settings"]["seeds"], json=json)
    return sweep, sweep.results()


@pytest.mark.parametrize("name", ["ablation", "reproduction"])
def test_rows_of_a_sweep_are_those_of_its_runs(name: str) -> None:
    sweep, results = stored_sweep(name)
    assert len(results) == len(sweep.every)
    assert rows(results) == read(sweep.json).rows
    assert exit_table(results) == read(sweep.json.with_suffix(".exits.json")).rows


@pytest.mark.parametrize("name", ["bridges", "recipe_vision", "tune_text", "tune_vision", "vision_objectives"])
def test_what_was_chosen_is_what_the_runs_say(name: str) -> None:
    sweep, results = stored_sweep(name)
    stored = read(sweep.json).rows
    columns = stored[0].keys()  # older files have no column "averaged"
    assert [{column: row[column] for column in columns} for row in choose(results, sweep.sweep)] == stored


@pytest.mark.parametrize(("name", "page"), [("small", "results_small.md"), ("long", "results.md")])
def test_the_page_of_results_is_that_of_its_runs(name: str, page: Any) -> None:
    sweep, results = stored_sweep(name)
    stored, page = read(sweep.json), ROOT / "docs" / page
    table = rows(results)
    assert table == stored.rows
    pictures = {group.name: RESULTS / f"{name}-{n}.png" for n, group in enumerate(sweep.sweep.groups, start=1)}
    pictures = {group: path for group, path in pictures.items() if path.exists()}
    pages = sweep.pages(results, pictures=pictures, header=stored.header, page=page)
    assert {path: path.read_text() for path in pages} == pages
    text = page.read_text()
    assert len(text.splitlines()) < 250
    assert ("back-propagation may gain by more of them" in text) == (name == "small")
    assert ("Every group trains until back-propagation has slowed down, for the smallest number" in text) == (
        name == "long"
    )
