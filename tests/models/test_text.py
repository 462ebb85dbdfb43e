"""Text models: padding changes nothing, an LSTM's state is passed on, words start from pretrained vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.layer import predict
from ds_al.models import build_al, build_twin
from ds_al.models.text_bridges import pooled
from ds_al.tensors import stop_gradient
from tests.support.model_cases import (
    BATCH,
    CASES,
    CLASSES,
    TEXT_CASES,
    TOKENS,
    Case,
    al_layers,
    one_hot,
    tokens,
    twin_layers,
)

VOCABULARY = ["<pad>", "<unk>", "cat", "dog", "New York", "unheard-of"]


@pytest.fixture(params=TEXT_CASES.values(), ids=TEXT_CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def longer(case: Case) -> dict[str, Any]:
    """Room for padded sequences, where positions are learned."""
    return {"max_length": 20} if "max_length" in case.options else {}


def padded_twice(x: Tensor) -> list[Any]:
    """The same sequences with padding at their end; the second with random tokens there, and a mask."""
    padded, junk = F.pad(x, (0, 5)), torch.cat([x, torch.randint(1, 50, (BATCH, 5))], dim=1)
    return [padded, (junk, padded != 0)]


def test_padding_changes_no_prediction(case: Case) -> None:
    layers = [layer.eval() for layer in al_layers(case, **longer(case))]
    x = tokens()
    for exit in range(1, len(layers) + 1):
        expected = predict(layers, x, exit=exit)
        for padded in padded_twice(x):
            torch.testing.assert_close(predict(layers, padded, exit=exit), expected)


def test_padding_changes_no_loss_and_no_gradient(case: Case) -> None:
    x, results = tokens(), []
    for s in (x, *padded_twice(x)):
        values: list[Tensor] = []
        t = one_hot()
        for layer in al_layers(case, dropout=0.0, **longer(case)):
            s_out, t_out = layer(s, t)
            losses = layer.local_losses(s_out, t_out, t)
            sum(losses).backward()
            grads = {name: p.grad for name, p in layer.named_parameters()}
            grads = {name: g[:TOKENS] if "positions" in name else g for name, g in grads.items()}
            values += [*losses, *grads.values()]
            s, t = stop_gradient(s_out), stop_gradient(t_out)
        results.append(values)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_padding_changes_no_score_of_the_twin(case: Case) -> None:
    network = nn.Sequential(*twin_layers(case, **longer(case))).eval()
    x = tokens()
    for padded in padded_twice(x):
        torch.testing.assert_close(network(padded), network(x))


def test_the_twin_of_an_lstm_reads_the_last_valid_step() -> None:
    """A batch of sequences of several lengths scores as each of them does alone, without padding."""
    for key in ("lstm", "lstm grouped"):
        network = nn.Sequential(*twin_layers(CASES[key])).eval()
        x, lengths = torch.randint(1, 50, (BATCH, TOKENS)), [7, 4, 1, 5]
        padded = x.masked_fill(torch.arange(TOKENS) >= torch.tensor(lengths).unsqueeze(1), 0)
        alone = torch.cat([network(x[i : i + 1, :length]) for i, length in enumerate(lengths)])
        torch.testing.assert_close(network(padded), alone)


def test_a_sequence_of_padding_alone_gives_finite_losses(case: Case) -> None:
    s, t = torch.zeros(BATCH, TOKENS, dtype=torch.int64), one_hot()
    for layer in al_layers(case):
        s_out, t_out = layer(s, t)
        sum(layer.local_losses(s_out, t_out, t)).backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        s, t = stop_gradient(s_out), stop_gradient(t_out)


@pytest.mark.parametrize("training", [True, False])
def test_an_lstm_layer_starts_from_the_state_of_the_one_before(training: bool) -> None:
    layers = [layer.train(training) for layer in al_layers(CASES["lstm"], dropout=0.0)]
    hidden, h, c, mask = layers[1].f(layers[0].f(tokens()))
    states = [(h, c), (h + 1, c), (h, c + 1)]
    outputs = [layers[2].f((hidden, *state, mask))[0] for state in states]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert torch.equal(layers[1].reduce((hidden, h, c, mask)), h[:, 0] + h[:, 1])


def test_an_lstm_passes_its_state_within_a_group_too() -> None:
    first, last = (layer.f.eval() for layer in al_layers(CASES["lstm grouped"]))
    s = first(tokens())
    middle = last[0](s)
    assert torch.equal(last(s)[0], last[1](middle)[0])
    hidden, h, c, mask = middle
    assert not torch.allclose(last(s)[0], last[1]((hidden, torch.zeros_like(h), torch.zeros_like(c), mask))[0])


def test_an_lstm_reads_backwards_from_the_last_token_and_not_from_padding() -> None:
    layers = [layer.eval() for layer in al_layers(CASES["lstm"])]
    x = tokens()
    x[:, 3:] = 0
    _, h_padded, *_ = layers[1].f(layers[0].f(x))
    _, h, *_ = layers[1].f(layers[0].f(x[:, :3]))
    torch.testing.assert_close(h_padded, h)


def test_windows_of_tokens_are_masked_means() -> None:
    hidden = torch.arange(10.0).reshape(1, 5, 2)
    mask = torch.tensor([[True, True, True, False, False]])
    means, kept = pooled((hidden, mask), 2)
    assert torch.equal(means, torch.tensor([[[1.0, 2.0], [4.0, 5.0], [0.0, 0.0]]]))
    assert kept.tolist() == [[True, True, False]]
    assert pooled((hidden, mask), 1)[0] is hidden


def test_the_last_bridge_of_a_text_model_is_linear_as_its_twins_head() -> None:
    for key in ("transformer blocks", "lstm blocks"):
        kinds = [type(layer.b).__name__ for layer in al_layers(CASES[key])]
        assert kinds == ["BlockBridge", "BlockBridge", "SequenceBridge"]


def vectors(folder: Path, *lines: str) -> Path:
    path = folder / "vectors.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.parametrize("as_file", [False, True])
def test_words_start_from_pretrained_vectors(tmp_path: Path, name: str, as_file: bool) -> None:
    path = vectors(tmp_path, "dog 1 2 3 4", "bird 9 9 9 9", "New York -1 0.5 0 2", "<pad> 5 5 5 5")
    vocabulary: Any = VOCABULARY
    if as_file:
        vocabulary = tmp_path / "words.txt"
        vocabulary.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    options: dict[str, Any] = {"width": 4, "embedding_width": 4} if name == "lstm" else {"width": 4, "heads": 2}
    options |= {"vocab_size": len(VOCABULARY), "num_classes": CLASSES, "vocabulary": vocabulary, "word_vectors": path}
    tables = []
    for specs in (build_al(name, **options), build_twin(name, **options)):
        torch.manual_seed(0)
        module = specs[0].build()
        tables.append((getattr(module, "f", module)).tokens.weight)
    weight = tables[0].detach()
    assert torch.equal(weight[3], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(weight[4], torch.tensor([-1.0, 0.5, 0.0, 2.0]))
    assert torch.equal(weight[0], torch.zeros(4))  # padding stays 0
    assert weight[[1, 2, 5]].abs().min() > 0  # unknown words are random
    assert torch.equal(*tables)


def test_word_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": len(VOCABULARY), "num_classes": 3, "vocabulary": VOCABULARY}
    options |= {"word_vectors": vectors(tmp_path, "dog 1 2 3 4"), "width": 4, "heads": 2}
    with pytest.raises(ALConfigError, match="vectors of 4 numbers, expected 6: set the embedding's width to 4"):
        build_al("transformer", **{**options, "width": 6})
    with pytest.raises(ALConfigError, match="a vocabulary of 6 words: expected 7, vocab_size"):
        build_al("transformer", **{**options, "vocab_size": 7})
    with pytest.raises(ALConfigError, match="word_vectors without vocabulary"):
        build_al("transformer", **{**options, "vocabulary": None})
    with pytest.raises(ALConfigError, match=r"word_vectors='.*nowhere.txt': no such file"):
        build_al("transformer", **{**options, "word_vectors": tmp_path / "nowhere.txt"})
    vectors(tmp_path, "dog 1 2 3 4", "cat 1 2")
    with pytest.raises(ALConfigError, match="line 2: got 2 numbers, expected 4"):
        build_al("transformer", **options)[0].build()
