"""What an engine is put together from: its channels, its data, and the optimizers of its layers."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch

from ds_al.config.associated_learning import ALConfig
from ds_al.config.precision import BF16Config, Precision
from ds_al.data.loader import ShuffledLoader
from ds_al.errors import ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.optim import muon
from ds_al.optim.local import LocalOptimizer, ParamGroups, trained_parameters
from ds_al.optim.loss_scale import LayerScale
from ds_al.optim.masters import lower
from ds_al.optim.names import NamedOptimizers
from ds_al.optim.zero import Shards
from ds_al.parallel.replicas import Replicas
from ds_al.transport.channel import Receiver, Sender
from ds_al.transport.slow_link import SlowReceiver, SlowSender


class AssembledStage(NamedOptimizers):
    """Mix-in for :class:`~ds_al.engine.ALPipelineEngine`: makes its parts."""

    module: ALPipelineModule
    al: ALConfig
    precision: Precision
    """What the layers compute in."""
    zero_stage: int
    """0, or 1 where copies of a stage share out its optimizer state."""
    _is_made = False
    """Whether DeepSpeed's part of the engine is there: until then it is to know nothing of precision and ZeRO."""

    @cached_property
    def replicas(self) -> Replicas:
        """The data parallel copies of this stage."""
        grid = self.module._grid
        return Replicas(
            grid.get_data_parallel_rank(), grid.get_data_parallel_world_size(), group=grid.get_data_parallel_group()
        )

    def bfloat16_enabled(self) -> bool:
        """Whether the layers compute in bfloat16."""
        return self._is_made and self.precision.dtype is torch.bfloat16

    def fp16_enabled(self) -> bool:
        """Whether the layers compute in float16."""
        return self._is_made and self.precision.dtype is torch.float16

    def zero_optimization_stage(self) -> int:
        """0, or 1 where copies of a stage share out its optimizer state."""
        return self.zero_stage if self._is_made else 0

    def zero_optimization(self) -> bool:
        """Whether :meth:`zero_optimization_stage` is above 0."""
        return self.zero_optimization_stage() > 0

    def _open_channels(self) -> tuple[Sender | None, Receiver | None]:
        common = {"device": self.device, "dynamic": self.dynamic_shape}
        link = self.al.link
        make_sender = Sender if link is None else partial(SlowSender, link=link)
        make_receiver = Receiver if link is None else SlowReceiver
        sender = receiver = None
        if not self.is_last_stage():
            sender = make_sender(
                self.grid.stage_to_global(self.next_stage),
                queue_depth=self.al.queue_depth,
                stages=(self.stage_id, self.next_stage),
                **common,
            )
        if not self.is_first_stage():
            receiver = make_receiver(
                self.grid.stage_to_global(self.prev_stage),
                slots=self.al.receive_slots,
                stages=(self.stage_id, self.prev_stage),
                **common,
            )
        return sender, receiver

    def _loader(self, data: Any) -> ShuffledLoader:
        share = (self.replicas.index, self.replicas.count)
        if not isinstance(data, ShuffledLoader):
            size, seed = self.micro_batch_size, self.module.base_seed
            return ShuffledLoader(data, batch_size=size, seed=seed, collate_fn=self.collate_fn, share=share)
        if data.share != share:
            raise ALConfigError(
                f"got a ShuffledLoader with share={data.share}: expected {share}, or every copy of the pipeline would "
                "train on the same samples"
            )
        return data

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        layers = self.module.local_layers
        if isinstance(client_optimizer, torch.optim.Optimizer):
            if self.precision.is_low or self.zero_stage:
                raise ALConfigError(
                    f"got an optimizer instance ({type(client_optimizer).__name__}) with "
                    + ("mixed precision" if self.precision.is_low else "ZeRO")
                    + ", which steps masters or a part of the weights: give a callable of parameter groups"
                )
            super()._configure_optimizer(client_optimizer, model_parameters)
            return
        shards = None
        if self.zero_stage and self.replicas.count > 1:
            shards = Shards((p for _, layer in layers for p in trained_parameters(layer)), self.replicas)
        scales: dict[int, LayerScale] = {}
        if self.precision.is_low:
            muon.tag_embeddings(self.module)  # masters take the tags over
            lower((layer for _, layer in layers), self.precision.dtype, owned=shards.owns if shards else _all)
            block = self.precision.block
            if not isinstance(block, BF16Config) or block.check_grad_overflow:
                scales = {index: LayerScale(index, self.precision) for index, _ in layers}
        associated = client_optimizer or super()._configure_basic_optimizer
        self.basic_optimizer = self.optimizer = LocalOptimizer(
            layers,
            associated=associated,
            autoencoder=self._autoencoder_optimizer if self.al.autoencoder_optimizer else associated,
            clip=self.al.layer_gradient_clipping,
            scales=scales,
            shards=shards,
        )
        self.optimizer.round_masters()

    def _autoencoder_optimizer(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Lets DeepSpeed build g's and h's optimizer as if it were the one of its own config block."""
        assert self.al.autoencoder_optimizer is not None
        name, params = self._config.optimizer_name, self._config.optimizer_params
        self._config.optimizer_name = _deepspeed_name(self.al.autoencoder_optimizer.type)
        self._config.optimizer_params = dict(self.al.autoencoder_optimizer.params)
        try:
            return super()._configure_basic_optimizer(groups)
        finally:
            self._config.optimizer_name, self._config.optimizer_params = name, params


def _all(parameter: torch.nn.Parameter) -> bool:
    return True


def _deepspeed_name(name: str) -> str:
    """DeepSpeed compares its own optimizers' names in lower case, and takes torch's as they are."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    return name.lower() if name.lower() in DEEPSPEED_OPTIMIZERS else name
