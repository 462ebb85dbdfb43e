"""What a stage makes for the layers that it holds, and makes anew when layers move to or from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_al.batch import BatchPreparation
from ds_al.config.associated_learning import ALConfig
from ds_al.decoders import DecoderCopies
from ds_al.group.run import GroupRun
from ds_al.group.stage import GroupStage
from ds_al.group.together import Together
from ds_al.local_run import LocalRun
from ds_al.module import ALPipelineModule
from ds_al.optim.held import Held
from ds_al.optim.local import LocalOptimizer
from ds_al.optim.unused import UnusedWeights
from ds_al.parallel.replicas import Replicas
from ds_al.parallel.topology import StageTopology
from ds_al.partition.part import LayerPart
from ds_al.stage import LocalStage
from ds_al.system.generators import Generators
from ds_al.tensors import Activation, Target
from ds_al.trace import Recording, Report, StageCounters
from ds_al.transport.compression import Compression
from ds_al.transport.neighbours import Links


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the parts of a stage refer to, and what stays when layers move."""

    al: ALConfig
    topology: StageTopology
    replicas: Replicas
    device: torch.device
    dynamic_shape: bool
    """Whether micro-batches may have different shapes."""
    preparation: BatchPreparation
    links: Links
    compression: Compression
    counters: StageCounters
    generators: Generators
    recording: Recording
    load: Callable[[], tuple[Activation, Target]]
    """Loads the next micro-batch, on the first stage."""
    scale: Callable[[], float]
    """Returns the factor of a micro-batch's losses."""
    found: Callable[[int, int, str], None] | None
    """Told of numbers that are not finite; see :meth:`ds_al.optim.stop.SaveAndStop.found`."""


class StageParts:
    """The parts of a stage.

    Args:
        module: the network.
        optimizer: of the stage; ``None`` if nothing trains it.
        around: what stays when layers move.
        watch: whether the next batch is the first one, in which each trained weight must get a gradient.

    Attributes:
        layers: ``(index in the network, layer)`` of this stage.
        stage: computes.
        run: executes the instructions of the layers.
        report: losses and metrics of this stage and those before it.
        unused: finds weights that never get a gradient.
        held: lets pretrained weights rest at first.
        decoder_copies: of earlier layers, where the objective decodes while it trains.
        together: one step of a whole group of stages.
    """

    def __init__(
        self,
        module: ALPipelineModule,
        *,
        optimizer: LocalOptimizer | None,
        around: Surroundings,
        watch: bool = True,
    ) -> None:
        al, topology = around.al, around.topology
        self.layers = module.local_layers
        index, part = self.layers[0]
        common: dict[str, Any] = {
            "stage_id": topology.stage,
            "base_seed": module.base_seed,
            "device": around.device,
            "number": around.replicas.number,
            "loss_scales": optimizer.scales if optimizer is not None else {},
            "fixed_shapes": topology.stages > 1 and not around.dynamic_shape,
            "generators": around.generators,
            "recording": around.recording,
            "skips": al.non_finite != "raise",
            "found": around.found,
        }
        if optimizer is not None:
            around.counters.skips = lambda: optimizer.skipped
        place = module.place
        self.stage: LocalStage
        if place is not None and place.size > 1 and isinstance(part, LayerPart):
            self.stage = GroupStage(index, part, place=place, split=al.group_schedule != "1f1b", **common)
        else:
            self.stage = LocalStage(self.layers, **common)
        self.unused = UnusedWeights(
            self.layers,
            optimizer=optimizer,
            stage_id=topology.stage,
            allowed=al.unused_parameters if watch else "allow",
        )
        self.held: Held | None = None
        if optimizer is not None and module.new_parts_first:
            self.held = Held((layer for _, layer in self.layers), samples=module.new_parts_first)
        self.decoder_copies: DecoderCopies | None = None
        if module.objective.needs_earlier_decoders:
            self.decoder_copies = DecoderCopies(
                self.layers,
                decoders=around.preparation.on_device(
                    module.build_decoders(index + sum(layer.ends for _, layer in self.layers))
                ),
                channels=around.links.decoders,
            )
        self.report = Report(
            stages=topology.stages,
            layers=module.num_layers,
            stage=topology.stage,
            first_layer=index,
            device=around.device,
        )
        common = {
            "load": around.load,
            "links": around.links,
            "compression": around.compression,
            "report": self.report,
            "target_tensors": around.preparation.objective.target_tensors,
            "scale": around.scale,
            "counters": around.counters,
        }
        self.run: LocalRun | GroupRun
        self.together: Together | None = None
        if isinstance(self.stage, GroupStage):
            self.run = GroupRun(self.stage, **common)
            if al.group_step == "together" and optimizer is not None:
                optimizer.together = self.together = Together(around.links, device=around.device)
        else:
            self.run = LocalRun(self.stage, **common)
