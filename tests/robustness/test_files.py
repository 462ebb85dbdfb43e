"""Numbers that are not finite, checkpoints and other files, and W&B: what may be there, and what happens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ds_al
from ds_al.checkpoint import writer
from ds_al.checkpoint.folder import hash_file, write_index
from ds_al.checkpoint.own import INDEX, LATEST
from ds_al.launch.ranks import run_ranks
from ds_al.layer import ALLayer
from ds_al.optim.local import LocalOptimizer
from ds_al.stage import LocalStage
from ds_al.system import secrets
from tests.checkpoint.test_checkpoint import refused
from tests.support.engines import different, engine_state, make_engine
from tests.support.networks import NETWORKS
from tests.support.robustness import Case, Kind, by_name, meet

KINDS = [
    Kind(
        section="Checkpoints and files",
        name="a checkpoint that is cut, foreign, planted or mixed up, whatever its hashes",
        outcome="refused",
        what="All ranks read and check everything, and exchange what they found, before any of them changes.",
        tests=(
            "tests/robustness/test_files.py::test_a_planted_checkpoint_is_refused_on_all_ranks",
            "tests/checkpoint/test_checkpoint.py::test_a_damaged_checkpoint_is_named_on_all_ranks_and_changes_nothing",
        ),
    ),
    Kind(
        section="Checkpoints and files",
        name="a tag that is empty, leads elsewhere, or names a folder of the user's",
        outcome="refused",
        what="The save is refused on all ranks before anything is written; ds_al removes its own files alone.",
        tests=(
            "tests/robustness/test_files.py::test_a_tag_names_a_folder_of_its_own",
            "tests/robustness/test_files.py::test_files_of_the_user_are_never_removed",
        ),
    ),
    Kind(
        section="Checkpoints and files",
        name="weights that are NaN or infinite at a save",
        outcome="refused",
        what="The save names layer and weight on all ranks, asynchronous or not, and the checkpoint before it stays.",
        tests=("tests/robustness/test_files.py::test_weights_that_are_not_finite_are_not_saved",),
    ),
    Kind(
        section="Checkpoints and files",
        name="a disk that is full, a folder that is removed while a checkpoint is written",
        outcome="refused",
        what="Every rank raises in the save, or in the next save or `flush()` of an asynchronous one; the checkpoint "
        "before it stays, and later saves work.",
        tests=(
            "tests/robustness/test_files.py::test_a_full_disk_is_told_on_all_ranks_and_leaves_the_checkpoint_before",
            "tests/robustness/test_files.py::test_a_folder_that_is_removed_meanwhile_is_told",
        ),
    ),
    Kind(
        section="Checkpoints and files",
        name="files for `load_weights` that are cut, planted, foreign, or hold NaN",
        outcome="refused",
        what="All ranks raise, and no weight is changed.",
        tests=("tests/robustness/test_files.py::test_files_of_weights",),
    ),
    Kind(
        section="Numbers",
        name="a loss, output, gradient or weight that is NaN or infinite",
        outcome="refused",
        what="An `ALLayerError` names stage, AL layer, micro-batch, function and weight: on a CPU in that step, before "
        "the output leaves and before the step is applied; on a GPU, and for a weight that shows in none of these, at "
        "most 8 micro-batches later.",
        tests=(
            "tests/robustness/test_files.py::test_numbers_that_are_not_finite",
            "tests/test_stage.py::test_the_host_waits_for_the_numbers_of_eight_micro_batches_before",
        ),
    ),
    Kind(
        section="Weights & Biases",
        name="`WANDB_*` variables, `wandb/settings`, `wandb offline`, `wandb disabled`",
        outcome="honoured",
        what="A key of the config wins over them, and they win over the defaults; a mode holds in any case.",
        tests=(
            "tests/experiment/test_wandb_run.py::test_wandb_offline_and_disabled_hold",
            "tests/experiment/test_wandb_run.py::test_variables_win_over_defaults_and_the_config_over_variables",
            "tests/experiment/test_wandb_run.py::test_the_folder_of_wandb_dir_is_honoured",
        ),
    ),
    Kind(
        section="Weights & Biases",
        name="hyperparameters, rows while an epoch lasts, steps of an epoch that is cut",
        outcome="honoured",
        what="The W&B config holds all settings; every `experiment.log_every` batches a row is logged, by layer and by "
        "stage, for the twin, too; steps are numbers of batches.",
        tests=(
            "tests/experiment/test_train.py::test_wandb_run_is_kept_offline_with_its_config_names_and_summary",
            "tests/experiment/test_wandb_run.py::test_rows_are_logged_as_they_happen_at_their_batch",
        ),
    ),
    Kind(
        section="Weights & Biases",
        name="keys and tokens in a config, on the command line, or in the environment",
        outcome="honoured",
        what="They are used, and left out of config.json, metrics, summary, W&B files and reports.",
        tests=(
            "tests/robustness/test_files.py::test_secrets_stay_out_of_texts",
            "tests/robustness/test_files.py::test_names_of_settings_are_kept",
            "tests/experiment/test_wandb_run.py::test_no_secret_reaches_the_folder_of_a_run",
            "tests/report/test_page.py::test_no_secret_of_an_older_run_is_shown",
        ),
    ),
    Kind(
        section="Numbers",
        name="infinite entries of a mask that travels beside the activations",
        outcome="honoured",
        what="They pass; NaN does not.",
        tests=("tests/robustness/test_files.py::test_a_mask_may_hold_infinite_numbers",),
    ),
]

# ---- numbers ---------------------------------------------------------------------------------------

PLANTED_AT = 8
"""The micro-batch at which a number is planted: one in which weights are looked at, too."""


def planted(place: str, layer: int, value: str) -> Case:
    """A number planted in a weight, a gradient, an output or a loss of one function."""
    what, _, function = place.partition(".")
    named = {
        "weight": rf"weight {function}\.(0\.)?weight holds {value}",
        "gradient": rf"the gradient of {function}\.(0\.)?weight holds {value}",
        "output": f"the output of {function} holds {value}",
        "loss": f"the {'associated' if function == 'b' else 'autoencoder'} loss is {value}",
    }
    message = rf"stage 3, AL layer Block, micro-batch {PLANTED_AT}, function {function}: {named[what]}"
    return Case(
        name=f"{value} in {place} of layer {layer}", given=(what, function, layer, float(value)), message=message
    )


NUMBERS = [
    *(planted(f"weight.{f}", layer, value) for f in "fbgh" for layer in (0, 2) for value in ("nan", "inf", "-inf")),
    *(planted(f"gradient.{f}", layer, value) for f in "fbgh" for layer in (0, 2) for value in ("nan", "inf")),
    *(planted(f"output.{f}", layer, value) for f in "fg" for layer in (0, 2) for value in ("nan", "inf", "-inf")),
    *(planted(f"loss.{f}", layer, value) for f in "bh" for layer in (0, 2) for value in ("nan", "inf")),
]


@by_name(NUMBERS)
def test_numbers_that_are_not_finite(case: Case) -> None:
    what, function, index, value = case.given
    layers = NETWORKS["mlp"].build(7)[:3]
    stage = LocalStage(list(enumerate(layers)), stage_id=3, base_seed=7, device=torch.device("cpu"))
    optimizer = LocalOptimizer(list(enumerate(layers)), associated=sgd, autoencoder=sgd)
    batches = iter(NETWORKS["mlp"].batches(PLANTED_AT + 1))
    for _ in range(PLANTED_AT):
        step(stage, optimizer, *next(batches))
    plant(layers[index], what, function, value)
    before = {name: weight.clone() for layer in layers for name, weight in named(layer)}
    meet(case, lambda: step(stage, optimizer, *next(batches)))
    assert all(torch.equal(weight, before[name]) for layer in layers for name, weight in named(layer) if finite(weight))


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05)


def step(stage: LocalStage, optimizer: LocalOptimizer, x: Tensor, labels: Tensor) -> None:
    """One micro-batch, as the engine executes it."""
    stage.forward(x, nn.functional.one_hot(labels, 4).float())
    stage.backward(scale=1.0)
    optimizer.step()
    optimizer.zero_grad()


def plant(layer: ALLayer, what: str, function: str, value: float) -> None:
    module = getattr(layer, function)
    weight = next(module.parameters())
    if what == "weight":
        weight.data.view(-1)[3] = value
    elif what == "gradient":
        weight.register_hook(lambda gradient: first_becomes(gradient, value))
    elif what == "output":
        module.register_forward_hook(lambda module, inputs, output: first_becomes(output, value))
    else:
        loss = "associated_loss" if function == "b" else "autoencoder_loss"
        setattr(layer, loss, lambda one, two: (one - two).square().mean() * 0 + value)


def first_becomes(tensor: Tensor, value: float) -> Tensor:
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    mask.view(-1)[0] = True
    return tensor.masked_fill(mask, value)


def named(layer: ALLayer) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"{id(layer)}.{name}", weight) for name, weight in layer.named_parameters())


def finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight).all())


class WithMask(nn.Module):
    """Passes an additive mask along, as blocks of a decoder do."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.linear, self.number = nn.Linear(12, 16), number

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), torch.full((len(x), 3), self.number)


