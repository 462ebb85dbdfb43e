"""Conditions that hold for every test."""

from __future__ import annotations

import fcntl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch
from hypothesis import settings

from ds_al.launch.ranks import run_ranks, start_quickly

settings.register_profile("ds_al", deadline=None)  # a busy machine fails no test
settings.load_profile("ds_al")
torch.set_num_threads(1)  # as on the ranks: results are compared bit for bit
_TURNS = (Path(__file__), Path(__file__).with_name("__init__.py"))  # locked, never written


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ranks inherit it: no test finds what another job measured, or leaves something behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_AL_CACHE", str(tmp_path_factory.mktemp("ds_al_cache")))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the tests marked ``cuda``."""
    add = parser.addoption
    add(
        "--ranks-share-gpu",
        action="store_true",
        help="also start several ranks on one GPU, which NCCL does not support",
    )
    add("--device", default="cuda", help="where the tests of tests/cuda compute: cpu tries the tests themselves")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked ``cuda`` on machines without a GPU, and orders files for workers side by side.

    Long ones come first, so that short ones fill the end; those that run alone come last.
    """
    alone = {item.path for item in items if item.get_closest_marker("alone")}
    long = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: 2 if item.path in alone else int(item.path not in long))
    if torch.cuda.is_available():
        return
    for item in items:
        elsewhere = config.option.device != "cuda" and "device" in getattr(item, "fixturenames", ())
        if item.get_closest_marker("cuda") and not elsewhere:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles the op that DeepSpeed loads at every start on a CPU, once and before any test's time runs.

    A rank that was ended while it compiled would leave a lock, and all later ranks would wait for it.
    """
    on_cpu = session.config.option.device == "cpu"
    ranks = [item for item in session.items if item.get_closest_marker("distributed")]
    if any(on_cpu or not item.get_closest_marker("cuda") for item in ranks) and not session.config.option.collectonly:
        start_quickly("transformers.modeling_utils")  # 3 s of CPU time on every rank that converts a model
        run_ranks(f"{__name__}:compile_op", 1, timeout=900)


def compile_op() -> None:
    """Worker: loads DeepSpeed's all-reduce in shared memory."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Lets tests marked ``alone`` run beside none of another worker (``pytest -n``); no test's time runs meanwhile."""
    with _turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(*, alone: bool) -> Iterator[None]:
    """Holds the place, shared with others or not. Who waits holds the door, so that none comes in before it."""
    with _TURNS[0].open() as place:
        with _TURNS[1].open() as door:
            _lock(door, alone=True)
            _lock(place, alone=alone)
        yield


def _lock(file: IO[str], *, alone: bool) -> None:
    """Locks a file until it is closed."""
    fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
