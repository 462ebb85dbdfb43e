"""Locations of embeddings, blocks, final norm and head in the models of ``transformers``.

:data:`FAMILIES` has one function per model family, by ``config.model_type``. It returns an :class:`Anatomy`, all parts
of which are the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.convert.bodies import BertBody, ClassTokenBody, DenseBody, EveryTokenBody, LastTokenBody
from ds_al.convert.private_blocks import PrivateBlocks
from ds_al.convert.text import (
    Embeddings,
    GPT2Embeddings,
    PlainEmbeddings,
    TextBlocks,
    TextInput,
    TypedEmbeddings,
    run_of_list,
)
from ds_al.tensors import Activation

CLASSIFY, GENERATE, LOOK = "sequence-classification", "causal-lm", "image-classification"


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model.

    Attributes:
        blocks: number of blocks, between which the model can be split.
        group: builds f of a range of blocks; the first range includes the embeddings.
        activations: output of each block, on the meta device.
        body: body of the head.
        scores: path of the head's linear layer in the model.
        private: builds a bridge's private blocks, given their number and the index of the block to imitate; for causal
            language models.
    """

    blocks: int
    group: Callable[[range], nn.Module]
    activations: Sequence[Activation]
    body: nn.Module
    scores: str
    private: Callable[[int, int], PrivateBlocks] | None = None


def _text(
    model: Any,
    blocks: Sequence[nn.Module],
    embed: Embeddings,
    body: nn.Module,
    scores: str,
    *,
    masks: Sequence[str],
    last: bool = False,
    rotary: nn.Module | None = None,
) -> Anatomy:
    config = model.config

    def group(which: range) -> nn.Module:
        # Rotary embeddings have no weights. They are copied, so that no two stages move the same module.
        chain = TextBlocks(
            [blocks[i] for i in which], [masks[i] for i in which], config=config, rotary=copy.deepcopy(rotary)
        )
        if which.start:
            return chain
        return nn.Sequential(TextInput(embed, config=config, last=last), chain)

    hidden = torch.empty(2, 4, config.hidden_size, device="meta")
    mask = torch.empty(2, 4, dtype=torch.bool, device="meta")
    s: tuple[Tensor, ...] = (hidden, torch.empty(2, dtype=torch.int64, device="meta"), mask) if last else (hidden, mask)

    def private(count: int, like: int) -> PrivateBlocks:
        return PrivateBlocks(count, model=model, block=blocks[like], at=like, mask=masks[like], rotary=rotary)

    return Anatomy(len(blocks), group, [s] * len(blocks), body, scores, private)


def bert(model: Any, task: str) -> Anatomy:
    """Returns the parts of BERT for sequence classification."""
    trunk = model.bert
    body = BertBody(trunk.pooler, model.dropout)
    return _encoder(model, trunk.encoder.layer, TypedEmbeddings(trunk.embeddings), body, "classifier")


def roberta(model: Any, task: str) -> Anatomy:
    """Returns the parts of RoBERTa or XLM-RoBERTa for sequence classification."""
    trunk, head = model.roberta, model.classifier
    body = DenseBody(head.dense, nn.Tanh(), before=head.dropout, after=head.dropout)
    return _encoder(model, trunk.encoder.layer, TypedEmbeddings(trunk.embeddings), body, "classifier.out_proj")


def distilbert(model: Any, task: str) -> Anatomy:
    """Returns the parts of DistilBERT for sequence classification."""
    trunk = model.distilbert
    body = DenseBody(model.pre_classifier, nn.ReLU(), before=nn.Identity(), after=model.dropout)
    return _encoder(model, trunk.transformer.layer, PlainEmbeddings(trunk.embeddings), body, "classifier")


def _encoder(model: Any, blocks: Sequence[nn.Module], embed: Embeddings, body: nn.Module, scores: str) -> Anatomy:
    return _text(model, blocks, embed, body, scores, masks=["bidirectional"] * len(blocks))


def gpt2(model: Any, task: str) -> Anatomy:
    """Returns the parts of GPT-2, as a language model or for sequence classification."""
    trunk = model.transformer
    embed = GPT2Embeddings(trunk.wte, trunk.wpe, trunk.drop)
    return _decoder(model, task, trunk.h, embed, trunk.ln_f, masks=["full_attention"] * len(trunk.h), rotary=None)


