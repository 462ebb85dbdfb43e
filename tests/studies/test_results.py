"""Files of results: they name their kind; those of earlier versions are recognized by their columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_al.studies.results import KINDS, StudyError, header, now, read, write
from ds_al.system import provenance

ROWS = [{"method": "streaming", "seconds": 2.0, "ideal": 1.8, "efficiency": 0.9}]


def test_a_file_names_its_kind_and_has_its_rows_as_csv_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sleeping.json"
    write(path, kind="sleeping", header=header(batches=3), rows=ROWS)
    results = read(path)
    assert (results.name, results.kind, results.rows) == ("sleeping", "sleeping", ROWS)
    assert results.header["settings"] == {"batches": 3}
    assert path.with_suffix(".csv").read_text() == "method,seconds,ideal,efficiency\nstreaming,2.0,1.8,0.9\n"
    write(path, kind="features", header=header(), rows=ROWS)
    assert read(path).kind == "features", "what the file names counts, not its columns"
    with pytest.raises(StudyError, match=r"got 'sleep', expected one of .*sleeping"):
        write(path, kind="sleep", header=header(), rows=ROWS)


def test_tables_that_are_written_again_keep_the_date_of_the_latest_run() -> None:
    runs = [{"date": "2026-01-31 23:59:59"}, {"date": "2026-01-30 00:00:00"}, {"failure": "died"}]
    assert header(runs=runs)["date"] == "2026-01-31 23:59:59"
    assert header(runs=[{"failure": "died"}])["date"] <= now()
    assert "runs" not in header(runs=runs)["settings"]


def test_tables_that_are_written_again_name_the_command_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "command", lambda: "python run/compare.py --table-only --suite s --json s.json")
    assert header()["command"] == "python run/compare.py --suite s --json s.json"


def test_the_command_of_published_results_names_no_folder_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "python run/finetune.py --pretrained /home/me/model --data-root=/data --page docs/a.md --groups 'a b/c'"
    monkeypatch.setattr(provenance, "command", lambda: given)
    want = "python run/finetune.py --pretrained PATH --data-root=PATH --page docs/a.md --groups 'a b/c'"
    assert header()["command"] == want


def test_a_file_without_a_kind_is_recognized_by_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"header": {}, "rows": ROWS}))
    assert read(path).kind == "sleeping"
    kinds = {path.stem: read(path).kind for path in (Path(__file__).parents[2] / "docs" / "results").glob("*.json")}
    assert set(kinds.values()) <= set(KINDS)
    assert {kinds[name] for name in ("profile_sleeping", "profile_transformer")} == {"profile"}, "once taken for memory"


@pytest.mark.parametrize("content", ['{"rows": []}', "[]", "{", '{"header": {}, "rows": [{"unknown": 1}]}'])
def test_what_is_no_file_of_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(StudyError, match=r"broken.json is no measurement"):
        read(path)
