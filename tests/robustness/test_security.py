"""Files of others: nothing of them is run, no path of theirs leads out of a folder, and whatever is in them ends in our
errors. A fuzz of configs and of a checkpoint, drawn from one seed."""

from __future__ import annotations

import ast
import copy
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_al.checkpoint.folder import hash_file, layer_weights, opened, read_client_state, write_index
from ds_al.checkpoint.own import INDEX
from ds_al.config.settings import Settings
from ds_al.data import cache
from ds_al.errors import ALCheckpointError, ALConfigError
from ds_al.optim import names, schedules
from tests.support.ranks import ROOT
from tests.support.robustness import Kind

KINDS = [
    Kind(
        section="Checkpoints and files",
        name="files with code in them: checkpoints, weights, caches, traces",
        outcome="refused",
        what="Nothing that is read is unpickled, but for messages between the processes of a job.",
        tests=(
            "tests/robustness/test_security.py::test_nothing_that_is_loaded_is_unpickled_or_evaluated",
            "tests/robustness/test_security.py::test_code_in_a_file_is_not_run",
        ),
    ),
    Kind(
        section="Checkpoints and files",
        name="a config, or the index of a checkpoint, with anything anywhere",
        outcome="refused",
        what="The error is ours and names the place; hundreds of drawn changes end in it, or are honoured.",
        tests=(
            "tests/robustness/test_security.py::test_any_config_is_honoured_or_refused_by_our_error",
            "tests/robustness/test_security.py::test_any_index_is_honoured_or_refused_by_our_error",
        ),
    ),
]

# ---- what runs code -----------------------------------------------------------------------------------

OWN_PROCESSES = {"ds_al/launch/ranks.py": {"pickle.loads"}}
"""Arguments and results of ranks, in a temporary folder of the process that starts them."""
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen"),
}
ONLY_WITH = {"torch.load": ("weights_only", True)}
NEVER_WITH = {"np.load": ("allow_pickle", True), "numpy.load": ("allow_pickle", True)}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """File, dotted name and node of every call in the package and the scripts."""
    for folder in ("ds_al", "run", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield str(path.relative_to(ROOT)), ast.unparse(node.func), node


def given(node: ast.Call, name: str) -> Any:
    return next((ast.unparse(each.value) for each in node.keywords if each.arg == name), None)


def test_nothing_that_is_loaded_is_unpickled_or_evaluated() -> None:
    found = []
    for path, name, node in calls():
        if name in FORBIDDEN - OWN_PROCESSES.get(path, set()):
            found.append((path, node.lineno, name))
        if name in ONLY_WITH and given(node, ONLY_WITH[name][0]) != str(ONLY_WITH[name][1]):
            found.append((path, node.lineno, name))
        if name in NEVER_WITH and given(node, NEVER_WITH[name][0]) not in (None, "False"):
            found.append((path, node.lineno, name))
        if given(node, "shell") == "True" or given(node, "trust_remote_code") == "True":
            found.append((path, node.lineno, name))
    assert found == []


def test_no_module_hides_what_unpickles_behind_another_name() -> None:
    hidden = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}
    found = []
    for path in sorted((ROOT / "ds_al").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in hidden:
                found.append((path.name, node.module))
            if isinstance(node, ast.Import):
                found += [(path.name, each.name) for each in node.names if each.name in hidden]
    assert found == [("ranks.py", "pickle")]


class Marks:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "was run"
    torch.save({"note": Marks(mark)}, tmp_path / "client_state.pt")
    with pytest.raises(ALCheckpointError, match="does not read"):
        read_client_state(tmp_path / "client_state.pt")
    torch.save({"note": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "older.pt", "w") as archive:
        archive.add(tmp_path / "old.pt")
    for name in ("old.pt", "older.pt"):
        with pytest.raises(ALCheckpointError, match=r"no archive of torch\.save"):
            read_client_state(tmp_path / name)
    np.savez(tmp_path / "tokens-1.npz", ids=np.array([Marks(mark)], dtype=object))
    arrays = cache.kept(tmp_path, "tokens-1", lambda: {"ids": np.arange(3)})
    assert arrays["ids"].tolist() == [0, 1, 2] and "is made anew: ValueError" in capsys.readouterr().err
    assert not mark.exists()


# ---- fuzz ---------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "pipeline": {"activation_checkpoint_interval": 1},
    "associated_learning": {
        "method": "streaming",
        "queue_depth": 2,
        "steps_per_batch": 1,
        "layer_gradient_clipping": 0.5,
        "autoencoder_optimizer": {"type": "MuonAdamW", "params": {"lr": 0.1}},
        "compile": {"functions": ["f"]},
        "trace": {"batches": [1, 2]},
        "link": {"delay_ms": 1.0},
        "repartition": {"every": 5},
        "unused_parameters": ["0.f.*"],
    },
}
ANYTHING: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**63, 2**200, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "auto", "x" * 500),
    *("../..", "/etc/passwd", "\0", "ünïcödé ", "<script>", "{}", "true", "1", [], {}, [[]], {"": {}}, [None, {}]),
    *({"type": "AdamW"}, {"$tensor": "x"}, {"$tuple": 3}, {"type": {"type": 1}}, ["f", "f"], [1, 2, 3], "MuonAdamW"),
]


