"""State of a stage that a checkpoint saves and restores; the engine builds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ds_al.data.loader import ShuffledLoader
from ds_al.decoders import DecoderCopies
from ds_al.layer import ALLayer
from ds_al.module import ALPipelineModule
from ds_al.optim.local import LocalOptimizer
from ds_al.optim.skip import LayerSkip
from ds_al.parallel.topology import StageTopology
from ds_al.trace.metrics import Report


@dataclass
class StageState:
    """State of one stage between two batches. Loading modifies its parts in place, and sets :attr:`counters`.

    Attributes:
        topology: place of this rank.
        module: the network.
        optimizer: the optimizer of the stage, or ``None`` for an engine that does not train.
        lr_scheduler: the LR schedule, or ``None``.
        report: the latest losses, and all losses since they were last gathered.
        decoder_copies: copies of decoders, if the objective requires them.
        loader: data loader of the first stage, if ds_al created it or the user's can seek.
        micro_batch_size: samples per micro-batch.
        step_after: after what an optimizer steps: ``"batch"`` or ``"micro_batch"`` by default, or as the ``"config"``
            says.
        counters: numbers of steps, samples and micro-batches, by name.
        device: device of the stage.
        loaded_stages: number of stages of the loaded checkpoint.
    """

    topology: StageTopology
    module: ALPipelineModule
    optimizer: LocalOptimizer | None
    lr_scheduler: Any
    report: Report
    decoder_copies: DecoderCopies | None
    loader: ShuffledLoader | None
    micro_batch_size: int
    step_after: Literal["batch", "micro_batch", "config"]
    counters: dict[str, int]
    device: torch.device
    loaded_stages: int | None = None

    @property
    def layers(self) -> Sequence[tuple[int, ALLayer]]:
        """``(index in the network, layer)`` of the stage."""
        return self.module.local_layers

    @property
    def stage(self) -> int:
        """Index of the stage."""
        return self.topology.stage

    @property
    def scales(self) -> Mapping[int, LayerSkip]:
        """Loss scales by layer index, or what leaves out steps."""
        return {} if self.optimizer is None else self.optimizer.scales
