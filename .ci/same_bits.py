"""Hashes of what training leaves behind, to tell whether a change of the code has changed a single bit.

    python .ci/same_bits.py hash OUT.json           trains every case on the tree of the current directory
    python .ci/same_bits.py compare A.json B.json   names what differs; exit code 1 if anything does
    python .ci/same_bits.py against COMMIT          both, for COMMIT in a worktree of its own and for this tree
    python .ci/same_bits.py load FOLDER             a checkpoint of another tree, on one stage and on two, trained on

``--only TEXT`` takes the cases whose name holds TEXT. One script serves trees whose modules lie in different places.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path.cwd().resolve()
sys.path.insert(0, str(ROOT))  # ranks take over the path
SEED, MICRO_BATCHES = 7, 4
Case = dict[str, Any]
Hashes = dict[str, str]

METHODS = ("streaming", "forward_first", "parallel_backward", "sequential")
PARTS: dict[str, dict[str, Any]] = {
    "adamw": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "momentum": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
    "autoencoder_sgd": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "muon": {"type": "MuonAdamW", "params": {"lr": 0.02, "weight_decay": 0.01, "adamw_lr": 3e-3}},
    "adagrad": {"type": "Adagrad", "params": {"lr": 0.01}},
    "warm_up": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 15}},
}
EXACT = [
    *(f"method={method} queue_depth={depth}" for method, depth in product(METHODS, (1, 2, 4))),
    *(f"method={method} steps_per_batch={steps}" for method, steps in zip(METHODS, (1, 2, 2, 1), strict=True)),
    "method=streaming queue_depth=4 receive_slots=5",
    "method=streaming queue_depth=2 optimizer=momentum",
    "method=streaming layer_gradient_clipping=0.05",
    "method=streaming autoencoder_optimizer=autoencoder_sgd",
    "method=streaming optimizer=muon steps_per_batch=2 layer_gradient_clipping=0.05",
    "method=streaming optimizer=muon autoencoder_optimizer=adamw",
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "contrast": {"name": "contrast", "temperature": 0.2, "learned_temperature": True, "label_smoothing": 0.1},
    "decoded": {"name": "decoded", "refresh_every": 3},
    "decoded, frozen": {"name": "decoded", "refresh_every": 7, "own_decoder": "frozen", "label_smoothing": 0.2},
    "greedy": {"name": "greedy", "label_smoothing": 0.1},
}
SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"in_shape": (12,), "widths": (16,) * 4, "bridge_hidden": 8, "code_width": 6, "dropout": 0.2},
    "transformer": {"vocab_size": 20, "width": 8, "heads": 2, "feed_forward": 12, "code_width": 6, "dropout": 0.2},
}
BF16, ZERO = "bf16.enabled=true", " zero_optimization.stage=1"
PRECISION = [
    f"{BF16} method=streaming",
    f"{BF16} method=sequential steps_per_batch=2",
    f"{BF16} method=forward_first layer_gradient_clipping=0.05",
    f"{BF16} method=streaming pipeline.activation_checkpoint_interval=1",
    f"{BF16} bf16.check_grad_overflow=false method=streaming optimizer=muon",
    "fp16.enabled=true fp16.initial_scale_power=4 method=parallel_backward steps_per_batch=2",
]
REPLICAS = ["method=streaming", "method=sequential", f"{BF16} steps_per_batch=2", "optimizer=adagrad", "optimizer=muon"]
SAVED = {"mlp": "scheduler=warm_up method=streaming", "vgg": BF16, "transformer": "optimizer=muon steps_per_batch=2"}
MODULES = ["ds_al.launch.ranks", "ds_al.launch", "ds_al.optim.masters", "ds_al.precision", "ds_al.models"]
MODULES += ["tests.support.networks", "tests.networks"]


def find(name: str) -> Any:
    """What is not public, from the module where this tree has it."""
    for module in MODULES:
        with suppress(ModuleNotFoundError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"{name} is in none of {', '.join(MODULES)}")


def case(family: str, network: str, ranks: int, text: str, batches: int, **more: Any) -> Case:
    """One training. ``text`` has entries of the block "associated_learning", and with a dot those of other blocks."""
    blocks: dict[str, dict[str, Any]] = {"": {"optimizer": PARTS["adamw"]}}
    for word in text.split():
        path, value = word.split("=")
        block, _, key = path.rpartition(".")
        blocks.setdefault(block, {})[key] = PARTS.get(value) or (value if value in METHODS else json.loads(value))
    al = blocks.pop("")
    config: dict[str, Any] = {key: al.pop(key) for key in ("optimizer", "scheduler") if key in al}
    config |= {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": MICRO_BATCHES}
    config |= {"steps_per_print": None, "associated_learning": al, **blocks}
    name = f"{family}/{network}/P={more.get('stages', ranks)}/{text}"
    return {"name": name, "network": network, "ranks": ranks, "batches": batches, "config": config, **more}


def all_cases() -> list[Case]:
    """Every case."""
    sizes = {name: len(network.layers()) for name, network in find("NETWORKS").items()}
    every = product(sizes, (1, 2, 3, 4), EXACT)
    cases = [case("exact", name, stages, text, 6) for name, stages, text in every if stages <= sizes[name]]
    for name, network, ranks, text in product(OBJECTIVES, SIZES, (1, 2), [*(f"method={m}" for m in METHODS), BF16]):
        cases.append(case(f"objective {name}", network, ranks, text, 5, objective=OBJECTIVES[name]))
    every = product(("mlp", "vgg", "transformer"), (1, 2), PRECISION)
    cases += [case("precision", name, ranks, text, 3) for name, ranks, text in every]
    cases += [case("replicas", "mlp", 4, text + zero, 3, stages=2) for zero in ("", ZERO) for text in REPLICAS]
    return cases + [case("checkpoint", name, 2, text, 3, save=name) for name, text in SAVED.items()]


def trained(cases: list[Case], folder: str) -> list[Hashes]:
    """Worker: trains case after case; hashes of all that this rank has then."""
    from deepspeed.accelerator import get_accelerator

    import ds_al

    assert Path(ds_al.__file__).resolve().is_relative_to(ROOT), f"ds_al comes from {ds_al.__file__}"
    get_accelerator().is_fp16_supported = lambda: True  # torch has it on any CPU
    results = []
    for case in cases:
        print("case", case["name"], flush=True)
        seed_generators()
        network, stages = find("NETWORKS")[case["network"]], case.get("stages", case["ranks"])
        layers = network.layers()
        if objective := case.get("objective"):
            layers = find("build_al")(case["network"], num_classes=4, objective=objective, **SIZES[case["network"]])
        module = ds_al.ALPipelineModule(layers, num_classes=4, base_seed=SEED, num_stages=stages)
        engine, *_ = ds_al.initialize(model=module, config=json.loads(json.dumps(case["config"])))
        copy, copies = engine.grid.get_data_parallel_id(), engine.grid.get_data_parallel_world_size()
        found: Hashes = {}
        if "load" in case:
            engine.load_checkpoint(f"{folder}/{case['load']}")
            found |= {f"loaded/{name}": value for name, value in hashes_of(engine).items()}
        begin, count = (case.get(key, 0) * MICRO_BATCHES * copies for key in ("skip", "batches"))
        mine = iter(network.batches(begin + count)[begin + copy :: copies])
        losses = [engine.train_batch(mine).clone() for _ in range(case["batches"])]
        found |= {**hashes_of(engine), f"stage {engine.stage_id}/losses": digest(losses)}
        x, stage = network.batches(1, seed=5)[0][0], f"stage {engine.stage_id}"
        found |= {f"{stage}/exit {n}": digest(engine.predict(x, exit=n)) for n in (range(1, 5) if objective else ())}
        if case.get("save"):
            engine.save_checkpoint(f"{folder}/{case['save']}")
        engine.flush()
        results.append({f"copy {copy}/{key}": value for key, value in found.items()} if copies > 1 else found)
    return results


def seed_generators() -> None:
    """Seeds the generators of the process, whose states a checkpoint holds."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def hashes_of(engine: Any) -> Hashes:
    """Weights, buffers, masters and optimizer state of this stage, and its counters. All copies of it call this."""
    states, masters = engine.optimizer.gather()
    found = {f"stage {engine.stage_id}/{n}": digest(getattr(engine, n)) for n in ("global_steps", "global_samples")}
    for index, layer in engine.module.local_layers:
        values: dict[str, Any] = {**dict(layer.named_buffers()), **layer.state_dict()}
        for name, parameter in layer.named_parameters():
            values |= {f"{name}/master": masters[parameter]} if parameter in masters else {}
            values |= {f"{name}/{key}": value for key, value in states.get(find("stepped")(parameter), {}).items()}
        found |= {f"{index}.{name}": digest(value) for name, value in values.items()}
    return found


