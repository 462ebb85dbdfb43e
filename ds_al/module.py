"""An AL network on DeepSpeed's ``PipelineModule``: specs of AL layers, cut into stages."""

from __future__ import annotations

import copy
import importlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import utils as ds_utils
from torch import Tensor, nn

from ds_al.errors import ALConfigError, ALLayerError
from ds_al.group_schedule import Place
from ds_al.layer import ALLayer, predict
from ds_al.objectives import Objective
from ds_al.parallel import worker
from ds_al.parallel.world import join_world
from ds_al.partition.groups import Run, explicit_runs, spread
from ds_al.partition.measure import Found, Measuring, measure_groups, measure_stages
from ds_al.partition.part import LayerPart
from ds_al.partition.plan import describe, explicit
from ds_al.partition.shared import refuse_shared, refuse_shared_by_runs
from ds_al.partition.specs import PartSpec, block_costs, built, check_layers, classes_of, decoder_of, name_of
from ds_al.spec import ALLayerSpec
from ds_al.system.generators import Generators
from ds_al.tensors import Activation


class ALPipelineModule(PipelineModule):
    """A sequence of AL layers, of which every stage builds its own contiguous run.

    Each layer is built with a seed derived from ``base_seed`` and its index, so its weights depend neither on the
    partition nor on the number of stages.

    Args:
        layers: :class:`~ds_al.spec.ALLayerSpec` (built on the rank that holds it) or :class:`~ds_al.layer.ALLayer`.
        num_stages: number of stages; by default the number of processes.
        topology: DeepSpeed's ``ProcessTopology``, instead of ``num_stages``.
        num_classes: ``V``, the width of the one-hot labels that enter the first ``g``.
        base_seed: seed of the weights, of every layer's random numbers, and of the order of the data.
        partition_method: DeepSpeed's ``"uniform"`` and ``"parameters"``; ``"type:<regex>"``, which balances the layers
            whose f, or a block of it, is of a class whose name matches; ``"measured"``, which times every
            layer on every rank at start and selects the partition whose slowest stage is fastest; or ``"cuts:2,5"``,
            the first layers of the stages after the first.
        example: a micro-batch ``x`` of the training size, for ``"measured"``; on every rank.
        config: the DeepSpeed config of the run, for ``"measured"``: layers are timed with its optimizers, steps per
            batch, activation checkpointing and compilation. Without it, layers are timed with a step of AdamW per
            micro-batch.
        memory_limit: bytes of a stage, or of each, for ``"measured"``: of parameters, gradients, optimizer state and
            activations.
        partition_cache: for ``"measured"``: ``"use"`` the measurements of an earlier job with the same layers on the
            same kind of devices, ``"refresh"`` them, or ``"off"`` (see :mod:`ds_al.partition.cache`).
        dynamic_shape: lets the shapes of micro-batches change; costs a small message per micro-batch.
        activation_checkpoint_interval: blocks of f that are recomputed together in backward, see
            :class:`~ds_al.compute.recompute.Recomputed`; 0 keeps all activations. The config's key of this name takes
            precedence.

    Raises:
        ALConfigError: an element is not an AL layer, layers are tied, or the number of stages does not fit.
    """

    parts: list[int]

    def __init__(
        self,
        layers: Sequence[ALLayerSpec | ALLayer],
        num_stages: int | None = None,
        topology: Any = None,
        *,
        num_classes: int,
        base_seed: int = 1234,
        partition_method: str = "uniform",
        dynamic_shape: bool = False,
        activation_checkpoint_interval: int = 0,
        example: Activation | None = None,
        config: Mapping[str, Any] | None = None,
        memory_limit: float | Sequence[float] | None = None,
        partition_cache: Literal["use", "refresh", "off"] = "use",
    ) -> None:
        layers = list(layers)
        _check_seed(base_seed, layers=len(layers))
        self._measuring = None
        if example is not None:
            self._measuring = Measuring(
                example,
                num_classes=num_classes,
                config=config or {},
                memory_limit=memory_limit,
                cache=partition_cache,
                interval=activation_checkpoint_interval,
            )
        elif memory_limit is not None:
            raise ALConfigError('memory_limit is for partition_method "measured", which needs example=x, too')
        self.source: Any = None
        """What the network was made from, where :func:`ds_al.from_pretrained` made it."""
        self.config: Any = None
        """The config of that model of ``transformers``, which loggers read."""
        self.new_parts_first = 0
        """Samples on which parts that are not of that model train alone, while its weights rest."""
        self.partition_table: str | None = None
        """What ``"measured"`` found, to be read."""
        self.runs: list[Run] | None = None
        """What each stage holds where layers span groups of stages, K < P; otherwise ``None``."""
        self._al_layers = layers
        check_layers(layers)
        refuse_shared(enumerate(layers))
        join_world()
        if topology is None:
            num_stages = dist.get_world_size() if num_stages is None else num_stages
            _check_stages(num_stages, processes=dist.get_world_size())
        with Generators().aside(), worker.collectives():  # DeepSpeed seeds all of them for every layer
            super().__init__(
                layers,
                num_stages=num_stages,
                topology=topology,
                seed_layers=True,
                base_seed=base_seed,
                partition_method=partition_method,
                activation_checkpoint_interval=activation_checkpoint_interval,
                dynamic_shape=dynamic_shape,
            )
        self._measuring = None
        self.train()  # parts that were taken over may be in evaluation mode, though the whole is in training mode
        self.num_classes = num_classes
        self._check_objectives()
        refuse_shared(self.local_layers)  # what could not be seen in the specifications
        for index, layer in self.local_layers:
            layer.name = layer.name or _title(index, layer)

    @classmethod
    def from_layers(cls, layers: Sequence[Any], **options: Any) -> ALPipelineModule:
        """Does what :func:`ds_al.from_layers` does, under the name that the first scripts of users call."""
        return importlib.import_module("ds_al").from_layers(layers, **options)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Adds the methods ``measured`` and ``cuts:`` to DeepSpeed's, looks at the classes of f for ``type:``, and cuts
        layers between their blocks where K < P."""
        _check_method(method)
        if self.num_stages > len(self._al_layers):
            self._partition_blocks(method)
            return
        if method.lower() in ("uniform", "parameters"):
            super()._partition_layers(method)
            _check_parts(method, self.parts)
            return
        if method == "measured":
            self.parts = self._measured_parts()
        elif method.startswith("type:"):
            self.parts = self._parts_by_type(method.removeprefix("type:"))
        else:
            self.parts = explicit(method, layers=len(self._layer_specs), stages=self.num_stages)
        _check_parts(method, self.parts)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _parts_by_type(self, pattern: str) -> list[int]:
        """Balances the layers whose f has a block of a class that matches; all are of the class ``ALLayer`` itself."""
        classes = [classes_of(spec) for spec in self._layer_specs]
        known = f"a regular expression over the classes of f: {', '.join(dict.fromkeys(itertools.chain(*classes)))}"
        try:
            found = [any(re.search(pattern, name, re.IGNORECASE) for name in names) for names in classes]
        except re.error as error:
            raise ALConfigError(f"got partition_method='type:{pattern}' ({error}): expected {known}") from None
        if not any(found):
            raise ALConfigError(f"got partition_method='type:{pattern}', which matches no layer: expected {known}")
        return ds_utils.partition_balanced(weights=[int(each) for each in found], num_parts=self.num_stages)

    def _partition_blocks(self, method: str) -> None:
        """Cuts layers between their blocks, and replaces the layers by one part per stage."""
        whole = [built(spec, self.base_seed + i) for i, spec in enumerate(self._al_layers)]
        costs = [block_costs(layer, method) for layer in whole]
        if method == "measured":
            self.runs = self._measured_runs([len(row) for row in costs])
        elif method.startswith("cuts:"):
            self.runs = explicit_runs(method, blocks=[len(row) for row in costs], stages=self.num_stages)
        else:
            self.runs = spread(costs, self.num_stages)
        for index, layer in enumerate(whole):
            if len(own := [run for number, run in self.runs if number == index]) > 1:
                refuse_shared_by_runs(index, layer, own)
        self._layer_specs = [PartSpec(self._al_layers[i], i, run, self.base_seed + i) for i, run in self.runs]
        self.parts = list(range(self.num_stages + 1))
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=stage, stop=stage + 1)

    @property
    def place(self) -> Place | None:
        """The place of this stage in the group of stages that its AL layer spans; ``None`` unless K < P."""
        if self.runs is None:
            return None
        layer = self.runs[self._local_start][0]
        group = [stage for stage, (index, _) in enumerate(self.runs) if index == layer]
        return Place(self._local_start, self.num_stages, self._local_start - group[0], len(group))

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of stages of each AL layer where layers span stages, K < P; otherwise empty."""
        return tuple(Counter(layer for layer, _ in self.runs or ()).values())

    @property
    def group(self) -> range:
        """The stages that the AL layer of this stage spans; this stage alone unless K < P."""
        place = self.place
        return range(self.stage_id, self.stage_id + 1) if place is None else place.group

    @property
    def bounds(self) -> list[int]:
        """``[0, ..., N]``: stage p has the exits of the layers from ``bounds[p]`` up to ``bounds[p + 1]``."""
        if self.runs is None:
            return [int(bound) for bound in self.parts]
        ends = [stage for stage, (a, b) in enumerate(itertools.pairwise([*self.runs, (-1, range(0))])) if a[0] != b[0]]
        return [sum(end < stage for end in ends) for stage in range(self.num_stages + 1)]

    def _measured_parts(self) -> list[int]:
        """The best cut by what each rank measures; the same on all ranks, since all know what all measured."""
        if self._measuring is None:
            raise ALConfigError('partition_method "measured" needs a micro-batch: give ALPipelineModule(example=x)')
        found = measure_stages(
            self._build_for_timing,
            layers=len(self._layer_specs),
            measuring=self._measuring,
            stages=self._ranks_of_stages(),
        )
        self._tell_measured(found, [name_of(spec) for spec in self._layer_specs])
        return found.bounds

    def _measured_runs(self, blocks: Sequence[int]) -> list[Run]:
        """The same by blocks of layers that span stages."""
        if self._measuring is None:
            raise ALConfigError('partition_method "measured" needs a micro-batch: give ALPipelineModule(example=x)')
        units = [(layer, block) for layer, count in enumerate(blocks) for block in range(count)]

        def build(index: int) -> ALLayer:
            layer, block = units[index]
            whole = self._build_for_timing(layer)
            return whole if blocks[layer] == 1 else LayerPart(whole, range(block, block + 1))

        found, runs = measure_groups(build, blocks=blocks, measuring=self._measuring, stages=self._ranks_of_stages())
        self._tell_measured(found, [f"{layer}, block {block}" for layer, block in units])
        return runs

    def _ranks_of_stages(self) -> list[list[int]]:
        return self._topo.get_axis_comm_lists("data") or [[rank] for rank in range(dist.get_world_size())]

    def _tell_measured(self, found: Found, names: Sequence[str]) -> None:
        self.partition_table = describe(found.times, found.bounds, names, steps=found.steps) + f"\n{found.origin}"
        if self.global_rank == 0:
            print(self.partition_table, flush=True)

    def _build_for_timing(self, index: int) -> ALLayer:
        """A layer that may be spoilt: parts that are modules already are to be trained, not timed."""
        spec = self._layer_specs[index]
        return copy.deepcopy(spec if isinstance(spec, ALLayer) else spec.build())

    def _set_bounds(self, start: int | None = None, stop: int | None = None) -> None:
        """DeepSpeed's balanced partition counts in numpy's integers, which no seed can be made of."""
        super()._set_bounds(None if start is None else int(start), None if stop is None else int(stop))

    def build_layer(self, index: int, device: torch.device) -> ALLayer:
        """Builds a layer that another stage holds, to take over its state."""
        layer = built(self._layer_specs[index], self.base_seed + index)
        if any(parameter.is_meta for parameter in layer.parameters()):  # of a model whose weights were freed
            layer.to_empty(device=device)
        layer.name = layer.name or _title(index, layer)
        return layer.to(device)

    def hold(self, parts: Sequence[int], arrived: Mapping[int, ALLayer]) -> None:
        """Changes the partition: gives up the layers that this stage holds no more, and takes those that have arrived.

        Args:
            parts: bounds of the stages, ``[0, ..., N]``.
            arrived: layers that this stage holds from now on, by index.
        """
        layers = {**dict(self.local_layers), **arrived}
        for index, _ in self.local_layers:
            delattr(self, str(index))
        self.parts = list(parts)
        self._set_bounds(start=parts[self.stage_id], stop=parts[self.stage_id + 1])
        indices = range(self._local_start, self._local_stop)
        self.forward_funcs = [layers[index] for index in indices]
        self.fwd_map = {str(index): number for number, index in enumerate(indices)}
        for index in indices:
            self.add_module(str(index), layers[index])

    @property
    def local_layers(self) -> list[tuple[int, ALLayer]]:
        """``(index in the network, layer)`` of this stage's layers, in order; of a part of a layer where K < P."""
        if self.runs is not None:
            return [(self.runs[self._local_start][0], self.forward_funcs[0])]
        return list(enumerate(self.forward_funcs, start=self._local_start))

    @property
    def al_layers(self) -> list[ALLayerSpec | ALLayer]:
        """The layers that this module was made from, whole, whatever the stages are."""
        return list(self._al_layers)

    @property
    def num_layers(self) -> int:
        """Number of AL layers of the whole network, N."""
        return len(self._al_layers)

    @property
    def objective(self) -> Objective:
        """The objective of this stage's first layer; those of all layers are of one class."""
        return self.forward_funcs[0].objective

    def _check_objectives(self) -> None:
        names = {type(layer.objective).__name__ for _, layer in self.local_layers}
        if len(names) > 1:
            raise ALConfigError(
                f"this stage's layers have the objectives {', '.join(sorted(names))}: expected one, since it says "
                "what travels from layer to layer"
            )

    def build_decoders(self, stop: int) -> list[nn.Module]:
        """Builds ``[h_1, ..., h_stop]``, frozen, for weights that other stages send."""
        with Generators().aside():
            decoders = [copy.deepcopy(decoder_of(spec)) for spec in self._al_layers[:stop]]
        for decoder in decoders:
            if any(parameter.is_meta for parameter in decoder.parameters()):  # of a model whose weights were freed
                decoder.to_empty(device="cpu")
        return [decoder.requires_grad_(False).eval() for decoder in decoders]

    def __deepcopy__(self, memo: dict[int, Any]) -> ALPipelineModule:
        """Copies the layers of this stage, for ``torch.optim.swa_utils.AveragedModel`` and the like. The topology, with
        its process groups, is shared; hooks, such as the engine's, are not copied."""
        copied = object.__new__(type(self))
        nn.Module.__init__(copied)
        own = {name: value for name, value in vars(self).items() if name not in vars(copied)}
        copied.__dict__.update(own, training=self.training)
        copied._modules = copy.deepcopy(self._modules, memo)
        copied.forward_funcs = copy.deepcopy(self.forward_funcs, memo)
        return copied

    def label_loss(self, scores: Tensor, target: Tensor) -> Tensor:
        """Loss of label scores ``(B, V)`` against one-hot labels ``(B, V)``: cross-entropy, or with the objective
        ``mse`` the ``D_E`` of the first layer."""
        spec = self._al_layers[0]
        if self._local_start == 0 and self.forward_funcs[0].ends:
            layer = self.forward_funcs[0]
        elif isinstance(spec, ALLayerSpec):
            layer = ALLayer(*(nn.Identity() for _ in "fbgh"), **spec.module_kwargs)
        else:
            layer = spec if isinstance(spec, ALLayer) else spec.build()
        return layer.objective.label_loss(layer, scores, target)

    def forward(self, x: Activation, exit: int | None = None) -> Tensor:
        """Returns label scores ``(B, V)`` if one process holds all layers.

        Raises:
            ALLayerError: the layers are distributed over several processes; use ``engine.predict``.
        """
        if self.num_stages != 1:
            raise ALLayerError(
                f"this process holds {len(self.forward_funcs)} of {self.num_layers} layers: "
                "use engine.predict(x, exit=...)"
            )
        layers = [layer for _, layer in self.local_layers]
        return predict(layers, x, exit=exit, num_classes=self.num_classes)