def changed(value: Any, draw: random.Random) -> Any:
    """A copy in which one to three places hold something else, lack, or have a new neighbour."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = list(containers(value))
        container = draw.choice(places)
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        what = draw.choice(("replace", "replace", "remove", "add")) if keys else "add"
        if what == "add" and isinstance(container, dict):
            container[draw.choice(("", "type", "params", "lr", "$tensor", "enabled", "x y", "layers"))] = _any(draw)
        elif what == "add":
            container.append(_any(draw))
        elif what == "remove":
            del container[draw.choice(keys)]
        else:
            container[draw.choice(keys)] = _any(draw)
    return value


def _any(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(ANYTHING))


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


@pytest.mark.parametrize("start", range(0, 1500, 300))
def test_any_config_is_honoured_or_refused_by_our_error(start: int) -> None:
    honoured = 0
    for number in range(start, start + 300):
        config = changed(CONFIG, random.Random(number))
        try:
            settings = Settings.of(config, is_al=True)
            names.check(config, settings.al)
            schedules.check(config)
            honoured += 1
        except ALConfigError:
            pass
        except Exception as error:
            pytest.fail(f"example {number}: {type(error).__name__}: {error}; {json.dumps(config)}")
    assert honoured < 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a former release."""
    root = tmp_path_factory.mktemp("saved")
    with tarfile.open(ROOT / "tests/checkpoint/saved_by_0_1_0.tar.gz") as archive:
        archive.extractall(root, filter="data")
    return next(root.rglob(INDEX)).parent


def test_any_index_is_honoured_or_refused_by_our_error(checkpoint: Path, tmp_path: Path) -> None:
    """With the right hash of what it holds."""
    index = json.loads((checkpoint / INDEX).read_text())
    del index["blake2b"]
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for number in range(150):
        write_index(tmp_path, changed(index, random.Random(number)))
        _opens_or_refuses(tmp_path, number)


def test_any_bytes_are_honoured_or_refused_by_our_error(checkpoint: Path, tmp_path: Path) -> None:
    """Of the index, and of a file of weights whose hash is in the index."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads((tmp_path / INDEX).read_text())
    del index["blake2b"]
    record = index["layers"][0]["files"]["model_states"]
    weights, text = tmp_path / record["file"], (tmp_path / INDEX).read_bytes()
    content = weights.read_bytes()
    for number in range(100):
        draw = random.Random(number)
        (tmp_path / INDEX).write_bytes(_damaged(text, draw))
        _opens_or_refuses(tmp_path, number)
        weights.write_bytes(_damaged(content, draw))
        record |= {"bytes": weights.stat().st_size, "blake2b": hash_file(weights)}
        write_index(tmp_path, index)
        _opens_or_refuses(tmp_path, number)
    weights.write_bytes(content)


def _damaged(content: bytes, draw: random.Random) -> bytes:
    file = io.BytesIO(content)
    for _ in range(draw.randint(1, 4)):
        file.seek(draw.randrange(min(len(content), draw.choice((16, 400, len(content))))))
        file.write(bytes([draw.randrange(256)]))
    return file.getvalue()[: draw.choice((len(content), len(content), draw.randrange(len(content))))]


def _opens_or_refuses(folder: Path, number: int) -> None:
    try:
        layer_weights(*opened(folder))
    except ALCheckpointError:
        pass
    except Exception as error:
        pytest.fail(f"example {number}: {type(error).__name__}: {error}")
