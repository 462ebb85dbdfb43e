"""A checkpoint of an earlier state of the package loads, on any number of stages.

``saved_by_0_1_0.tar.gz`` was written on two stages by the code before its rooms were redrawn. Its ``expected.json``
is for ``python .ci/same_bits.py load FOLDER``, which also trains on and compares the bits.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.engines import make_engine
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

ARCHIVE = Path(__file__).with_name("saved_by_0_1_0.tar.gz")


def loaded(folder: str) -> dict[str, Any]:
    """Worker: what an engine has after loading, and that it trains on."""
    engine = make_engine()
    path, _ = engine.load_checkpoint(folder)
    weights = {
        index: {name: value.clone() for name, value in layer.state_dict().items()} for index, layer in engine.layers
    }
    steps, samples = engine.global_steps, engine.global_samples
    engine.train_batch(iter(NETWORKS["mlp"].batches(4)))
    engine.flush()
    return {"weights": weights, "steps": steps, "samples": samples, "index": Path(path).name}


@pytest.mark.parametrize("stages", [1, 2])
def test_a_checkpoint_of_before_the_rooms_were_redrawn_loads(stages: int, tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "saved_by_0_1_0"
    folder = root / (root / "latest").read_text().strip()
    counters = json.loads((folder / "index.json").read_text())["counters"]
    ranks = run_ranks(f"{__name__}:loaded", stages, folder=str(root))
    weights = {index: state for rank in ranks for index, state in rank["weights"].items()}
    assert sorted(weights) == [0, 1, 2, 3]
    for index, state in weights.items():
        saved = load_file(folder / f"layer_{index:02d}-model_states.safetensors")
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in saved)
    assert {(rank["steps"], rank["samples"]) for rank in ranks} == {
        (counters["global_steps"], counters["global_samples"])
    }
