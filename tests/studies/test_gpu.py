"""The study on one GPU, without one: budget, resume, page, and every part on the CPU at a tiny size."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_al.launch.ranks import tell
from ds_al.studies import parts
from ds_al.studies.gpu import accuracy, cost, packages
from ds_al.studies.gpu.machine import gpu
from ds_al.studies.gpu.page import page
from ds_al.studies.gpu.picture import draw_accuracy
from ds_al.studies.gpu.study import data_path, study
from ds_al.studies.results import StudyError, read
from ds_al.studies.tables.parts import outcome
from tests.support.parquet_files import write_images
from tests.support.ranks import ROOT, run_ranks
from tests.support.scripts import call

pytestmark = pytest.mark.distributed

MACHINE = {"gpu": "GPU of a test", "memory_bytes": 2**34, "cuda": "13.0", "nccl": "2.29"}
TINY: dict[str, Any] = {"in_shape": (1, 8, 8), "num_classes": 4, "blocks": ((4, "M"), (6,))}


def part(name: str, share: float = 1.0, **options: Any) -> parts.Part:
    return parts.Part(name, f"Part {name}", f"{__name__}:{name}", share, options)


def run(chosen: list[parts.Part], path: Path, minutes: float = 1.0) -> tuple[list[Any], list[str]]:
    """Rows and lines of progress of parts that run on the CPU."""
    said: list[str] = []
    rows = parts.run_parts(chosen, path=path, minutes=minutes, machine=MACHINE, device="cpu", say=said.append)
    return rows, said


def works(seconds: float, value: int) -> None:
    """Part."""
    tell("on the way")
    parts.tell_row({"value": value})


def fails(seconds: float) -> None:
    """Part."""
    parts.tell_row({"value": 1})
    raise StudyError("no memory")


def hangs(seconds: float) -> None:
    """Part."""
    parts.tell_row({"value": 2})
    time.sleep(600)


def test_what_a_part_leaves_of_the_time_goes_to_those_after_it(tmp_path: Path) -> None:
    assert parts.limits([1, 2, 5], 80) == [10, 20, 50]
    first, second = part("works", share=1, value=1), part("fails", share=3)
    limits = [row["limit"] for row in run([first, second], tmp_path / "gpu.json", minutes=2)[0]]
    assert limits[0] == pytest.approx(30, abs=1) and 90 < limits[1] < 120
    planned = parts.plan([first, second], path=tmp_path / "gpu.json", minutes=2, machine=MACHINE)
    assert [seconds for _, seconds in planned] == [None, 120]


def test_a_part_that_fails_or_hangs_loses_neither_its_rows_nor_the_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_LEAST", 1.0)
    path = tmp_path / "gpu.json"
    rows, _ = run([part("hangs", share=1), part("fails", share=9), part("works", share=9, value=3)], path, minutes=1)
    assert [row["rows"] for row in rows] == [[{"value": 2}], [{"value": 1}], [{"value": 3}]]
    assert [row["done"] for row in rows] == [False, False, True]
    assert rows[0]["reason"] == "not done after 3 s"
    assert outcome(rows[1]) == "ds_al.studies.results.StudyError: no memory"
    assert "Traceback" in rows[1]["reason"]
    monkeypatch.undo()
    (late, *_), _ = run([part("works", value=4)], tmp_path / "other.json", minutes=0.1)
    assert late["reason"] == "not started: 6 s were left; run it again"
    results = read(path)
    assert results.kind == "gpu" and list(results.rows) == rows
    assert page(results).startswith("# One GPU: 2 of 3 parts are not finished\n")


def test_finished_parts_are_kept_until_code_machine_or_options_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, chosen = tmp_path / "gpu.json", [part("works", value=1), part("fails")]
    first, said = run(chosen, path)
    assert "  on the way" in said and "  value 1" in said
    again, said = run(chosen, path)
    assert said[0].startswith("Part works: done on") and again[0] == first[0]
    assert any(line.startswith("Part fails: at most") for line in said), "what has failed is repeated"
    changed, _ = run([part("works", value=2)], path)
    assert changed[0]["rows"] == [{"value": 2}]
    key = chosen[0].key(MACHINE)
    assert chosen[0].key({**MACHINE, "gpu": "another"}) != key
    monkeypatch.setattr(parts, "code_digest", lambda: "other code")
    assert chosen[0].key(MACHINE) != key


def test_parts_that_are_not_asked_for_stay_in_the_results_file(tmp_path: Path) -> None:
    """Running one part again once removed the rows of all others."""
    path = tmp_path / "gpu.json"
    (works_before, fails_before), _ = run([part("works", value=1), part("fails")], path)
    (changed,), _ = run([part("works", value=2)], path)
    assert changed["rows"] == [{"value": 2}] != works_before["rows"]
    assert list(read(path).rows) == [changed, fails_before]


def test_code_has_another_digest_after_any_change(tmp_path: Path) -> None:
    for folder in ("ds_al", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text("one = 1\n")
    before = parts.code_digest(tmp_path)
    (tmp_path / "tests/module.py").write_text("one = 2\n")
    assert parts.code_digest(tmp_path) != before


def test_missing_packages_are_named_with_what_they_need_and_the_way_to_bring_them() -> None:
    assert packages.missing(packages.needed(ROOT)) == []
    assert packages.missing(["numpy>=1", "Not_There>=2"]) == ["not-there"]
    assert not {"wandb"} & {packages._name(each) for each in packages.needed(ROOT)}
    text = packages.remedy(["deepspeed", "not-there"], ROOT)
    assert text.startswith("2 packages are missing: deepspeed, not-there.") and "deepspeed==0.19" in text


def test_what_missing_packages_would_bring_is_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    there = packages._requirements
    monkeypatch.setattr(packages, "_requirements", lambda name: None if name == "deepspeed" else there(name))
    assert packages.missing(["deepspeed"]) == ["deepspeed"]
    for name, brought in packages.BROUGHT.items():
        assert set(brought) <= set(there(name) or ()), name


def test_a_machine_without_a_gpu_says_so_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    files = ("--json", str(tmp_path / "gpu.json"), "--page", str(tmp_path / "gpu.md"))
    result = call("run/gpu.py", *files)
    assert (result.returncode, result.stderr) == (0, "") and "finds no NVIDIA GPU" in result.stdout
    dry = call("run/gpu.py", *files, "--dry-run", "--data-path", "somewhere", "--minutes", "10")
    assert dry.returncode == 0 and f"CIFAR-10: {ROOT / 'somewhere'}" in dry.stdout
    assert "Accuracy on CIFAR-10: at most" in dry.stdout
    assert list(tmp_path.iterdir()) == []
    assert gpu() is None


@pytest.mark.slow
def test_the_command_runs_what_is_missing_and_writes_file_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [part("works", value=1), part("fails")]
    monkeypatch.setattr("ds_al.studies.gpu.machine.gpu", lambda: MACHINE)
    monkeypatch.setattr("ds_al.studies.gpu.study.study", lambda **settings: chosen)
    files = ("--json", str(tmp_path / "gpu.json"), "--page", str(tmp_path / "gpu.md"))
    result = call("run/gpu.py", *files)
    assert result.returncode == 1, "a part has failed"
    assert result.stdout.endswith("gpu.md was written\nPart fails: ds_al.studies.results.StudyError: no memory\n")
    assert (tmp_path / "gpu.md").read_text().startswith("# One GPU: 1 of 2 parts are not finished\n")
    chosen[1] = replace(chosen[0], name="fails", title="Part fails")  # mended
    result = call("run/gpu.py", *files)
    assert result.returncode == 0 and "Part works: done on" in result.stdout
    assert call("run/gpu.py", *files, "--page-only").returncode == 0
    assert (tmp_path / "gpu.md").read_text() == page(read(tmp_path / "gpu.json"))


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(minutes: str) -> None:
    result = call("run/gpu.py", "--minutes", minutes)
    assert result.returncode == 2 and "expected a number of minutes above 0" in result.stderr


def test_missing_packages_stop_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing", lambda requirements: ["torch"])
    result = call("run/gpu.py")
    assert result.returncode == 1 and "1 packages are missing: torch" in result.stderr


def test_the_page_is_up_to_date() -> None:
    path, drawn = ROOT / "docs/results/gpu.json", ROOT / "docs/results/gpu.png"
    results = read(path) if path.exists() else None
    text = (ROOT / "docs/gpu.md").read_text()
    assert text == page(results, picture="results/gpu.png" if drawn.exists() else None)
    assert ("not run yet" in text.splitlines()[0]) == (results is None)


def test_the_parts_of_the_command_find_their_tests_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests, ranks, *_ = study(data=None, accuracy_minutes=5)
    assert (
        "tests/test_stage.py" in tests.options["arguments"] and "tests/cuda/test_bits.py" in tests.options["arguments"]
    )
    assert "--ranks-share-gpu" in ranks.options["arguments"]
    assert not set(ranks.options["arguments"][:1]) & set(tests.options["arguments"])
    monkeypatch.setenv("DS_AL_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    assert data_path(None) == str(tmp_path / "cifar10")
    assert data_path("given") == str(Path("given").resolve())


def test_the_work_of_a_gpu_is_read_from_a_trace_of_several_streams() -> None:
    def event(cat: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "ts": ts, "dur": dur}

    trace = [
        event("kernel", 100, 10),
        event("kernel", 105, 10),  # on another stream
        event("gpu_memcpy", 106, 2),
        event("kernel", 130, 5),
        event("cpu_op", 0, 1000),
        {"ph": "i", "cat": "kernel", "ts": 1},
    ]
    kernels, seconds = cost.device_work(trace)
    assert kernels == 3 and seconds == pytest.approx(20e-6)


def test_all_runs_have_as_many_epochs_as_fit() -> None:
    probes = [accuracy.Probe(epoch=2, fixed=5), accuracy.Probe(epoch=3, fixed=5)]
    assert accuracy.epochs_that_fit(probes, 40) == 6
    with pytest.raises(StudyError, match=r"one epoch of 2 runs takes 15 s, and 14 s are left: raise --accuracy-min"):
        accuracy.epochs_that_fit(probes, 14)


def test_the_accuracy_runs_differ_in_method_and_layers_alone() -> None:
    runs = accuracy.PAPER
    assert [form for _, form in runs.forms()] == [None, 2, 4, None, 2, 4]
    twin, al = runs.config("resnet", None, epochs=3), runs.config("resnet", 2, epochs=3)
    assert twin["associated_learning"]["method"] == "bp_1f1b" and al["associated_learning"]["method"] == "streaming"
    assert al["experiment"]["model"]["al_options"] == {"num_layers": 2}
    for config in (twin, al):
        del config["associated_learning"], config["experiment"]["name"]
        config["experiment"]["model"].pop("al_options", None)
    assert twin == al and twin["experiment"]["recipe"] == "ours" and twin["experiment"]["epochs"] == 3


TESTS = """
import pytest

