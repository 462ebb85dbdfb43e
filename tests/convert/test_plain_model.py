"""Models of transformers with settings of their own: the scores are the model's, or the setting is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ds_al.convert.hugging_face import layer_specs
from ds_al.layer import predict
from ds_al.tensors import stop_gradient
from tests.convert.test_hugging_face import EXACT, built
from tests.support.hugging_face_models import CASES

HONOURED: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"chunk_size_feed_forward": 1}),
    ("bert", {"output_attentions": True, "output_hidden_states": True}),
    ("bert", {"return_dict": False}),
    ("bert", {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.5, "classifier_dropout": 0.3}),
    ("bert", {"tie_word_embeddings": False}),
    ("bert", {"problem_type": "single_label_classification"}),
    ("roberta", {"use_cache": True}),
    ("distilbert", {"sinusoidal_pos_embds": True}),
    ("gpt2 lm", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    ("gpt2 lm", {"tie_word_embeddings": False}),
    ("gpt2", {"use_cache": True, "attn_pdrop": 0.5}),
    ("llama lm", {"attention_bias": True, "mlp_bias": True}),
    ("llama lm", {"head_dim": 4, "hidden_act": "gelu"}),
    ("llama lm", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ("llama lm", {"is_causal": False}),
    ("mistral lm", {"sliding_window": None}),
    ("qwen3 lm", {"attention_dropout": 0.5}),
    ("vit", {"qkv_bias": False}),
    ("resnet", {"downsample_in_first_stage": True}),
]


def scores_of_both(name: str, model: Any) -> tuple[Any, Any]:
    case = CASES[name]
    with torch.no_grad():
        found = model(**case.inputs())
        wanted = found[0] if isinstance(found, tuple) else found.logits
        network = built(layer_specs(model, task=case.task, num_al_layers=2, objective="greedy")[0])
        return predict(network, case.x()), wanted


@pytest.mark.parametrize(("name", "options"), HONOURED, ids=[f"{name} {options}" for name, options in HONOURED])
def test_options_of_a_config_are_in_the_blocks(name: str, options: dict[str, Any]) -> None:
    found, wanted = scores_of_both(name, CASES[name].build(**options))
    if name in EXACT:
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "gpt2 lm", "qwen2 lm"])
def test_the_attention_of_the_model_is_used(name: str, implementation: str) -> None:
    model = CASES[name].build()
    model.set_attn_implementation(implementation)
    assert torch.equal(*scores_of_both(name, model))


@pytest.mark.parametrize("name", ["bert", "llama lm"])
def test_a_model_in_bfloat16_computes_in_it(name: str) -> None:
    assert torch.equal(*scores_of_both(name, CASES[name].build().bfloat16()))


def test_a_resized_vocabulary_is_the_models() -> None:
    model = CASES["llama lm tied"].build()
    model.resize_token_embeddings(47)
    found, wanted = scores_of_both("llama lm tied", model)
    assert torch.equal(found, wanted) and found.shape[-1] == 47


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2 lm", "vit"])
def test_a_model_that_recomputes_its_blocks_learns_the_same(name: str, reentrant: bool) -> None:
    case, gradients = CASES[name], []
    for recomputed in (False, True):
        model = case.build()
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        first, second = built(layer_specs(model, task=case.task, num_al_layers=2, objective="greedy")[0])
        s = stop_gradient(first.f(case.x()))
        second.train()
        for module in second.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        hidden = s[0] if isinstance(s, tuple) else s
        hidden.requires_grad_()
        out = second.f(s)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        gradients.append([copy.deepcopy(weight.grad) for weight in second.f.parameters()])
    assert len(gradients[0]) and all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