@by_name(
    [
        Case(name="a mask of -inf", given=float("-inf"), message=None),
        Case(name="a mask of NaN", given=float("nan"), message="function f: another part of the output holds nan"),
    ]
)
def test_a_mask_may_hold_infinite_numbers(case: Case) -> None:
    layer = ALLayer(f=WithMask(case.given), b=nn.Linear(16, 6), g=nn.Linear(4, 6), h=nn.Linear(6, 4))
    stage = LocalStage([(0, layer)], stage_id=0, base_seed=7, device=torch.device("cpu"))
    ((x, labels),) = NETWORKS["mlp"].batches(1)
    meet(case, lambda: stage.forward(x, nn.functional.one_hot(labels, 4).float()))


# ---- checkpoints -----------------------------------------------------------------------------------


def reindexed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes an index, and gives it the hash of what it then holds."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        del index["blake2b"]
        change(index)
        write_index(folder, index)

    return edit


def layer(number: int, **changes: Any) -> Callable[[Path], None]:
    return reindexed(lambda index: index["layers"][number].update(changes))


def counters(**changes: Any) -> Callable[[Path], None]:
    return reindexed(lambda index: index["counters"].update(changes))


def refile(file: str) -> Callable[[Path], None]:
    """Lets the index take the weights of layer 1 from another file, whose size and hash are right."""

    def edit(folder: Path) -> None:
        source = folder / file
        if not source.is_file():
            shutil.copy(folder / "layer_01-model_states.safetensors", source)
        record = {"file": file, "bytes": source.stat().st_size, "blake2b": hash_file(source)}
        reindexed(lambda index: index["layers"][1]["files"]["model_states"].update(record))(folder)

    return edit