@pytest.fixture
def broken():
    raise OSError("no GPU answers")

def test_passes(): pass
def test_fails(): assert "one" == "two", "the bits differ"
def test_waits(): pytest.skip("not here")
def test_errs(broken): pass
def test_of_ranks(): raise RuntimeError(open(__file__.replace(".py", ".txt")).read())
"""
RANKS = """ranks exited with [1, None]
--- rank 0, exit code 1
Traceback (most recent call last):
torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, invalid usage
Last error:
Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000
--- rank 1, exit code None
[2026-11-28 00:45:04,651] [INFO] on the way
"""


def test_a_test_is_a_row_with_the_reason_of_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(TESTS)
    (tmp_path / "test_own.txt").write_text(RANKS)
    check = parts.Part("tests", "Tests", "ds_al.studies.checks:run", 1)
    (row,), _ = run([replace(check, options={"arguments": [str(tmp_path)], "workers": 2})], tmp_path / "gpu.json")
    found = {each["test"].rpartition("::")[2]: (each["outcome"], each["reason"]) for each in row["rows"]}
    assert found["test_passes"] == ("passed", "") and found["test_waits"] == ("skipped", "not here")
    assert found["test_fails"][0] == "failed" and "the bits differ" in found["test_fails"][1]
    assert found["test_errs"][0] == "failed" and "no GPU answers" in found["test_errs"][1]
    line, *_ = found["test_of_ranks"][1].splitlines()
    assert line.startswith("torch.distributed.DistBackendError: NCCL error in") and line.endswith("CUDA device 1000")
    assert row["done"] and outcome(row) == "done, 3 failed"
    nothing = replace(check, options={"arguments": [str(tmp_path / "test_own.py"), "-k", "none"], "workers": 1})
    (row,), _ = run([nothing], tmp_path / "nothing.json")
    assert not row["done"] and "ended with <ExitCode.NO_TESTS_COLLECTED" in outcome(row)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results file of every part of the study, at a tiny size on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    data = write_images(folder / "data", train=40, test=10)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "experiment.data.name": "own",
        "experiment.data.cache": str(folder / "cache"),
    }
    trained = accuracy.Runs({"vgg": {"blocks": [[4, "M"], [6]]}}, layers=(2,), settings=settings, probe=1, most=2)
    broken = cost.Network("vgg", {**TINY, "blocks": ()}, shape=(1, 8, 8), samples=4)
    networks = (cost.Network("vgg", TINY, shape=(1, 8, 8), samples=4), broken)
    chosen: dict[str, dict[str, Any]] = {
        "tests": {"arguments": ["tests/cuda/test_bits.py", "--device", "cpu", "-k", "mlp and one_stage"], "workers": 1},
        "ranks": {"arguments": ["tests/cuda/test_ranks_on_one_gpu.py"], "workers": 1},
        "cost": {"networks": networks, "runs": cost.Runs(batches=1, repeat=1, idle_batches=1)},
        "accuracy": {"data": str(data), "minutes": 3, "runs": trained},
    }
    own = [
        parts.Part(each.name, each.title, each.target, 1, chosen[each.name])
        for each in study(data=None, accuracy_minutes=5)
    ]
    run(own, folder / "gpu.json", minutes=12)
    return folder / "gpu.json"


def test_every_part_runs_on_the_cpu(measured: Path) -> None:
    rows = {row["part"]: row for row in read(measured).rows}
    assert {name: row["reason"] for name, row in rows.items()} == dict.fromkeys(rows, "")
    (bits,) = rows["tests"]["rows"]
    assert bits["outcome"] == "passed" and bits["test"].endswith("one_stage_leaves_the_bits_of_the_plain_loop[mlp]")
    assert [row["reason"] for row in rows["ranks"]["rows"]] == ["needs an NVIDIA GPU"] * 4
    engines = [row for row in rows["cost"]["rows"] if row["section"] == "engine"]
    assert [row["engine"] for row in engines] == ["streaming", "deepspeed_1f1b"] and all(r["cpu_us"] for r in engines)
    twin, al, broken = (row for row in rows["cost"]["rows"] if row["section"] == "network")
    assert twin["rho"] == 1 and al["rho"] == al["ms"] / twin["ms"] and al["layers"] == 2
    assert 0 < twin["counted_bytes"] < al["counted_bytes"] and al["kernels"] is None and al["peak_bytes"] is None
    assert broken["network"] == "vgg" and "blocks" in broken["failure"]
    backprop, ours = rows["accuracy"]["rows"]
    assert (backprop["K"], ours["K"], ours["batch"], ours["samples"]) == (None, 2, 8, 36)
    assert backprop["epochs"] == ours["epochs"] == len(ours["validation_accuracy"]) == 2
    assert 0 <= ours["test_accuracy"] <= 1


def test_the_page_shows_every_part(measured: Path) -> None:
    results = read(measured)
    (picture,) = draw_accuracy(results.rows[-1]["rows"], measured.with_suffix(".png"))
    text = page(results, picture=picture.name)
    assert text.startswith("# One GPU\n") and "On one GPU of a test (16 GiB), CUDA 13.0, NCCL 2.29" in text
    assert "1 passed, 0 failed, 0 skipped." in text and "| What the engine costs | done, 1 failed |" in text
    assert "| `vgg` | twin |" in text and "| `vgg` | AL, K = 2 | 36 | 2 x 4 |" in text and "](gpu.png)" in text


def test_a_rank_of_another_accelerator_is_no_fork() -> None:
    """A fork has DeepSpeed's accelerator of the process that imported it, the CPU's: such ranks once computed there."""
    assert run_ranks(f"{__name__}:accelerator", 1, env={"DS_ACCELERATOR": "cuda"}) == ["cuda"]
    assert run_ranks(f"{__name__}:accelerator", 1) == ["cpu"]


def accelerator() -> str:
    """Worker."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name()