def of_checkpoint(root: Path) -> Hashes:
    """Every tensor in its files, and the index, whose digests of these files repeat, too."""
    from safetensors.torch import load_file

    folder = root / (root / "latest").read_text().strip()
    index = json.loads((folder / "index.json").read_text())
    del index["versions"], index["blake2b"]
    found = {f"saved/index.json/{key}": digest(value) for key, value in index.items()}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"saved/{path.name}/{name}": digest(value) for name, value in load_file(path).items()}
    return found


def digest(value: Any) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, or of plain values and lists of tensors."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {list(value.shape)} ".encode() + raw).hexdigest()
    value = [digest(item) for item in value] if isinstance(value, (list, tuple)) else value
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run(cases: list[Case], folder: Path) -> dict[str, Hashes]:
    """Trains cases, many on the same ranks. What was saved is loaded on one rank, and trained on."""
    target, results = f"{Path(__file__).stem}:trained", {}
    for ranks, network in sorted({(each["ranks"], each["network"]) for each in cases}):
        group = [each for each in cases if (each["ranks"], each["network"]) == (ranks, network)]
        by_rank = find("run_ranks")(target, ranks, timeout=600.0, cases=group, folder=str(folder))
        for each, *found in zip(group, *by_rank, strict=True):
            hashes = results[each["name"]] = {key: value for rank in found for key, value in rank.items()}
            assert len(hashes) == sum(map(len, found)), f"{each['name']}: ranks have keys in common"
            if name := each.get("save"):
                then = {**each, "ranks": 1, "save": None, "load": name, "skip": each["batches"], "batches": 1}
                (later,) = run([then], folder).values()
                hashes |= {**of_checkpoint(folder / name), **{f"then/{k}": v for k, v in later.items()}}
        print(f"{len(results)} of {len(cases)} cases", file=sys.stderr, flush=True)
    return results