def _title(index: int, layer: ALLayer) -> str:
    return f"{index} ({type(layer.f).__name__})"


def _check_seed(base_seed: Any, *, layers: int) -> None:
    limit = 2**32 - layers  # numpy's seeds have 32 bits, and a layer's is base_seed plus its index
    if type(base_seed) is not int or not 0 <= base_seed < limit:
        raise ALConfigError(f"got base_seed={base_seed!r}: expected an integer from 0 to {limit - 1}")


def _check_method(method: Any) -> None:
    known = ("uniform", "parameters", "measured")
    if not isinstance(method, str) or not (method.lower() in known or method.startswith(("type:", "cuts:"))):
        raise ALConfigError(
            f"got partition_method={method!r}: expected uniform, parameters, type:<regular expression>, measured or "
            "cuts:2,5"
        )


def _check_parts(method: str, parts: Sequence[int]) -> None:
    sizes = [int(stop) - int(start) for start, stop in itertools.pairwise(parts)]
    if 0 in sizes:
        raise ALConfigError(
            f"partition_method {method!r} gives the stages {sizes} layers: expected at least one each; use fewer "
            "stages, or another method, such as uniform"
        )


def _check_stages(num_stages: int, *, processes: int) -> None:
    if num_stages < 1 or processes % num_stages:
        raise ALConfigError(
            f"{processes} processes for {num_stages} stages: start as many processes as stages, or a multiple of it "
            "for data parallel replicas of the pipeline (deepspeed --num_accelerators N)"
        )