def linked(file: str) -> Callable[[Path], None]:
    """Puts a link to the same bytes elsewhere in the place of a file."""

    def edit(folder: Path) -> None:
        elsewhere = folder.parents[1] / file
        (folder / file).rename(elsewhere)
        (folder / file).symlink_to(elsewhere)

    return edit


def replaced(owner: tuple[str, int], what: str, write: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Rewrites one file of a layer or a stage, with its size and hash in the index."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        record = index[owner[0]][owner[1]]["files"][what]
        path = folder / record["file"]
        write(path)
        record |= {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
        del index["blake2b"]
        write_index(folder, index)

    return edit


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        values = {name: value.clone() for name, value in load_file(path).items()}
        change(values)
        save_file(values, path)

    return write


def weight(value: float) -> Callable[[Path], None]:
    return replaced(
        ("layers", 2), "model_states", tensors(lambda values: values["f.0.weight"].view(-1)[3:4].fill_(value))
    )


class Code:
    """What a planted pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code of a checkpoint was run",))


def text_of(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Writes a file of the checkpoint, or beside it (``../latest``)."""
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def latest(content: str | bytes) -> Callable[[Path], None]:
    return text_of(f"../{LATEST}", content)


NO_SAVE, NO_TAG, NO_INDEX = "was not written by a save: ", "got the tag ", "is cut or altered: it is no index"
RANDOM_OF_0 = ("stages", 0), "random_states"
LOADS = [
    Case(name="index without layers", given=reindexed(lambda i: i.pop("layers")), message=NO_SAVE + "layers: Field"),
    Case(name="layers empty", given=reindexed(lambda i: i.update(layers=[])), message=r"lists the AL layers \[\]"),
    Case(name="layers a number", given=reindexed(lambda i: i.update(layers=3)), message=NO_SAVE + "layers: "),
    Case(
        name="a layer is missing",
        given=reindexed(lambda i: i["layers"].pop(1)),
        message=r"layers \[0, 2, 3\], expected all of 4",
    ),
    Case(name="a layer twice", given=layer(1, layer=0), message=r"AL layers \[0, 0, 2, 3\]"),
    Case(name="a layer on stage 7", given=layer(1, stage=7), message=r"AL layer 1 is on stage 7, expected 0\.\.1"),
    Case(name="a layer on stage -1", given=layer(1, stage=-1), message=NO_SAVE + r"layers\.1\.stage"),
    Case(
        name="a layer without training states",
        given=reindexed(lambda i: i["layers"][1]["files"].pop("training_states")),
        message="AL layer 1 has no file of training_states",
    ),
    Case(name="modules a list", given=layer(1, modules=[]), message=NO_SAVE + r"layers\.1\.modules"),
    Case(
        name="loss scale of texts",
        given=layer(1, loss_scale={"cur_scale": "x"}),
        message=NO_SAVE + r"layers\.1\.loss_scale",
    ),
    Case(name="schedule a number", given=layer(1, schedule=3), message=NO_SAVE + r"layers\.1\.schedule"),
    Case(name="optimizers a list", given=layer(1, optimizers=[]), message=NO_SAVE + r"layers\.1\.optimizers"),
    Case(
        name="optimizer of another class",
        given=reindexed(lambda i: [r.update({"class": "SGD"}) for x in i["layers"] for r in x["optimizers"].values()]),
        message="state of SGD and SGD, this job trains with AdamW",
    ),
    Case(
        name="a state without its tensor",
        given=reindexed(
            lambda i: i["layers"][1]["optimizers"]["associated"]["state"]["f.0.weight"].update(
                exp_avg={"$tensor": "nothing"}
            )
        ),
        message="holds what no save has written .KeyError",
    ),
    Case(
        name="counters texts",
        given=counters(global_steps="1"),
        message=NO_SAVE + r"counters\.global_steps: Input should be a valid integer",
    ),
    Case(name="a counter true", given=counters(micro_steps=True), message=NO_SAVE + r"counters\.micro_steps"),
    Case(name="a counter 1.5", given=counters(micro_steps=1.5), message=NO_SAVE + r"counters\.micro_steps"),
    Case(name="a counter negative", given=counters(global_samples=-1), message=NO_SAVE + r"counters\.global_samples"),
    Case(
        name="a counter is missing",
        given=reindexed(lambda i: i["counters"].pop("skipped_steps")),
        message=NO_SAVE + r"counters\.skipped_steps",
    ),
    Case(name="stages empty", given=reindexed(lambda i: i.update(stages=[])), message=r"lists the stages \[\]"),
    Case(
        name="three stages of two",
        given=reindexed(lambda i: i.update(num_stages=3)),
        message=r"stages \[0, 1\], expected all of 3",
    ),
    Case(name="base_seed a text", given=reindexed(lambda i: i.update(base_seed="7")), message=NO_SAVE + "base_seed"),
    Case(
        name="data position a text",
        given=reindexed(lambda i: i["stages"][0].update(data_position="x")),
        message=NO_SAVE + r"stages\.0\.data_position",
    ),
    Case(
        name="random state nonsense",
        given=reindexed(lambda i: i["stages"][1].update(random={"torch": 1})),
        message="holds what no save has written",
    ),
    Case(
        name="random state a number",
        given=reindexed(lambda i: i["stages"][0].update(random=1)),
        message=NO_SAVE + r"stages\.0\.random",
    ),
    Case(
        name="random state of another size",
        given=replaced(*RANDOM_OF_0, tensors(lambda v: v.update({"random/torch": torch.zeros(3, dtype=torch.uint8)}))),
        message="holds other tensors than its index says",
    ),
    Case(
        name="random state of zeros",
        given=replaced(*RANDOM_OF_0, tensors(lambda v: v["random/torch"].zero_())),
        message="holds what no save has written .RuntimeError",
    ),
    Case(
        name="client state with code",
        given=replaced(("stages", 0), "client_state", lambda path: torch.save({"note": Code()}, path)),
        message="holds what torch.load.weights_only=True. does not read",
    ),
    Case(
        name="client state a list",
        given=replaced(("stages", 0), "client_state", lambda path: torch.save([1], path)),
        message="is a list, expected a dict",
    ),
    Case(
        name="client state a text file",
        given=replaced(("stages", 0), "client_state", lambda path: path.write_text("note")),
        message="the client_state in .* is cut",
    ),
    Case(
        name="a file outside of the folder",
        given=refile("../layer_01-model_states.safetensors"),
        message=r"AL layer 1 has model_states in '\.\./layer_01",
    ),
    Case(
        name="a link that leads out of the folder",
        given=linked("layer_01-model_states.safetensors"),
        message=r"'layer_01-model_states\.safetensors' of AL layer 1 in .* is a link that leads out of it",
    ),
    Case(
        name="the file of another layer",
        given=refile("layer_02-model_states.safetensors"),
        message=r"AL layer 1 has model_states in 'layer_02",
    ),
    Case(name="NaN in a weight", given=weight(float("nan")), message=r"AL layer 2, weight f\.0\.weight holds nan"),
    Case(name="infinity in a weight", given=weight(float("inf")), message=r"AL layer 2, weight f\.0\.weight holds inf"),
    Case(
        name="weights of another shape",
        given=replaced(("layers", 2), "model_states", tensors(lambda v: v.update({"f.0.weight": torch.zeros(3)}))),
        message="holds other tensors than its index says",
    ),
    Case(
        name="a weight more",
        given=replaced(("layers", 2), "model_states", tensors(lambda v: v.update({"x": torch.zeros(3)}))),
        message="holds other tensors than its index says",
    ),
    Case(
        name="weights a text file",
        given=replaced(("layers", 2), "model_states", lambda path: path.write_text("weights")),
        message="holds what no save has written .SafetensorError",
    ),
    Case(name="index empty", given=text_of(INDEX, ""), message=NO_INDEX),
    Case(name="index binary", given=text_of(INDEX, b"\xff\xfe\x00{"), message=NO_INDEX),
    Case(name="index a list", given=text_of(INDEX, "[1]"), message=NO_INDEX),
    Case(name="index null", given=text_of(INDEX, "null"), message=NO_INDEX),
    Case(name="index nested deep", given=text_of(INDEX, "[" * 100_000), message=NO_INDEX),
    Case(name="index without a hash", given=text_of(INDEX, '{"format": 2}'), message=NO_INDEX),
    Case(name="index with a wrong hash", given=text_of(INDEX, '{"format": 2, "blake2b": "0"}'), message="was altered"),
    Case(
        name="index of format 3",
        given=reindexed(lambda i: i.update(format=3)),
        message="has format 3, this ds_al reads 2",
    ),
    Case(name="index of format '2'", given=reindexed(lambda i: i.update(format="2")), message="has format '2'"),
    Case(name="latest binary", given=latest(b"\xff\xfe\x00"), message=NO_TAG),
    Case(name="latest empty", given=latest(""), message=NO_TAG),
    Case(name="latest a dot", given=latest("."), message=NO_TAG),
    Case(name="latest leads out", given=latest("../good"), message=NO_TAG),
    Case(name="latest leads out in the middle", given=latest("good/../../other"), message=NO_TAG),
    Case(name="latest absolute", given=latest("/etc"), message=NO_TAG),
    Case(name="latest of two lines", given=latest("good\nbad"), message=NO_TAG),
    Case(name="latest very long", given=latest("x" * 5000), message=NO_TAG),
    Case(name="latest of nothing", given=latest("nothing"), message="no checkpoint in .*nothing"),
    Case(name="latest with blanks around", given=latest(" good\n"), message=None),
]


def folder_loads(folder: str) -> dict[str, tuple[str, list[str]]]:
    """Worker: loads each of the checkpoints of :data:`LOADS`; message, and what changed in the engine."""
    root = Path(folder)
    engine = make_engine("mlp")
    engine.train_batch(iter(NETWORKS["mlp"].batches(4)))
    engine.save_checkpoint(str(root / "saved"), tag="good", client_state={"note": "mine"})
    engine.train_batch(iter(NETWORKS["mlp"].batches(4, seed=1)))
    before, counted = engine_state(engine), (engine.global_steps, torch.get_rng_state().sum())
    found = {}
    for number, case in enumerate(LOADS):
        damaged = root / f"damaged{number}" / "saved"
        if engine.stage_id == 0:
            shutil.copytree(root / "saved", damaged)
            case.given(damaged / "good")
        engine.gather(None)
        told = refused(lambda damaged=damaged: engine.load_checkpoint(str(damaged)))
        same = counted == (engine.global_steps, torch.get_rng_state().sum())
        found[case.name] = told, different(before, engine_state(engine)) + ["counters"] * (not same)
        if case.message is None:
            engine.load_checkpoint(str(root / "saved"))
            before, counted = engine_state(engine), (engine.global_steps, torch.get_rng_state().sum())
    return found


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, list[str]]]]:
    return run_ranks(f"{__name__}:folder_loads", 2, folder=str(tmp_path_factory.mktemp("loads")))