def compare(one: dict[str, Hashes], two: dict[str, Hashes], *, only: str = "") -> int:
    """Prints what differs; 1 if anything does, or there is nothing to compare."""
    same = wrong = 0
    for name in sorted(name for name in one.keys() | two.keys() if only in name):
        a, b = one.get(name, {}), two.get(name, {})
        both = sorted(a.keys() & b.keys())
        bad = [f"{key}: differs" for key in both if a[key] != b[key]]
        bad += [f"{key}: missing in the {'second' if key in a else 'first'}" for key in sorted(a.keys() ^ b.keys())]
        bad = bad if both else [f"nothing to compare: {len(a)} keys in the first, {len(b)} in the second"]
        print("\n    ".join([f"{name}: {len(both)} keys", *bad]))
        same, wrong = same + len(both), wrong + bool(bad)
    print(f"{same} keys compared; {wrong} cases differ")
    return int(wrong > 0 or same == 0)


def against(commit: str, only: str) -> int:
    """Compares a commit with this tree."""
    with tempfile.TemporaryDirectory() as folder:
        tree, outs = Path(folder, "tree"), [Path(folder, "there.json"), Path(folder, "here.json")]
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], check=True)
        try:
            for root, out in zip((tree, ROOT), outs, strict=True):
                command = [sys.executable, str(Path(__file__).resolve()), "hash", str(out), "--only", only]
                subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
        return compare(*(json.loads(out.read_text()) for out in outs), only=only)


def load(folder: Path) -> int:
    """Compares what comes out of a checkpoint, by layer, with the file expected.json beside it."""
    cases = [case("loaded", "mlp", ranks, "method=streaming", 1, load=".", skip=6) for ranks in (1, 2)]
    expected = json.loads((folder / "expected.json").read_text())
    found = {name: {k: v for k, v in each.items() if "stage" not in k} for name, each in run(cases, folder).items()}
    return compare(dict.fromkeys(found, expected), found)


def main() -> int:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["hash", "compare", "against", "load"])
    parser.add_argument("what", nargs="+")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.command == "compare":
        return compare(*(json.loads(Path(path).read_text()) for path in args.what), only=args.only)
    if args.command == "against":
        return against(args.what[0], args.only)
    find("start_quickly")()
    if args.command == "load":
        return load(Path(args.what[0]))
    with tempfile.TemporaryDirectory() as folder:
        found = run([each for each in all_cases() if args.only in each["name"]], Path(folder))
    Path(args.what[0]).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
