"""A run that was saved and loaded goes on as if it had never stopped, bit for bit; a wrong checkpoint is named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from torch import nn
from torch.utils.data import TensorDataset

import ds_al
from ds_al.launch.ranks import run_ranks
from tests.support.engines import different, engine_config, engine_state, make_engine, merge
from tests.support.networks import NETWORKS, mlp_layers

pytestmark = pytest.mark.distributed

BATCHES = 10
LAYER_3 = "layer_03"
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 15, "warmup_type": "linear"}}


def dataset(network: str) -> TensorDataset:
    """100 samples: 12 micro-batches an epoch, so a run of 20 batches ends within its seventh epoch."""
    ((x, y),) = NETWORKS[network].batches(1, size=100, seed=5)
    return TensorDataset(x, y)


def engine_on_data(network: str, **config: Any) -> ds_al.ALPipelineEngine:
    return make_engine(network, training_data=dataset(network), scheduler=SCHEDULER, **config)


def observe(engine: ds_al.ALPipelineEngine) -> dict[str, Any]:
    """All that a resume has to bring back."""
    return {
        "state": engine_state(engine),
        "lr": engine.get_lr(),
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "micro_steps": engine.micro_steps,
        "position": engine.loader.position if engine.loader is not None else None,
        "random": torch.get_rng_state(),
    }


def whole_and_resumed(network: str, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Worker: 20 batches in one go; and 10, a checkpoint, another engine that loads it, 10 more."""
    engine = engine_on_data(network, **config)
    for _ in range(BATCHES):
        engine.train_batch()
    engine.save_checkpoint(folder, tag="half", client_state={"note": "mine"})
    at_save = observe(engine)
    for _ in range(BATCHES):
        engine.train_batch()
    whole = observe(engine)

    torch.manual_seed(99)
    engine = engine_on_data(network, **config)
    for _ in range(3):
        engine.train_batch()  # whatever it has done before is forgotten
    path, client_state = engine.load_checkpoint(folder)
    loaded = observe(engine)
    for _ in range(BATCHES):
        engine.train_batch()
    return {
        "path": path,
        "client_state": client_state,
        "at_save": at_save,
        "loaded": loaded,
        "whole": whole,
        "resumed": observe(engine),
    }