@pytest.mark.distributed
@by_name(LOADS)
def test_a_planted_checkpoint_is_refused_on_all_ranks(case: Case, loads: Any) -> None:
    (one, changed), (two, also_changed) = (rank[case.name] for rank in loads)
    assert one == two
    if case.message is None:
        assert one == "loaded"
    else:
        assert re.search(case.message, one), one
        assert (changed, also_changed) == ([], [])


NOT_OURS = "is there, and no checkpoint of ds_al: choose another tag"
TAGS = [
    Case(name="empty", given="", message=NO_TAG),
    Case(name="blank", given=" ", message=NO_TAG),
    Case(name="a dot", given=".", message=NO_TAG),
    Case(name="two dots", given="..", message=NO_TAG),
    Case(name="leads out", given="../outside", message=NO_TAG),
    Case(name="leads out in the middle", given="a/../../outside", message=NO_TAG),
    Case(name="absolute", given="/tmp/outside", message=NO_TAG),
    Case(name="hidden", given=".hidden", message=NO_TAG),
    Case(name="'latest'", given="latest", message=NO_TAG),
    Case(name="'index.json'", given="index.json", message=NO_TAG),
    Case(name="with a line break", given="one\ntwo", message=NO_TAG),
    Case(name="with NUL", given="one\0two", message=NO_TAG),
    Case(name="of 300 letters", given="x" * 300, message=NO_TAG),
    Case(name="of 80 wide letters", given="ü" * 120, message=NO_TAG),
    Case(name="a folder of the user's", given="photos", message=NOT_OURS),
    Case(name="a folder of the user's with an index", given="site", message=NOT_OURS),
    Case(name="a file of the user's", given="notes.txt", message=NOT_OURS),
    Case(name="a link of the user's", given="link", message=NOT_OURS),
    Case(name="a checkpoint with a file of the user's", given="mixed", message=r"also holds 'mine\.md', which a save"),
    Case(name="a word", given="epoch_1", message=None),
    Case(name="the same again", given="epoch_1", message=None),
    Case(name="a number", given=12, message=None),
    Case(name="with blanks and letters of other scripts", given="Lauf 3 – ähnlich", message=None),
    Case(name="a path", given="runs/one", message=None),
    Case(name="a class of glob", given="[ab]*", message=None),
]
USERS = {
    "photos/mine.txt": "1",
    "site/index.json": '{"site": 1}',
    "notes.txt": "2",
    ".vacation-1.part/sea.txt": "3",
    ".vacation.12ab-1.old": "4",
    "mixed/mine.md": "5",
}
"""Files of the user's in the folder of checkpoints."""


