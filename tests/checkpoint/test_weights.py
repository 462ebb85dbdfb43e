"""Weights that travel alone: out of a checkpoint into one file, and from DeepSpeed and Hugging Face into the layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from safetensors.torch import load_file, save_file
from torch import nn

import ds_al
from ds_al.__main__ import main
from ds_al.launch.ranks import run_ranks
from ds_al.parallel.world import join_world
from tests.checkpoint.test_checkpoint import refused
from tests.support.engines import MICRO_BATCHES, SEED, engine_config, make_engine, merge
from tests.support.networks import NETWORKS, Block

pytestmark = pytest.mark.distributed

State = dict[str, torch.Tensor]


def twin(stages: int) -> Any:
    """The f of the small network under a head, trained by back-propagation for one batch."""
    join_world()
    layers = [*(spec.parts["f"] for spec in NETWORKS["mlp"].layers()), LayerSpec(nn.Linear, 16, 4)]
    module = PipelineModule(
        layers,
        num_stages=stages,
        loss_fn=nn.CrossEntropyLoss(),
        seed_layers=True,
        base_seed=SEED,
        partition_method="uniform",
    )
    config = {**engine_config(method="bp_1f1b"), "gradient_clipping": 0.0}
    engine, *_ = ds_al.initialize(model=module, config=config)
    engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))
    return engine


def weights_of(engine: Any) -> State:
    """Weights of this stage, named by layer."""
    layers = enumerate(engine.module.forward_funcs, start=engine.module._local_start)
    return {f"{i}.{name}": value.clone() for i, layer in layers for name, value in layer.state_dict().items()}


def hub_name(name: str) -> str | None:
    """``model.layers.2.dense.weight`` is the weight of the third f."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.dense\.(\w+)", name)
    return f"{match[1]}.f.0.{match[2]}" if match else None


