"""Conditions that hold for every test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ds_al.launch.ranks import start_quickly

settings.register_profile("ds_al", deadline=None)  # a busy machine fails no test
settings.load_profile("ds_al")
torch.set_num_threads(1)  # as on the ranks: results are compared bit for bit


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ranks inherit it: no test finds what another job measured, or leaves something behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_AL_CACHE", str(tmp_path_factory.mktemp("ds_al_cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``cuda`` on machines without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles the op that DeepSpeed loads at every start, once and before any test's time runs.

    A rank that was ended while it compiled would leave a lock, and all later ranks would wait for it.
    """
    if any(item.get_closest_marker("distributed") for item in session.items) and not session.config.option.collectonly:
        start_quickly()
        code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=900, stdout=subprocess.DEVNULL)
