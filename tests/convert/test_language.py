"""Language models as AL layers: what reads each layer, what is tied, and how the codes of tokens are told apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from ds_al.convert.hugging_face import layer_specs
from ds_al.convert.language import TokenReader
from ds_al.convert.layers import layer_specs as list_specs
from ds_al.convert.text import TextBlocks
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer, predict
from ds_al.objectives import TokenCodes
from ds_al.objectives.candidates import candidates, places
from ds_al.optim.local import LocalOptimizer
from ds_al.partition.layer_times import measure
from ds_al.tensors import stop_gradient
from tests.convert.test_hugging_face import _without_gradient, built
from tests.support.hugging_face_models import CASES, LM, WORDS

MODELS = [name for name in CASES if CASES[name].task == LM]
OBJECTIVES = ["next_token", "readout", "token_codes"]


def network(name: str, objective: Any, *, layers: int = 3, **options: Any) -> list[ALLayer]:
    specs, _ = layer_specs(CASES[name].build(), task=LM, num_al_layers=layers, objective=objective, **options)
    return built(specs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_weight_learns_with_private_blocks_of_the_models_own_kind(name: str, objective: str) -> None:
    case = CASES[name]
    layers = network(name, objective, bridge_blocks=1)
    ids, mask = case.x()
    labels = ids.masked_fill(mask == 0, -100)
    assert not _without_gradient(layers, case, labels, labels)
    blocks = [layer.b.blocks for layer in layers[:2]]
    assert all(isinstance(each, TextBlocks) and type(each.blocks[0]) is type(_block(layers[0])) for each in blocks)
    assert not any(isinstance(module, TokenReader) for module in layers[2].modules()), "the last has the model's head"
    # New weights start as the model's own do, not as torch's layers do.
    weights = [p for p in blocks[0].parameters() if p.ndim == 2]
    assert weights and all(0.005 < float(p.detach().std()) < 0.04 for p in weights)


def _block(layer: ALLayer) -> nn.Module:
    return next(module for module in layer.f.modules() if isinstance(module, TextBlocks)).blocks[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("blocks", [0, 2])
def test_no_exit_looks_at_later_tokens(objective: str, blocks: int) -> None:
    layers = network("qwen2 lm", objective, bridge_blocks=blocks)
    ids = torch.randint(4, WORDS, (2, 7), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 5:] = 4 + (other[:, 5:] + 1) % (WORDS - 4)
    for exit in (1, 2, 3):
        one, two = (
            predict(layers, (each, torch.ones_like(each)), exit=exit, num_classes=WORDS) for each in (ids, other)
        )
        assert one.shape == (2, 7, WORDS)
        torch.testing.assert_close(one[:, :5], two[:, :5], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(one[:, 5:], two[:, 5:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("objective", ["readout", "token_codes"])
def test_before_training_the_last_exit_gives_the_models_own_scores(name: str, objective: str) -> None:
    model, case = CASES[name].build(), CASES[name]
    specs, _ = layer_specs(model, task=LM, num_al_layers=3, objective=objective)
    with torch.no_grad():
        want = model(**case.inputs()).logits
    torch.testing.assert_close(predict(built(specs), case.x(), num_classes=WORDS), want, rtol=1e-5, atol=1e-6)


def test_the_readout_of_a_tied_model_is_its_input_embedding_and_is_stepped_once() -> None:
    tied, untied = network("gpt2 lm", "readout"), network("llama lm", "readout")
    assert tied[0].h.weight is tied[0].f[0].embed.words.weight
    assert untied[0].h.weight is not untied[2].h.weight and torch.equal(untied[0].h.weight, untied[2].h.weight)
    for layers in (tied, untied):
        assert isinstance(layers[1].h, nn.Identity), "layers between have no readout of their own"
    optimizer = LocalOptimizer([(0, tied[0])], associated=torch.optim.AdamW, autoencoder=torch.optim.AdamW)
    stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len(set(stepped)) == len(list(tied[0].parameters()))


def test_a_layer_between_reads_with_the_copy_that_it_was_given() -> None:
    layers = network("gpt2 lm", "readout")
    ids, mask = CASES["gpt2 lm"].x()
    old = nn.Linear(16, WORDS, bias=False).requires_grad_(False)
    layers[1].objective.earlier = [old]
    s = layers[1].eval().f(stop_gradient(layers[0].eval().f((ids, mask))))
    loss = layers[1].objective.associated_loss(layers[1], s, ids)
    want = F.cross_entropy(old(layers[1].b(s))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)
    loss.backward()
    assert layers[0].h.weight.grad is None and layers[1].b.code[1].weight.grad is not None


def test_layers_before_the_last_may_learn_from_a_share_of_the_tokens() -> None:
    """h, which costs most, reads these tokens alone; the last layer, which is the model, reads all of them."""
    layers = network("gpt2 lm", {"name": "next_token", "token_share": 0.4})
    ids, mask = CASES["gpt2 lm"].x()
    read: list[int] = []
    s: Any = (ids, mask)
    for layer in layers:
        layer.h.register_forward_hook(lambda _, inputs, scores: read.append(scores.flatten(0, -2).shape[0]))
        s = stop_gradient(layer.eval().f(s))
        assert layer.objective.associated_loss(layer, s, ids).item() > 0
        assert layer.scores(s, earlier=[], table=None).shape == (*ids.shape, WORDS), "exits read all"
    tokens = len(ids) * (ids.shape[1] - 1)
    assert read[::2] == [math.ceil(0.4 * tokens), math.ceil(0.4 * tokens), ids.numel()]


def test_layers_before_the_last_may_learn_over_a_part_of_the_vocabulary() -> None:
    """Their h, which costs most, has that many rows; what is drawn stands for the rest: the mean over draws of the sum
    under the softmax is that over all tokens."""
    layers = network("gpt2 lm", {"name": "next_token", "vocabulary_share": 0.6})
    ids, mask = CASES["gpt2 lm"].x()
    ids, mask = ids[:, :5], mask[:, :5]  # fewer tokens than candidates
    trained: list[int] = []
    s: Any = (ids, mask)
    for layer in layers:
        s = stop_gradient(layer.eval().f(s))
        layer.objective.associated_loss(layer, s, ids).backward()
        trained.append(int(layer.h.weight.grad.any(dim=1).sum()))
        assert layer.scores(s, earlier=[], table=None).shape == (*ids.shape, WORDS), "exits read all"
    part = math.ceil(0.6 * WORDS)
    assert trained == [part, part, WORDS], "rows of h"
    all_parts = {"name": "next_token", "vocabulary_share": 0.6, "last_layer": True}
    assert [layer.objective.vocabulary_share for layer in network("gpt2 lm", all_parts)] == [0.6] * 3

    first, s = layers[0], layers[0].f((ids, mask))
    with torch.no_grad():
        scores, following = first.h(first.bridge(s))[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        sums = [
            (F.cross_entropy(scores[:, rows] + weights, places(rows, following), reduction="none")
             + scores.gather(1, following[:, None])[:, 0]).exp()
            for rows, weights in (candidates(following, rows=part, vocabulary=WORDS) for _ in range(500))
        ]  # fmt: skip
    torch.testing.assert_close(torch.stack(sums).mean(0), scores.exp().sum(1), rtol=0.02, atol=0.0)


def test_a_part_of_the_vocabulary_needs_a_linear_h() -> None:
    """A parametrization of h is applied to all rows before some are taken; what a hook would change is not known."""
    layer = network("gpt2 lm", {"name": "next_token", "vocabulary_share": 0.6})[0].eval()
    ids, mask = CASES["gpt2 lm"].x()

    def loss() -> Tensor:
        torch.manual_seed(0)
        return layer.objective.associated_loss(layer, layer.f((ids[:, :5], mask[:, :5])), ids[:, :5])

    plain = nn.Linear(layer.h.in_features, layer.h.out_features, bias=False)
    layer.h = parametrizations.orthogonal(nn.Linear(layer.h.in_features, layer.h.out_features, bias=False))
    plain.weight.data.copy_(layer.h.weight)
    parametrized, layer.h = loss(), plain
    assert torch.equal(parametrized, loss())
    layer.h = weight_norm(plain)
    with pytest.raises(ALConfigError, match=r"h is a Linear with hooks: expected an nn.Linear of V rows, without"):
        loss()
    layer.h = nn.Sequential(plain)
    with pytest.raises(ALConfigError, match=r"h is a Sequential: expected an nn.Linear"):
        loss()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layers_of_language_models_can_be_timed(objective: str) -> None:
    """Labels of a token each were missing, so that the partition "measured" failed for every language model."""
    layers = network("gpt2 lm", objective)
    example = CASES["gpt2 lm"].x()
    device = torch.device("cpu")
    times = list(measure(layers.__getitem__, layers=3, example=example, num_classes=WORDS, device=device, repeat=1))
    assert len(times) == 3 and all(each.forward > 0 and each.step > 0 for each in times)


# ---- codes of tokens -----------------------------------------------------------------------------------


def test_candidates_are_the_distinct_tokens_of_the_micro_batch_and_drawn_others() -> None:
    labels = torch.tensor([[9, 5, 5, 7], [1, 7, -100, 3]])
    ids, weights = TokenCodes(negatives=2).candidates(labels, vocabulary=1000)
    assert len(ids) == 8 + 2 and len(set(ids.tolist())) == 10 and torch.equal(ids, ids.sort().values)
    own = {5, 7, 3}  # 9 and 1 begin their texts, so nothing has to predict them
    assert own <= set(ids.tolist())
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        assert weight == (0 if token in own else pytest.approx(torch.tensor(997 / 7).log().item(), abs=1e-5))


def test_the_softmax_over_candidates_estimates_the_one_over_the_vocabulary() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(200), torch.randint(200, (2, 6))
    estimates = []
    for _ in range(4000):
        ids, weights = TokenCodes().candidates(labels, vocabulary=200)
        estimates.append(float((scores[ids] + weights).exp().sum()))
    mean = sum(estimates) / len(estimates)
    spread = torch.tensor(estimates).std() / len(estimates) ** 0.5
    assert abs(mean - float(scores.exp().sum())) < 4 * spread, "without bias"
    assert min(estimates) < 0.9 * mean, "and the draw differs"


def test_with_all_tokens_as_candidates_the_loss_is_that_of_the_whole_vocabulary() -> None:
    layers = network("gpt2 lm", {"name": "token_codes", "negatives": WORDS}, layers=2)
    ids, mask = CASES["gpt2 lm"].x()
    labels = ids.masked_fill(mask == 0, -100)
    s: Any = (ids, mask)
    t: Any = labels
    for exit, layer in enumerate(layers, start=1):
        s, t = layer.eval()(s, t)
        scores = predict(layers, (ids, mask), exit=exit, num_classes=WORDS)
        want = layer.objective.label_loss(layer, scores, labels)
        assert layer.local_losses(s, t, t).associated.item() == pytest.approx(want.item(), abs=1e-5)


def test_messages_of_codes_are_as_large_as_the_micro_batch_and_not_as_the_vocabulary() -> None:
    for vocabulary in (500, 5000):
        layer = ALLayer(
            nn.Identity(), nn.Identity(), nn.Embedding(vocabulary, 6), nn.Identity(), objective="token_codes"
        )
        labels, ids, weights, codes = layer.objective.encode(layer, torch.randint(vocabulary, (4, 5)))
        assert [labels.shape, ids.shape, weights.shape, codes.shape] == [(4, 5), (20,), (20,), (20, 6)]
    assert layer.objective.target_tensors == 4


@pytest.mark.parametrize(("codes", "learns"), [("associated", "gb"), ("autoencoder", "gh"), ("both", "gbh")])
def test_what_trains_the_codes(codes: str, learns: str) -> None:
    layers = network("llama lm", {"name": "token_codes", "codes": codes}, layers=2)
    ids, mask = CASES["llama lm"].x()
    for loss, trained in (("associated", "g" in learns and codes != "autoencoder"), ("autoencoder", "h" in learns)):
        for layer in layers:
            layer.zero_grad()
        s_out, t_out = layers[0]((ids, mask), ids)
        value = getattr(layers[0].local_losses(s_out, t_out, ids), loss)
        if value.requires_grad:
            value.backward()
        assert (layers[0].g.weight.grad is not None) == trained, (codes, loss)
        assert any(p.grad is not None for p in layers[0].h.parameters()) == (loss == "autoencoder" and "h" in learns)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gpt2 lm", {"objective": "readout", "code_width": 6}, "leave it out"),
        ("gpt2 lm", {"bridge_blocks": -1}, "bridge_blocks=-1"),
        ("gpt2 lm", {"objective": "mse"}, "'readout' or 'token_codes'"),
        ("gpt2 lm", {"bridges": [None]}, "1 bridges for 2 AL layers"),
        ("gpt2", {"bridge_blocks": 1}, "they are for 'causal-lm'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ALConfigError, match=words):
        layer_specs(CASES[name].build(), task=CASES[name].task, num_al_layers=2, **options)


def test_layer_lists_and_other_embeddings_are_refused() -> None:
    net, example = [nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)], torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ALConfigError, match="causal-lm"):
        list_specs(net, num_classes=9, example=example, num_al_layers=2, objective="token_codes")
    layer = ALLayer(nn.Identity(), nn.Identity(), nn.Linear(4, 4), nn.Identity(), objective="token_codes")
    with pytest.raises(ALConfigError, match="g is a Linear"):
        layer.objective.encode(layer, torch.zeros(2, 3, dtype=torch.int64))