@pytest.mark.parametrize(
    ("network", "stages", "config"),
    [
        ("vgg", 1, {"method": "sequential"}),
        ("mlp", 2, {"count": "step", "autoencoder_optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}),
        ("lstm", 3, {"steps_per_batch": 2}),
        pytest.param(
            "transformer",
            2,
            {"optimizer": "MuonAdamW", "params": {"lr": 0.02, "adamw_lr": 3e-3}},
        ),
    ],
)
def test_a_resumed_run_equals_the_whole_one(tmp_path: Path, network: str, stages: int, config: dict[str, Any]) -> None:
    ranks = run_ranks(f"{__name__}:whole_and_resumed", stages, network=network, folder=str(tmp_path), config=config)
    for one, two in (("at_save", "loaded"), ("whole", "resumed")):
        assert different(merge([r[one]["state"] for r in ranks]), merge([r[two]["state"] for r in ranks])) == []
        for rank in ranks:
            assert torch.equal(rank[one].pop("random"), rank[two].pop("random"))
            assert {k: v for k, v in rank[one].items() if k != "state"} == {
                k: v for k, v in rank[two].items() if k != "state"
            }
    assert different(merge([r["at_save"]["state"] for r in ranks]), merge([r["whole"]["state"] for r in ranks]))
    for rank in ranks:
        assert rank["client_state"]["note"] == "mine"
        assert "ds_al" not in rank["client_state"]
        assert str(tmp_path / "half") in rank["path"]
        assert rank["whole"]["global_steps"] == 2 * BATCHES * (4 if config.get("count") == "step" else 1)
        assert rank["whole"]["global_samples"] == 2 * BATCHES * 4 * 8
    assert [rank["whole"]["position"] for rank in ranks] == [2 * BATCHES * 4] + [None] * (stages - 1)


def refused(load: Callable[[], Any]) -> str:
    """The message of the error that says why a checkpoint cannot be loaded."""
    try:
        load()
    except ds_al.ALCheckpointError as error:
        return str(error)
    return "loaded"


def wrong_loads(folder: str) -> dict[str, str]:
    """Worker on two stages: saves, and loads in all the wrong ways that two stages have."""
    engine = make_engine("mlp")
    engine.train_batch(iter(NETWORKS["mlp"].batches(4)))
    engine.save_checkpoint(folder, tag="good")
    other_width = [*mlp_layers()[:3], wide_layer()]
    modules = {
        "fewer layers": ds_al.ALPipelineModule(mlp_layers()[:3], num_classes=4, base_seed=7),
        "other widths": ds_al.ALPipelineModule(other_width, num_classes=4, base_seed=7),
        "other seed": ds_al.ALPipelineModule(mlp_layers(), num_classes=4, base_seed=8),
    }
    messages = {}
    sgd = make_engine("mlp", optimizer="SGD", params={"lr": 0.1})
    messages["other optimizer"] = refused(lambda: sgd.load_checkpoint(folder))
    messages["new optimizer"] = refused(lambda: sgd.load_checkpoint(folder, load_optimizer_states=False))
    for name, module in modules.items():
        other, *_ = ds_al.initialize(model=module, config=engine_config())
        messages[name] = refused(lambda other=other: other.load_checkpoint(folder))
    messages["other seed, weights alone"] = refused(lambda: other.load_checkpoint(folder, load_module_only=True))
    same = all(torch.equal(a, b) for a, b in zip(other.module.parameters(), engine.module.parameters(), strict=True))
    messages["weights are the saved ones"] = str(same)
    messages["no folder"] = refused(lambda: engine.load_checkpoint(f"{folder}/nothing"))
    messages["no tag"] = refused(lambda: engine.load_checkpoint(folder, tag="other"))
    return messages


def wide_layer() -> ds_al.ALLayerSpec:
    """A last layer of another width."""
    return ds_al.ALLayerSpec(
        f=lambda: nn.Linear(16, 9), b=lambda: nn.Linear(9, 6), g=lambda: nn.Linear(6, 6), h=lambda: nn.Linear(6, 6)
    )


def edited(folder: Path, change: Callable[[Path], Any]) -> str:
    """A copy of the good checkpoint, changed by the first rank; its folder, once all may look at it."""
    copy = folder.with_name(f"{folder.name}-damaged")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy / "good")
    dist.barrier()
    return str(copy)


def flip(path: Path) -> None:
    """Turns one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Takes the last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def bigger_seed(path: Path) -> None:
    """Changes a number of the index, which stays JSON."""
    path.write_text(path.read_text().replace('"micro_steps": 4', '"micro_steps": 5'))


def old(folder: Path) -> None:
    """What a folder of DeepSpeed's own engine looks like."""
    (folder / "index.json").unlink()
    (folder / "mp_rank_00_model_states.pt").touch()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / f"{LAYER_3}-model_states.safetensors").unlink(), "AL layer 3.*is missing"),
    "cut": (lambda f: cut(f / f"{LAYER_3}-autoencoder_optim_states.safetensors"), "AL layer 3.*it was cut"),
    "flipped": (lambda f: flip(f / f"{LAYER_3}-associated_optim_states.safetensors"), "AL layer 3.*was altered"),
    "training": (lambda f: flip(f / f"{LAYER_3}-training_states.safetensors"), "AL layer 3.*was altered"),
    "random": (lambda f: cut(f / "stage_01-random_states.safetensors"), "of stage 1.*it was cut"),
    "index cut": (lambda f: cut(f / "index.json"), "index.json' is cut or altered"),
    "index altered": (lambda f: bigger_seed(f / "index.json"), "index.json' was altered"),
    "index missing": (lambda f: (f / "index.json").unlink(), "no checkpoint in.*expected a file index.json"),
    "old": (old, "before format 2, which is not read any more"),
}
"""What is done to a checkpoint, and what is then said on both ranks."""


def damaged_loads(folder: str) -> dict[str, str]:
    """Worker on two stages: loads damaged checkpoints, none of which may leave a trace."""
    engine = make_engine("mlp")
    engine.train_batch(iter(NETWORKS["mlp"].batches(4)))
    engine.save_checkpoint(folder, tag="good")
    engine.train_batch(iter(NETWORKS["mlp"].batches(4, seed=1)))
    before = observe(engine)
    messages = {}
    for name, (change, _) in DAMAGE.items():
        damaged = edited(Path(folder), change)
        messages[name] = refused(lambda damaged=damaged: engine.load_checkpoint(damaged))
    after = observe(engine)
    assert different(before.pop("state"), after.pop("state")) == []
    assert torch.equal(before.pop("random"), after.pop("random")) and before == after
    relu = [ds_al.ALLayerSpec(**{**spec.parts, "f": relu_like}, **spec.module_kwargs) for spec in mlp_layers()[:1]]
    module = ds_al.ALPipelineModule([*relu, *mlp_layers()[1:]], num_classes=4, base_seed=7)
    other, *_ = ds_al.initialize(model=module, config=engine_config())
    messages["other class"] = refused(lambda: other.load_checkpoint(folder))
    module = ds_al.ALPipelineModule(mlp_layers(), num_classes=4, base_seed=7)
    other, *_ = ds_al.initialize(model=module, config=engine_config())
    if dist.get_rank() == 1:
        module.forward_funcs[0].b.half()
    messages["other dtype"] = refused(lambda: other.load_checkpoint(folder))
    scheduled = make_engine("mlp", scheduler=SCHEDULER)
    messages["schedule"] = refused(lambda: scheduled.load_checkpoint(folder))
    messages["no schedule"] = refused(lambda: scheduled.load_checkpoint(folder, load_lr_scheduler_states=False))
    module = ds_al.ALPipelineModule(mlp_layers(), num_classes=4, base_seed=7)
    module.forward_funcs[0].f.requires_grad_(False)
    frozen, *_ = ds_al.initialize(model=module, config=engine_config())
    messages["frozen"] = refused(lambda: frozen.load_checkpoint(folder))
    frozen.save_checkpoint(f"{folder}-frozen", exclude_frozen_parameters=True)
    messages["left out"] = refused(lambda: frozen.load_checkpoint(f"{folder}-frozen"))
    messages["left out, missing"] = refused(lambda: engine.load_checkpoint(f"{folder}-frozen"))
    messages["client"] = refused(lambda: engine.save_checkpoint(folder, tag="next", client_state={"f": relu_like}))
    messages["tags"] = refused(lambda: engine.save_checkpoint(folder, tag=f"tag{engine.stage_id}"))
    messages["latest"] = (Path(folder) / "latest").read_text()
    engine.load_checkpoint(folder)
    return messages