def make_hub_folders(root: Path) -> State:
    """The same weights as a Hugging Face folder: whole, in parts, and pickled; and one with a wrong shape."""
    generator = torch.Generator().manual_seed(3)
    widths = [12, 16, 16, 16, 16]
    state = {"model.pooler.weight": torch.ones(2)}
    for i in range(4):
        state[f"model.layers.{i}.dense.weight"] = torch.randn(widths[i + 1], widths[i], generator=generator)
        state[f"model.layers.{i}.dense.bias"] = torch.randn(16, generator=generator).half()
    for name in ("whole", "parts", "pickled", "wrong", "lacking"):
        (root / name).mkdir(parents=True)
    save_file(state, root / "whole/model.safetensors")
    names = sorted(state)
    weight_map = {}
    for part, own in enumerate((names[:4], names[4:])):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: state[name] for name in own}, root / "parts" / file)
        weight_map |= dict.fromkeys(own, file)
    (root / "parts/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save(state, root / "pickled/pytorch_model.bin")
    save_file({**state, "model.layers.3.dense.bias": torch.zeros(15)}, root / "wrong/model.safetensors")
    save_file({n: v for n, v in state.items() if "layers.2" not in n}, root / "lacking/model.safetensors")
    return state


def journeys(root: str) -> dict[str, Any]:
    """Worker on two stages: everything that this file looks at."""
    path, result = Path(root), {}
    bp = twin(2)
    bp.save_checkpoint(str(path / "bp"))
    result["twin"] = weights_of(bp)
    engine = make_engine("mlp")
    result["before"] = weights_of(engine)
    result["report"] = ds_al.load_weights(engine, path / "bp")
    result["from twin"] = weights_of(engine)
    engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))
    engine.save_checkpoint(str(path / "al"))
    result["al"] = weights_of(engine)
    other = twin(2)
    result["back, strict"] = refused(lambda: ds_al.load_weights(other, path / "al"))
    ds_al.load_weights(other, path / "al", strict=False)
    result["back"] = weights_of(other)

    hub = path / "hub"
    if engine.stage_id == 0:
        make_hub_folders(hub)
    engine.gather(None)
    for name in ("whole", "parts", "pickled"):
        engine = make_engine("mlp")
        ds_al.load_weights(engine, hub / name, names=hub_name)
        result[name] = weights_of(engine)
    prefixes = {f"model.layers.{i}.dense.": f"{i}.f.0." for i in range(4)}
    ds_al.load_weights(make := make_engine("mlp"), hub / "whole/model.safetensors", names=prefixes)
    result["prefixes"] = weights_of(make)

    before = weights_of(engine)
    result["messages"] = {
        "wrong": refused(lambda: ds_al.load_weights(engine, hub / "wrong", names=hub_name)),
        "lacking": refused(lambda: ds_al.load_weights(engine, hub / "lacking", names=hub_name)),
        "no names": refused(lambda: ds_al.load_weights(engine, hub / "whole")),
        "no place": refused(lambda: ds_al.load_weights(engine, hub / "whole", names={"model.pooler.": "9.f."})),
        "nothing": refused(lambda: ds_al.load_weights(engine, hub)),
        "no pipeline": refused(lambda: ds_al.load_weights(nn.Linear(1, 1), hub)),
    }
    engine.gather(None)
    if engine.stage_id == 0:
        damaged = next((path / "bp").glob("*/layer_01-model_states.pt"))
        damaged.write_bytes(damaged.read_bytes()[:200])
    engine.gather(None)
    result["messages"]["damaged"] = refused(lambda: ds_al.load_weights(engine, path / "bp"))
    result["unchanged"] = all(torch.equal(value, before[name]) for name, value in weights_of(engine).items())
    return result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what both ranks have seen."""
    root = tmp_path_factory.mktemp("weights")
    return root, run_ranks(f"{__name__}:journeys", 2, root=str(root))


def same(one: State, two: State) -> bool:
    """Whether two states have the same names and bits."""
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def chain(state: State) -> State:
    """Every f of an AL network, named as in the twin."""
    return {name.replace(".f.", ".", 1): value for name, value in state.items() if name.split(".")[1] == "f"}


def test_a_twin_trained_by_deepspeed_becomes_the_f_of_the_al_form(done: tuple[Path, list[dict[str, Any]]]) -> None:
    _, ranks = done
    bp, al, before = (merge([rank[key] for rank in ranks]) for key in ("twin", "from twin", "before"))
    assert same(chain(al), {name: value for name, value in bp.items() if not name.startswith("4.")})
    rest = {name for name in al if name.split(".")[1] != "f"}
    assert all(torch.equal(al[name], before[name]) for name in rest)
    assert ranks[0]["report"].unused == ["4.weight", "4.bias"]  # the head
    assert sorted(name for rank in ranks for name in rank["report"].missing) == sorted(rest)


def test_the_chain_of_f_goes_back_into_the_twin(done: tuple[Path, list[dict[str, Any]]]) -> None:
    _, ranks = done
    al, back, bp = (merge([rank[key] for rank in ranks]) for key in ("al", "back", "twin"))
    assert same(chain(al), {name: value for name, value in back.items() if not name.startswith("4.")})
    assert torch.equal(back["4.weight"], bp["4.weight"])
    assert all(
        "layer 4: " in rank["back, strict"] and "nothing for '4.weight'" in rank["back, strict"] for rank in ranks
    )


def test_a_hugging_face_checkpoint_goes_into_f_by_names(
    done: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    _, ranks = done
    state = make_hub_folders(tmp_path)
    for kind in ("whole", "parts", "pickled", "prefixes"):
        got = merge([rank[kind] for rank in ranks])
        for i in range(4):
            assert torch.equal(got[f"{i}.f.0.weight"], state[f"model.layers.{i}.dense.weight"]), kind
            assert torch.equal(got[f"{i}.f.0.bias"], state[f"model.layers.{i}.dense.bias"].float()), kind


def test_what_does_not_fit_is_named_on_all_ranks_and_changes_nothing(done: tuple[Path, list[dict[str, Any]]]) -> None:
    _, ranks = done
    for rank in ranks:
        messages = rank["messages"]
        assert "layer 3: 'model.layers.3.dense.bias'" in messages["wrong"]
        assert "has shape [15], '3.f.0.bias' here [16]" in messages["wrong"]
        assert "layer 2: " in messages["lacking"] and "has nothing for '2.f.0." in messages["lacking"]
        assert "layer 0: " in messages["no names"] and "Give names=" in messages["no names"]
        assert "is to become '9.f.weight'" in messages["no place"] and "0..3" in messages["no place"]
        assert "no weights in" in messages["nothing"] and "layer_XX-model_states.pt" in messages["nothing"]
        assert "got a Linear" in messages["no pipeline"]
        assert "file 'layer_01-model_states.pt'" in messages["damaged"] and "is cut" in messages["damaged"]
        assert rank["unchanged"]


def test_all_weights_in_one_file(done: tuple[Path, list[dict[str, Any]]], tmp_path: Path, capsys: Any) -> None:
    root, ranks = done
    al = merge([rank["al"] for rank in ranks])
    assert main(["consolidate", str(root / "al"), str(tmp_path / "all.safetensors")]) == 0
    assert same(load_file(tmp_path / "all.safetensors"), al)
    tag = (root / "al/latest").read_text()
    assert main(["consolidate", str(root / "al" / tag), str(tmp_path / "f.safetensors"), "--backprop"]) == 0
    blocks = nn.Sequential(Block(12, 16), *(Block(16, 16) for _ in range(3)))
    blocks.load_state_dict(load_file(tmp_path / "f.safetensors"))
    assert same(blocks.state_dict(), chain(al))
    capsys.readouterr()
    assert main(["consolidate", str(tmp_path), str(tmp_path / "none")]) == 1
    assert "expected a file 'latest'" in capsys.readouterr().err
    assert main(["consolidate", str(root / "bp"), str(tmp_path / "none")]) == 1
    assert "saved by DeepSpeed's own engine" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