def llama(model: Any, task: str) -> Anatomy:
    """Returns the parts of Llama, Mistral, Qwen 2 or 3, as a language model or for sequence classification."""
    trunk, config = model.model, model.config
    count = len(trunk.layers)
    masks = ["full_attention"] * count
    if config.model_type == "mistral" and config.sliding_window is not None:
        masks = ["sliding_attention"] * count
    elif config.model_type.startswith("qwen"):
        masks = list(config.layer_types)
    embed = PlainEmbeddings(trunk.embed_tokens)
    return _decoder(model, task, trunk.layers, embed, trunk.norm, masks=masks, rotary=trunk.rotary_emb)


def _decoder(
    model: Any,
    task: str,
    blocks: Sequence[nn.Module],
    embed: Embeddings,
    norm: nn.Module,
    *,
    masks: Sequence[str],
    rotary: nn.Module | None,
) -> Anatomy:
    if task == GENERATE:
        return _text(model, blocks, embed, EveryTokenBody(norm), "lm_head", masks=masks, rotary=rotary)
    return _text(model, blocks, embed, LastTokenBody(norm), "score", masks=masks, rotary=rotary, last=True)


class ImageBlocks(nn.Module):
    """A sequence of ViT blocks: ``(B, T, D)`` to the same."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, between which stages may cut."""
        return len(self.blocks)

    def part(self, run: range) -> ImageBlocks:
        """Returns a run of the blocks, with the names that they have here."""
        part = copy.copy(self)
        part._modules = {"blocks": run_of_list(self.blocks, run)}
        return part

    def forward(self, s: Tensor) -> Tensor:
        """Runs the blocks without a mask."""
        for block in self.blocks:
            s = block(s)
        return s


def vit(model: Any, task: str) -> Anatomy:
    """Returns the parts of ViT for image classification; x is ``(B, C, H, W)``."""
    trunk, config = model.vit, model.config

    def group(which: range) -> nn.Module:
        chain = ImageBlocks([trunk.layers[i] for i in which])
        return chain if which.start else nn.Sequential(trunk.embeddings, chain)

    tokens = trunk.embeddings.position_embeddings.shape[1]
    s = torch.empty(2, tokens, config.hidden_size, device="meta")
    count = len(trunk.layers)
    return Anatomy(count, group, [s] * count, ClassTokenBody(trunk.layernorm), "classifier")


def resnet(model: Any, task: str) -> Anatomy:
    """Returns the parts of ResNet for image classification; blocks are the residual blocks, the first including the
    stem."""
    trunk = model.resnet
    blocks = [block for stage in trunk.encoder.stages for block in stage.layers]

    def group(which: range) -> nn.Module:
        chain = [blocks[i] for i in which]
        return nn.Sequential(*(chain if which.start else [trunk.embedder, *chain]))

    body = nn.Sequential(trunk.pooler, model.classifier[0])
    return Anatomy(len(blocks), group, _maps(trunk.embedder, blocks, model.config.num_channels), body, "classifier.1")


@torch.no_grad()
def _maps(stem: nn.Module, blocks: Sequence[nn.Module], channels: int) -> list[Tensor]:
    """Returns the output of each block for an image of the usual size, on the meta device."""
    s = copy.deepcopy(stem).to("meta").eval()(torch.empty(2, channels, 224, 224, device="meta"))
    maps = []
    for block in blocks:
        s = copy.deepcopy(block).to("meta").eval()(s)
        maps.append(s)
    return maps


FAMILIES: dict[str, tuple[Callable[[Any, str], Anatomy], tuple[str, ...]]] = {
    "bert": (bert, (CLASSIFY,)),
    "roberta": (roberta, (CLASSIFY,)),
    "xlm-roberta": (roberta, (CLASSIFY,)),
    "distilbert": (distilbert, (CLASSIFY,)),
    "gpt2": (gpt2, (CLASSIFY, GENERATE)),
    "llama": (llama, (CLASSIFY, GENERATE)),
    "mistral": (llama, (CLASSIFY, GENERATE)),
    "qwen2": (llama, (CLASSIFY, GENERATE)),
    "qwen3": (llama, (CLASSIFY, GENERATE)),
    "vit": (vit, (LOOK,)),
    "resnet": (resnet, (LOOK,)),
}
"""The function and its supported tasks, by ``config.model_type``."""
