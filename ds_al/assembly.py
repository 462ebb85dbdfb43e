"""What an engine is put together from: its channels, its data, and the optimizers of its layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ds_al.config import ALConfig
from ds_al.data.loader import ShuffledLoader
from ds_al.errors import ALConfigError
from ds_al.link import SlowReceiver, SlowSender
from ds_al.module import ALPipelineModule
from ds_al.optimizer import LocalOptimizer, ParamGroups
from ds_al.optimizer_names import NamedOptimizers
from ds_al.replicas import Replicas
from ds_al.transport import Receiver, Sender


class AssembledStage(NamedOptimizers):
    """Mix-in for :class:`~ds_al.engine.ALPipelineEngine`: makes its parts."""

    module: ALPipelineModule
    al: ALConfig
    replicas: Replicas

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
        if isinstance(client_optimizer, torch.optim.Optimizer):
            super()._configure_optimizer(client_optimizer, model_parameters)
            return
        associated = client_optimizer or super()._configure_basic_optimizer
        self.basic_optimizer = self.optimizer = LocalOptimizer(
            self.module.local_layers,
            associated=associated,
            autoencoder=self._autoencoder_optimizer if self.al.autoencoder_optimizer else associated,
            clip=self.al.layer_gradient_clipping,
        )

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


def _deepspeed_name(name: str) -> str:
    """DeepSpeed compares its own optimizers' names in lower case, and takes torch's as they are."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    return name.lower() if name.lower() in DEEPSPEED_OPTIMIZERS else name
