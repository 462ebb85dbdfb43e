"""What was trained goes back to a plain model of transformers, or to a program, with the scores of the AL network."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_al.convert.description import made_again
from ds_al.convert.export import LoadedNetwork, _exits, plain
from ds_al.convert.fold import Folded, fold
from ds_al.convert.hugging_face import AUTO_CLASSES, layer_specs
from ds_al.convert.layers import layer_specs as list_specs
from ds_al.convert.program import InferencePath, write
from ds_al.errors import ALCheckpointError, ALConfigError
from ds_al.layer import ALLayer, predict
from ds_al.objectives import Contrast
from tests.convert.test_hugging_face import built
from tests.support.hugging_face_models import CASES, LM, V

CLASSIFIERS = [name for name, case in CASES.items() if case.task != LM]
COVERING = {(1, 1, "contrast"), (2, 2, "decoded"), (3, 2, "greedy")}
"""Exit, how many are averaged, objective."""
OBJECTIVES = ["mse", "decoded", "contrast", "greedy"]


def network(name: str, **options: Any) -> tuple[list[ALLayer], Any]:
    """AL layers whose new weights are far from their usual start, and their source."""
    case = CASES[name]
    specs, source = layer_specs(case.build(), task=case.task, num_al_layers=3, code_width=6, **options)
    layers = built(specs)
    with torch.no_grad():
        for layer in layers:
            for parameter in [*layer.b.parameters(), *layer.g.parameters(), *layer.h.parameters()]:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return layers, source


def loaded(folder: Path, auto: str) -> Any:
    import transformers

    return getattr(transformers, auto).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("objective", ["mse", "decoded", "greedy"])
def test_a_plain_model_gives_the_same_scores(tmp_path: Path, name: str, objective: str) -> None:
    case = CASES[name]
    layers, source = network(name, objective=objective)
    assert isinstance(plain(layers, source, tmp_path, num_classes=V), Folded)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.py"))
    with torch.no_grad():
        scores = loaded(tmp_path, AUTO_CLASSES[case.task])(**case.inputs()).logits
    want = predict(layers, case.x(), num_classes=V)
    if objective == "greedy" and not name.startswith(("gpt2", "llama", "qwen2")):
        assert torch.equal(scores, want)
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_contrast_folds_for_its_labels_alone(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    layers, source = network(name, objective="contrast")
    assert "cosines" in str(fold(layers, num_classes=V, same="scores"))
    assert isinstance(plain(layers, source, tmp_path, num_classes=V, same="labels"), Folded)
    with torch.no_grad():
        scores = loaded(tmp_path, AUTO_CLASSES[case.task])(**case.inputs()).logits
        length = layers[-1].bridge(_activation(layers, case.x())).norm(dim=1, keepdim=True)
    want = predict(layers, case.x(), num_classes=V)
    torch.testing.assert_close(scores, want * length, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.argmax(dim=1), want.argmax(dim=1))


def test_contrast_that_decodes_folds(tmp_path: Path) -> None:
    layers, source = network("bert", objective={"name": "contrast", "exit": "decode"})
    assert isinstance(plain(layers, source, tmp_path, num_classes=V), Folded)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].task == LM])
def test_a_language_model_comes_back_and_generates(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    layers, source = network(name)
    plain(layers, source, tmp_path, num_classes=40)
    model = loaded(tmp_path, "AutoModelForCausalLM")
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(model(**case.inputs()).logits, predict(layers, case.x()))
        ids = case.inputs()["input_ids"][:1]
        made = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        by_hand = ids
        for _ in range(3):
            scores = predict(layers, (by_hand, torch.ones_like(by_hand)))
            by_hand = torch.cat([by_hand, scores[:, -1:].argmax(dim=2)], dim=1)
    assert torch.equal(made, by_hand)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_made_again_from_its_description_alone(name: str) -> None:
    layers, source = network(name)
    specs, again = made_again(json.loads(json.dumps(source.description)))
    assert (again.names, again.model_class, again.classifier) == (source.names, source.model_class, source.classifier)
    new = built(specs)
    for one, two in zip(layers, new, strict=True):
        two.load_state_dict(one.state_dict())
    options: Any = {} if CASES[name].task == LM else {"num_classes": V}
    assert torch.equal(predict(layers, CASES[name].x(), **options), predict(new, CASES[name].x(), **options))


def test_what_a_description_cannot_say_is_refused_where_it_is_needed() -> None:
    """A bridge that was a module once ended from_pretrained with a KeyError: its weights are not the model's."""
    own: Any = nn.Linear(8, 6)
    _, source = network("resnet", bridges=[own, None, None])
    assert source.description["own_bridges"] == [0]
    assert made_again(source.description), "exits before the last are exported on demand alone"
    there = LoadedNetwork([], V, source, source.description["own_bridges"])
    there.layers.extend(network("resnet")[0])
    assert _exits(there, None, 2) == range(1, 3)
    for wish in ((1, 1), (2, 2), (None, 3)):
        with pytest.raises(ALCheckpointError, match=r"AL layer 0, exit 1, is one of your own.*weights=checkpoint"):
            _exits(there, *wish)
    _, source = network("resnet", bridges=[None, None, own])
    with pytest.raises(ALCheckpointError, match=r"last AL layer is one of your own.*weights=checkpoint"):
        made_again(source.description)
    _, source = network("vit", objective=Contrast())
    with pytest.raises(ALCheckpointError, match=r"objective is one of your own"):
        made_again(source.description)
    with pytest.raises(ALCheckpointError, match=r"made of a NewModel, which transformers .* has not"):
        made_again({**source.description, "objective": "mse", "model_class": "NewModel"})


