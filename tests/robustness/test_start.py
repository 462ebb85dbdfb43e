"""Starts of a job, and faults of its ranks: what a shell, a launcher or a user may do, and what has to happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_al.errors import ALLayerError, ALTransportError
from ds_al.experiment.run_folder import check_probe, probed_folder
from ds_al.parallel.launchers import launched
from ds_al.parallel.lost import is_loss
from ds_al.parallel.store import _listener
from ds_al.parallel.world import start_seconds
from ds_al.system import extensions
from ds_al.trace.calls import Calls, Position, out_of_order
from tests.support.robustness import Case, Kind, by_name, meet

KINDS: list[Kind] = [
    Kind(
        section="Start",
        name="a rank whose config, network, releases or code differ from those of the others",
        outcome="refused",
        what="All ranks raise the same ALConfigError before training; it names what differs, with rank and host.",
        tests=("tests/parallel/test_agreement.py::test_a_disagreement_names_what_differs_and_where",),
    ),
    Kind(
        section="Start",
        name="an error on one rank alone: a config, data or a package that is missing there",
        outcome="refused",
        what="All ranks raise it and print it, with the rank and the host that have it.",
        tests=(
            "tests/parallel/test_agreement.py::test_a_disagreement_names_what_differs_and_where",
            "tests/experiment/test_train.py::test_what_one_rank_alone_finds_wrong_is_printed_by_all",
        ),
    ),
    Kind(
        section="Start",
        name="a rank that never comes, or hangs before the first step",
        outcome="refused",
        what="After DS_AL_START_SECONDS (45 between hosts, 300 on one) the others end, and name it and who came.",
        tests=("tests/parallel/test_agreement.py::test_a_rank_that_stays_away_is_named_in_time",),
    ),
    Kind(
        section="Start",
        name="an output folder that not all hosts share, or that cannot be written",
        outcome="refused",
        what="All ranks raise an ALConfigError before training, by a probe file.",
        tests=(
            "tests/experiment/test_stopping.py::test_a_rank_that_does_not_see_the_folder_says_so",
            "tests/experiment/test_stopping.py::test_a_folder_that_cannot_be_made_is_refused",
        ),
    ),
    Kind(
        section="Start",
        name="variables of Slurm, MPI or torch in a shell that launches nothing",
        outcome="honoured",
        what="The script is a world of one rank; RANK and WORLD_SIZE alone, srun or mpirun launch ranks.",
        tests=("tests/parallel/test_launchers.py::test_what_a_shell_may_hold_launches_nothing",),
    ),
    Kind(
        section="Start",
        name="srun, and mpirun on one host, with or without mpi4py",
        outcome="honoured",
        what="Ranks find each other by the variables of the launcher, and MPI is ended where it was started.",
        tests=(
            "tests/parallel/test_launchers.py::test_tasks_of_srun_find_each_other",
            "tests/parallel/test_launchers.py::"
            "test_mpirun_on_one_host_needs_no_mpi4py_and_on_several_is_left_to_deepspeed",
            "tests/experiment/test_stopping.py::test_mpi_is_ended_where_it_was_started",
        ),
    ),
    Kind(
        section="Start",
        name="a lock that a killed compilation of an extension has left",
        outcome="refused",
        what="It is named, with the remedy; a compilation that runs is announced, with its time.",
        tests=("tests/system/test_extensions.py::test_a_lock_that_nobody_holds_is_refused_by_name",),
    ),
    Kind(
        section="Start",
        name="sockets of a job on one host",
        outcome="honoured",
        what="Store and messages listen on the loopback interface alone.",
        tests=("tests/parallel/test_presence.py::test_ranks_of_one_host_listen_on_its_loopback_alone",),
    ),
    Kind(
        section="Faults of a rank",
        name="an exception of any kind in a layer, an iterator or a callback of one rank",
        outcome="refused",
        what="The rank tells it first; the others end with an ALTransportError that has its cause; no exit code is 0.",
        tests=("tests/parallel/test_presence.py::test_the_neighbour_tells_the_cause",),
    ),
    Kind(
        section="Faults of a rank",
        name="sys.exit(0) in a layer or iterator",
        outcome="refused",
        what="It becomes an ALLayerError, since the rank would end as if it were done.",
        tests=("tests/parallel/test_presence.py::test_the_neighbour_tells_the_cause",),
    ),
    Kind(
        section="Faults of a rank",
        name="evaluate, predict, save_checkpoint or another joint call on one rank alone",
        outcome="refused",
        what="The watchdog, on by default, finds it within seconds, names the ranks and calls, and ends the job.",
        tests=(
            "tests/trace/test_calls.py::test_a_call_on_one_rank_alone_ends_the_job",
            "tests/trace/test_watchdog.py::test_the_watch_is_on_by_default_and_ends_the_job",
        ),
    ),
    Kind(
        section="Faults of a rank",
        name="a stage that trains fewer batches than the others",
        outcome="refused",
        what="The exit code is not 0, and the message names the rank that had ended.",
        tests=("tests/parallel/test_presence.py::test_a_stage_that_trains_fewer_batches_fails_the_job",),
    ),
    Kind(
        section="Faults of a rank",
        name="a rank that is stopped (SIGSTOP) in training, a callback, a save or before training",
        outcome="refused",
        what="The other ranks name it and end the job after 20 s.",
        tests=("tests/parallel/test_presence.py::test_a_stopped_process_ends_the_job",),
    ),
    Kind(
        section="Faults of a rank",
        name="a launcher that is killed (SIGKILL, SIGHUP, SIGINT)",
        outcome="refused",
        what="Its ranks end within seconds; a run of run/train.py saves a checkpoint first.",
        tests=("tests/parallel/test_presence.py::test_a_rank_ends_with_its_launcher",),
    ),
    Kind(
        section="Faults of a rank",
        name="Ctrl-C, SIGTERM and SIGHUP on any rank of run/train.py",
        outcome="honoured",
        what="All ranks stop after the same batch, save, and leave with 130, 143 or 129; --resume goes on bit for bit.",
        tests=(
            "tests/experiment/test_stopping.py::"
            "test_a_signal_on_one_rank_stops_all_after_the_same_batch_and_the_run_goes_on_from_there",
        ),
    ),
]

ENVIRONMENTS: list[Case] = [
    Case(name=f"shell: {', '.join(environment) or 'nothing'}", given=environment, message=None)
    for environment in (
        {},
        {"MASTER_PORT": "29500"},
        {"MASTER_ADDR": "10.1.2.3"},
        {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "1"},
        {"LOCAL_RANK": "1"},
        {"RANK": "1"},
        {"WORLD_SIZE": "4"},
        {"SLURM_PROCID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
        {"SLURM_JOB_ID": "5", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"PMI_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"PMIX_RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "0"},
        {"AZUREML_EXPERIMENT_ID": "x"},
        {"SM_TRAINING_ENV": "{}"},
    )
]


@by_name(ENVIRONMENTS)
def test_a_shell_that_launches_nothing_is_a_world_of_one(case: Case) -> None:
    found = meet(case, lambda: {**case.given, **launched(case.given)})
    assert found is not None and (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


SECONDS: list[Case] = [
    Case(name="seconds: 60", given="60", message=None),
    Case(name="seconds: 0.5", given="0.5", message=None),
    *(
        Case(name=f"seconds: {text!r}", given=text, message="DS_AL_START_SECONDS: got .*expected a number of seconds")
        for text in ("", "ten", "0", "-1", "inf", "nan", "1e999", "5 s")
    ),
]


@by_name(SECONDS)
def test_the_limit_of_a_start_is_a_positive_number(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_AL_START_SECONDS", case.given)
    assert meet(case, start_seconds) in (None, float(case.given) if case.message is None else None)


def _taken_port() -> Any:
    import socket

    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.listen(1)
    try:
        return _listener("127.0.0.1", held.getsockname()[1])
    finally:
        held.close()


def _compiling(folder: Path, *, lock: bool) -> None:
    (folder / "op").mkdir()
    if lock:
        (folder / "op/lock").touch()
    with extensions.compiling("op", tell=False):
        pass


def _hidden(folder: Path) -> None:
    made, text = probed_folder(folder / "runs")
    (made / ".probe").write_text("of another host")
    check_probe(made, text, seconds=0.1)


def _under_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    probed_folder(folder / "file/name")


FILES: list[Case] = [
    Case(name="port: taken", given=lambda folder: _taken_port(), message="cannot listen on 127.0.0.1:.*master_port"),
    Case(name="extension: a lock that was left", given=lambda f: _compiling(f, lock=True), message="remove this file"),
    Case(name="extension: no lock", given=lambda f: _compiling(f, lock=False), message=None),
    Case(name="output: writable", given=lambda f: probed_folder(f / "a/b"), message=None),
    Case(name="output: below a file", given=_under_a_file, message="cannot write to .*choose another --output"),
    Case(name="output: NUL in its name", given=lambda f: probed_folder(f / "a\0b"), message="cannot write to"),
    Case(name="output: not shared", given=_hidden, message="does not see .* all hosts share"),
]


@by_name(FILES)
def test_what_a_start_finds_on_the_machine(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    meet(case, lambda: case.given(tmp_path))


LOST = [
    "stage 1 lost stage 0 while waiting for its input, message 5",
    "stage 1 cannot reach stage 0.",
    "[pair.cc:553] Connection closed by peer [127.0.0.1]:3457",
    "Connection reset by peer",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "writev: Broken pipe",
    "Timed out waiting 600000ms for recv operation to complete",
    "NCCL communicator: ncclRemoteError: a remote process exited",
]


@pytest.mark.parametrize("text", LOST)
def test_an_error_that_another_rank_is_gone_is_known(text: str) -> None:
    assert is_loss(ALTransportError(text)) and is_loss(RuntimeError(text))
    assert not is_loss(ALLayerError("mat1 and mat2 shapes cannot be multiplied")) and not is_loss(OSError(text))


ERRORS: list[BaseException] = [
    ValueError("x"), TypeError("x"), RuntimeError("x"), MemoryError("x"), KeyError("x"), AssertionError(),
    OSError(5, "x"), StopIteration(), NotImplementedError("x"), RecursionError("x"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "x"),
    KeyboardInterrupt(), GeneratorExit(), SystemExit(0), SystemExit("text"), ALLayerError("x"),
    ALTransportError("changed"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_call_that_fails_keeps_its_error_and_the_next_one_counts(error: BaseException) -> None:
    calls = Calls()
    with pytest.raises(BaseException) as caught, calls.counted("train_batch", joint=False):
        raise error
    assert calls.current is None
    if isinstance(error, SystemExit):
        assert isinstance(caught.value, ALLayerError) and "sys.exit(" in str(caught.value)
    else:
        assert caught.value is error
    with calls.counted("evaluate", joint=True), calls.counted("gather", joint=True):
        pass
    assert calls.position == Position(batches=1, joint=1, at=1, name="evaluate")


def test_ranks_in_the_common_order_are_never_blamed() -> None:
    """Any two places in one order of calls, however far apart."""
    calls = Calls()
    places = [calls.position]
    for name in ("train", "train", "evaluate", "save_checkpoint", "train", "gather", "train", "train", "evaluate"):
        with calls.counted(name, joint=name != "train"):
            places.append(calls.position)
    assert [out_of_order({0: one, 1: other}) for one in places for other in places] == [""] * len(places) ** 2