def folder_saves(folder: str) -> dict[str, Any]:
    """Worker: saves under each of :data:`TAGS`, beside files of the user's; then weights that are not finite."""
    root = Path(folder)
    engine = make_engine("mlp", checkpoint={"keep_last": 1})
    engine.train_batch(iter(NETWORKS["mlp"].batches(4)))
    engine.save_checkpoint(folder, tag="mixed")
    if engine.stage_id == 0:
        for name, text in USERS.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(text)
        (root / "link").symlink_to("photos")
    engine.gather(None)
    told = {case.name: refused(lambda case=case: engine.save_checkpoint(folder, tag=case.given)) for case in TAGS}
    result: dict[str, Any] = {"told": told}

    engine.save_checkpoint(folder, tag="good")
    saved = engine_state(engine)
    if engine.stage_id == 1:
        engine.layers[0][1].h.weight.data[0, 0] = float("nan")
    result["nan"] = refused(lambda: engine.save_checkpoint(folder, tag="next"))
    result["nan, asynchronous"] = refused(
        lambda: (engine.save_checkpoint(folder, tag="next", asynchronous=True), engine.flush())
    )
    engine.gather(None)
    engine.load_checkpoint(folder)
    result["left"] = different(saved, engine_state(engine))

    write, go = writer.write_tensors, threading.Event()
    writer.write_tensors = lambda path, tensors: write(path, tensors) if go.wait(60) else None
    gone = root.parent / "gone"
    engine.save_checkpoint(str(gone), tag="next", asynchronous=True)
    engine.gather(None)
    if engine.stage_id == 0:
        shutil.rmtree(gone)
    engine.gather(None)
    go.set()
    result["removed"] = refused(engine.flush)
    result["afterwards"] = refused(lambda: engine.save_checkpoint(str(gone), tag="next"))
    return result


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("saves") / "checkpoints"
    return root, run_ranks(f"{__name__}:folder_saves", 2, folder=str(root))