def relu_like() -> nn.Module:
    """As the first f, with another function of the same shapes."""
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2))


def test_a_damaged_checkpoint_is_named_on_all_ranks_and_changes_nothing(tmp_path: Path) -> None:
    for messages in run_ranks(f"{__name__}:damaged_loads", 2, folder=str(tmp_path / "saved")):
        for name, (_, expected) in DAMAGE.items():
            assert re.search(expected, messages[name]), (name, messages[name])
        assert "layer_03-model_states.safetensors" in messages["missing"]
        assert "AL layer 0, f is a Block there, a Sequential here" in messages["other class"]
        assert "AL layer 2, b.0.bias is float32 of shape [6]" in messages["other dtype"]
        assert "float16 of shape [6] here" in messages["other dtype"]
        assert "LR schedule None, this job has WarmupLR" in messages["schedule"]
        assert messages["no schedule"] == "loaded"
        assert "AL layer 0, f.0.bias: the optimizer 'associated' trained it, not here" in messages["frozen"]
        assert messages["left out"] == "loaded"
        assert "AL layer 0, f.0.bias: the optimizer 'associated' trains it here" in messages["left out, missing"]
        assert "holds what torch.load(weights_only=True) does not read" in messages["client"]
        assert "stage 1 has tag tag1, stage 0 has tag0" in messages["tags"]
        assert messages["latest"] == "good"


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:wrong_loads", 2, folder=str(tmp_path))
    for messages in ranks:
        assert "4 AL layers, this network 3" in messages["fewer layers"]
        assert "base_seed=7, this job 8" in messages["other seed"]
        assert "state of AdamW and AdamW, this job trains with SGD and SGD" in messages["other optimizer"]
        assert messages["new optimizer"] == "loaded"
        assert messages["other seed, weights alone"] == "loaded"
        assert messages["weights are the saved ones"] == "True"
        assert "no checkpoint in" in messages["no folder"] and "nothing" in messages["no folder"]
        assert "no checkpoint in" in messages["no tag"] and "other" in messages["no tag"]
    # Every rank finds out, the one whose layers would fit as well: none is left behind alone.
    widths = [messages["other widths"] for messages in ranks]
    assert all("stage 1" in message and "AL layer 3" in message for message in widths), widths


class Words(nn.EmbeddingBag):
    """Gradients, and so SGD's momentum, are sparse."""

    def __init__(self) -> None:
        super().__init__(20, 12, sparse=True, mode="sum")


class Neighbours(nn.Linear):
    """A layer of a graph network, whose adjacency is a sparse buffer."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.register_buffer("adjacency", torch.eye(12).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.adjacency, super().forward(x).t()).t()


def saves_of_sparse_tensors(folder: str) -> dict[str, str]:
    """Worker on two stages: one of them holds what a file cannot."""
    config = engine_config(optimizer="SGD", params={"lr": 0.1, "momentum": 0.9})
    config["gradient_accumulation_steps"] = 1
    x = torch.randint(0, 20, (8, 6))
    messages = {}
    for name, first in {"momentum": [Words()], "buffer": [nn.EmbeddingBag(20, 12), Neighbours()]}.items():
        layers = [*first, nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)]
        model = ds_al.from_layers(layers, num_al_layers=3, num_classes=4, example=x)
        engine, *_ = ds_al.initialize(model=model, config=config)
        engine.train_batch(iter([(x, torch.zeros(8, dtype=torch.long))]))
        messages[name] = refused(lambda engine=engine: engine.save_checkpoint(folder))
        cuts = "cuts:1" if engine.module.bounds == [0, 2, 3] else "cuts:2"
        try:
            engine.repartition(cuts)
        except ds_al.ALConfigError as error:
            messages[f"{name} that moves"] = str(error)
    return messages


def test_a_sparse_tensor_that_would_be_saved_is_named_on_all_ranks(tmp_path: Path) -> None:
    """It said "unsupported memory format option Contiguous", and not of what."""
    for messages in run_ranks(f"{__name__}:saves_of_sparse_tensors", 2, folder=str(tmp_path)):
        for name in ("momentum", "momentum that moves"):
            assert re.search(r"f\S*weight/momentum_buffer: a torch.sparse_coo tensor cannot be saved", messages[name])
        for name in ("buffer", "buffer that moves"):
            assert re.search(r"AL layer \d, f\S*adjacency: a torch.sparse_coo tensor", messages[name])
        assert "persistent=False" in messages["buffer"]
    assert not (tmp_path / "latest").exists()
