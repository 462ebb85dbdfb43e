"""Tiny random models of transformers, one of each architecture that is converted, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

V, WORDS, BATCH, TOKENS, PAD = 5, 40, 3, 7, 1
TEXT = {"vocab_size": WORDS, "pad_token_id": PAD, "num_labels": V}
BERT = {**TEXT, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
BERT |= {"max_position_embeddings": 16}
ROPE = {**BERT, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}


@dataclass(frozen=True)
class Case:
    """A model class of transformers, its config class, its sizes, and the task."""

    model: str
    config: str
    options: dict[str, Any]
    task: str = "sequence-classification"

    def build(self, **options: Any) -> Any:
        """The model in evaluation mode, with weights that are far from their usual start, all biases included."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **options})
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def inputs(self, padding: str = "right") -> dict[str, Tensor]:
        """As a tokenizer or an image processor gives them."""
        generator = torch.Generator().manual_seed(1)
        if self.task == "image-classification":
            size = self.options.get("image_size", 32)
            return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator)}
        ids = torch.randint(4, WORDS, (BATCH, TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        columns = {"right": slice(4, None), "left": slice(None, 3), "none": slice(0, 0)}[padding]
        mask[1, columns] = 0
        inputs = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
        if self.model.startswith("Bert"):
            inputs["token_type_ids"] = torch.tensor([0] * 3 + [1] * 4).expand(BATCH, -1).contiguous()
        return inputs

    def x(self, padding: str = "right") -> Any:
        """The same as x of an AL network."""
        values = tuple(self.inputs(padding).values())
        return values if len(values) > 1 else values[0]


def _gpt2(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16, "bos_token_id": 2, "eos_token_id": 3}


LM = "causal-lm"
CASES: dict[str, Case] = {
    "bert": Case("BertForSequenceClassification", "BertConfig", BERT),
    "roberta": Case("RobertaForSequenceClassification", "RobertaConfig", BERT),
    "xlm-roberta": Case("XLMRobertaForSequenceClassification", "XLMRobertaConfig", BERT),
    "distilbert": Case(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**TEXT, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16},
    ),
    "gpt2": Case("GPT2ForSequenceClassification", "GPT2Config", _gpt2(TEXT)),
    "gpt2 lm": Case("GPT2LMHeadModel", "GPT2Config", _gpt2(TEXT), LM),
    "llama": Case("LlamaForSequenceClassification", "LlamaConfig", ROPE),
    "llama lm": Case("LlamaForCausalLM", "LlamaConfig", ROPE, LM),
    "llama lm tied": Case("LlamaForCausalLM", "LlamaConfig", {**ROPE, "tie_word_embeddings": True}, LM),
    "mistral lm": Case("MistralForCausalLM", "MistralConfig", {**ROPE, "sliding_window": 3, "head_dim": 8}, LM),
    "qwen2 lm": Case(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**ROPE, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        LM,
    ),
    "qwen2": Case("Qwen2ForSequenceClassification", "Qwen2Config", ROPE),
    "qwen3 lm": Case("Qwen3ForCausalLM", "Qwen3Config", {**ROPE, "head_dim": 8}, LM),
    "vit": Case(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": V,
        },
        "image-classification",
    ),
    "resnet": Case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "num_labels": V},
        "image-classification",
    ),
    "resnet bottleneck": Case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 3], "num_labels": V},
        "image-classification",
    ),
}