@pytest.mark.distributed
@by_name(TAGS)
def test_a_tag_names_a_folder_of_its_own(case: Case, saves: Any) -> None:
    one, two = (rank["told"][case.name] for rank in saves[1])
    assert one == two
    assert re.search(case.message, one) if case.message else one == "loaded", one


@pytest.mark.distributed
def test_files_of_the_user_are_never_removed(saves: Any) -> None:
    root, _ = saves
    assert {name: (root / name).read_text() for name in USERS} == USERS
    assert (root / "link").is_symlink() and not (root.parent / "outside").exists()
    seen = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    ours = seen - {name.split("/")[0] for name in USERS} - {"link"}
    assert ours == {"good", "runs", LATEST}  # keep_last counts the folders of one level


@pytest.mark.distributed
def test_weights_that_are_not_finite_are_not_saved(saves: Any) -> None:
    """With keep_last 1 a checkpoint of NaN once replaced the last good one."""
    for rank in saves[1]:
        for way in ("nan", "nan, asynchronous"):
            assert re.search(r"AL layer 2\b.*weight h.weight holds nan", rank[way]), rank[way]
        assert rank["left"] == []


@pytest.mark.distributed
def test_a_folder_that_is_removed_meanwhile_is_told(saves: Any) -> None:
    for rank in saves[1]:
        assert "saved while training went on, failed" in rank["removed"], rank["removed"]
        assert rank["afterwards"] == "loaded"