def test_without_folding_the_trunk_is_written(tmp_path: Path) -> None:
    layers, source = network("bert", objective="mse", code="tanh")
    assert plain(layers, source, tmp_path, num_classes=V) == "its codes end on Tanh"
    trunk = loaded(tmp_path, "AutoModel")
    with torch.no_grad():
        hidden = trunk(**CASES["bert"].inputs()).last_hidden_state
    assert torch.equal(hidden, _activation(layers, CASES["bert"].x())[0])


@pytest.mark.parametrize("objective", ["greedy", "decoded"])
def test_a_head_on_the_mean_of_tokens_is_no_classifier_of_transformers(tmp_path: Path, objective: str) -> None:
    """Its weights in the model's classifier would give other scores without a word."""
    layers, source = network("bert", objective=objective, classifier_pooling="mean")
    assert "mean over the tokens" in str(plain(layers, source, tmp_path, num_classes=V, same="labels"))
    trunk = loaded(tmp_path, "AutoModel")
    with torch.no_grad():
        hidden = trunk(**CASES["bert"].inputs()).last_hidden_state
    assert torch.equal(hidden, _activation(layers, CASES["bert"].x())[0])
    again = built(made_again(json.loads(json.dumps(source.description)))[0])
    for one, two in zip(layers, again, strict=True):
        two.load_state_dict(one.state_dict())
    x = CASES["bert"].x()
    assert torch.equal(predict(layers, x, num_classes=V), predict(again, x, num_classes=V))
    old = {key: value for key, value in source.description.items() if key != "classifier_pooling"}
    assert made_again(old)[1].description["classifier_pooling"] is None, "checkpoints before this option"


READ = """
import sys, torch
sys.modules["ds_al"] = sys.modules["deepspeed"] = None
for file in sys.argv[1:]:
    x, want = torch.load(file + ".check")
    program = torch.export.load(file).module() if file.endswith("pt2") else torch.jit.load(file)
    torch.testing.assert_close(program(*x), want, rtol=1e-4, atol=1e-5)
"""


def test_programs_need_no_ds_al(tmp_path: Path) -> None:
    formats: dict[str, Any] = {
        "bert": "torch.export", "gpt2": "torch.export", "resnet": "torch.export", "roberta": "torchscript"
    }  # fmt: skip
    files = []
    for name, format in formats.items():
        case = CASES[name]
        layers, _ = network(name, objective="contrast", code="tanh")
        x, want = parts(case.x()), predict(layers, case.x(), num_classes=V)
        example = tuple(part[:2] for part in x)
        files.append(str(write(InferencePath(layers, num_classes=V), example, tmp_path / name, format=format)))
        torch.save((x, want), f"{files[-1]}.check")
    subprocess.run([sys.executable, "-c", READ, *files], check=True, timeout=200)


def test_a_layer_list_becomes_a_program(tmp_path: Path) -> None:
    net = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, V)]
    x = torch.randn(6, 4)
    layers = built(list_specs(net, num_classes=V, example=x, num_al_layers=2))
    for exit in (1, 2):
        path = InferencePath(layers, num_classes=V, exit=exit)
        program = torch.export.load(str(write(path, x[:2], tmp_path, format="torch.export"))).module()
        torch.testing.assert_close(program(x), predict(layers, x, exit=exit))


@pytest.mark.parametrize(
    ("exit", "average", "objective"),
    [
        case if case in COVERING else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product((1, 2, 3), (1, 2, 3), ("contrast", "greedy", "decoded"))
        if case[1] <= case[0]
    ],
)
def test_an_early_exit_and_the_mean_of_exits_are_programs(
    tmp_path: Path, exit: int, average: int, objective: str
) -> None:
    layers, _ = network("bert", objective=objective)
    x = CASES["bert"].x()
    file = write(
        InferencePath(layers, num_classes=V, exit=exit, average=average),
        tuple(part[:2] for part in x),
        tmp_path,
        format="torch.export",
    )
    each = [predict(layers, x, exit=m, num_classes=V) for m in range(exit - average + 1, exit + 1)]
    want = each[0] if average == 1 else torch.stack([scores.softmax(dim=1) for scores in each]).mean(dim=0).log()
    torch.testing.assert_close(torch.export.load(str(file)).module()(*x), want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    layers, _ = network("bert")
    path = InferencePath(layers, num_classes=V)
    with pytest.raises(ALConfigError, match=r"expected one of torch\.export"):
        write(path, CASES["bert"].x(), tmp_path, format="coreml")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_an_onnx_program_gives_the_same_scores(tmp_path: Path, name: str) -> None:
    """Runs where both packages are there; they are no dependencies."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    case = CASES[name]
    layers, _ = network(name, objective="contrast", code="tanh")
    x, want = parts(case.x()), predict(layers, case.x(), num_classes=V)
    example = tuple(part[:2] for part in x)
    program = ReferenceEvaluator(str(write(InferencePath(layers, num_classes=V), example, tmp_path, format="onnx")))
    names = [each.name for each in program.proto_.graph.input]
    (scores,) = program.run(None, {key: part.numpy() for key, part in zip(names, x, strict=True)})
    torch.testing.assert_close(torch.from_numpy(scores), want, rtol=1e-3, atol=1e-4)


def test_onnx_names_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    layers, _ = network("bert")
    with pytest.raises(ALConfigError, match="pip install onnx onnxscript"):
        write(InferencePath(layers, num_classes=V), CASES["bert"].x(), tmp_path, format="onnx")


def parts(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@torch.no_grad()
def _activation(layers: list[ALLayer], s: Any) -> Any:
    for layer in layers:
        s = layer.f(s)
    return s