def full_disk(folder: str) -> list[str]:
    """Worker: a save that fits, one that does not, and one after room was made."""
    engine = make_engine("mlp", checkpoint={"asynchronous": True, "keep_last": 1})

    def save(tag: str) -> str:
        engine.save_checkpoint(folder, tag=tag)
        return refused(engine.flush)

    filler, told = Path(folder) / "filler", [save("one")]
    engine.gather(None)
    if engine.stage_id == 0:
        filler.write_bytes(bytes(shutil.disk_usage(folder).free - 16_384))
    engine.gather(None)
    told.append(save("two"))
    engine.gather(None)
    told.append((Path(folder) / LATEST).read_text())
    if engine.stage_id == 0:
        filler.unlink()
    engine.gather(None)
    return [*told, save("three")]


@pytest.mark.distributed
def test_a_full_disk_is_told_on_all_ranks_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        ranks = run_ranks(f"{__name__}:full_disk", 2, folder=str(disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    for one, two, kept, three in ranks:
        assert (one, kept, three) == ("loaded", "one", "loaded")
        assert "failed" in two and "No space left on device" in two, two


# ---- weights alone ---------------------------------------------------------------------------------


def hub(folder: Path, **files: str | bytes) -> Path:
    """A folder of Hugging Face with the given files; ``__`` in a name is a dot."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def weight_map(content: Any) -> Callable[[Path], Path]:
    return lambda folder: hub(folder, model__safetensors__index__json=json.dumps(content))


def one_file(name: str, write: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(hub(folder) / name)
        return folder

    return make


def of_ds_al(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(folder.parent / "saved", folder)
        change(folder / "good")
        return folder

    return make


NO_MAP = "is no index of weights: expected an object 'weight_map' with names of files beside it"
WEIGHTS = [
    Case(name="an index without weight_map", given=weight_map({}), message=NO_MAP),
    Case(name="an index that is a list", given=weight_map([]), message=NO_MAP),
    Case(name="weight_map a number", given=weight_map({"weight_map": 3}), message=NO_MAP),
    Case(name="weight_map with numbers", given=weight_map({"weight_map": {"a": 3}}), message=NO_MAP),
    Case(name="weight_map leads out", given=weight_map({"weight_map": {"a": "../x.safetensors"}}), message=NO_MAP),
    Case(name="weight_map absolute", given=weight_map({"weight_map": {"a": "/x.safetensors"}}), message=NO_MAP),
    Case(
        name="weight_map of a missing file",
        given=weight_map({"weight_map": {"a": "x.safetensors"}}),
        message="'x.safetensors' is missing",
    ),
    Case(
        name="safetensors empty",
        given=one_file("model.safetensors", lambda path: path.write_bytes(b"")),
        message="cannot be read: SafetensorError",
    ),
    Case(
        name="safetensors a text",
        given=one_file("model.safetensors", lambda path: path.write_text("weights of mine")),
        message="cannot be read: SafetensorError",
    ),
    Case(
        name="NaN in safetensors",
        given=one_file("model.safetensors", lambda path: save_file({"0.f.0.bias": torch.full((16,), torch.nan)}, path)),
        message="layer 0: '0.f.0.bias' in .* holds nan",
    ),
    Case(
        name="a pickle with code",
        given=one_file("pytorch_model.bin", lambda path: torch.save({"0.f.0.bias": Code()}, path)),
        message="is cut, altered, or holds more than tensors",
    ),
    Case(
        name="a pickle of a list",
        given=one_file("pytorch_model.bin", lambda path: torch.save([torch.ones(2)], path)),
        message="holds a list, expected a dict of tensors",
    ),
    Case(
        name="a pickle that is a text",
        given=one_file("pytorch_model.bin", lambda path: path.write_text("weights")),
        message="is cut, altered, or holds more than tensors",
    ),
    Case(name="an empty folder", given=hub, message="no weights in"),
    Case(name="no folder", given=lambda folder: folder, message="no weights in"),
    Case(name="ds_al's, latest leads out", given=of_ds_al(latest("../good")), message=NO_TAG),
    Case(name="ds_al's, latest binary", given=of_ds_al(latest(b"\xff")), message=NO_TAG),
    Case(
        name="ds_al's, an index that leads to a file that no hash covers",
        given=of_ds_al(refile("../layer_01-model_states.safetensors")),
        message=r"AL layer 1 has model_states in '\.\./layer_01",
    ),
    Case(
        name="ds_al's, an index without layers", given=of_ds_al(reindexed(lambda i: i.pop("layers"))), message=NO_SAVE
    ),
    Case(name="ds_al's, as saved", given=of_ds_al(lambda folder: None), message=None),
]


def weight_loads(folder: str) -> dict[str, Any]:
    """Worker in a world of one: loads each of :data:`WEIGHTS`."""
    root = Path(folder)
    engine = make_engine("mlp")
    engine.save_checkpoint(str(root / "saved"), tag="good")
    before, found = engine_state(engine), {}
    for number, case in enumerate(WEIGHTS):
        path = case.given(root / str(number))
        told = refused(lambda path=path: ds_al.load_weights(engine, path))
        found[case.name] = told, different(before, engine_state(engine))
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(f"{__name__}:weight_loads", 1, folder=str(tmp_path_factory.mktemp("weights")))[0]


@pytest.mark.distributed
@by_name(WEIGHTS)
def test_files_of_weights(case: Case, weights: Any) -> None:
    told, changed = weights[case.name]
    assert re.search(case.message, told) if case.message else told == "loaded", told
    assert changed == []


# ---- secrets ---------------------------------------------------------------------------------------

SECRET = "s3cret-0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"--set comet.api_key={SECRET}",
        f"--set 'wandb.api-key={SECRET}'",
        f"hub.token={SECRET}",
        f"hf_token={SECRET}",
        f"WANDB_API_KEY={SECRET} python run/train.py",
        f"https://me:{SECRET}@example.org/data",
        "the value of a variable: of-the-environment",
    ],
)
def test_secrets_stay_out_of_texts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_TOKEN", "of-the-environment")
    hidden = secrets.hide(text)
    assert SECRET not in hidden and "of-the-environment" not in hidden and secrets.HIDDEN in hidden


@pytest.mark.parametrize("name", ["api_key", "token", "hub_token", "HF_TOKEN", "password", "client_secret", "apikey"])
def test_secret_keys_are_left_out_of_a_config(name: str) -> None:
    config = {"comet": {name: SECRET, "project": "p"}, "list": [{name: SECRET}]}
    assert secrets.without_secrets(config) == {"comet": {"project": "p"}, "list": [{}]}


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer": "bert-base-uncased", "pad_token": "[PAD]", "mask_token": "[MASK]", "max_tokens": 3},
        {"label_column": "key", "key": "label", "sort_key": "length"},
        {"lr": 0.1, "betas": [0.9, 0.99], "name": "a=b", "password": None},
    ],
)
def test_names_of_settings_are_kept(settings: dict[str, Any]) -> None:
    assert secrets.without_secrets(settings) == settings
    assert (
        secrets.hide("--set experiment.data.tokenizer=bert --seed 3") == "--set experiment.data.tokenizer=bert --seed 3"
    )
