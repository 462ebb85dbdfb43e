"""``OptimizerEngine``: DeepSpeed's pipeline engine, whose optimizer steps each local layer of a stage by itself.

DeepSpeed's constructor makes optimizer and LR schedule by the methods here, when only settings, topology, module and
selection are there.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_al import host
from ds_al.config.optimizers import OptimizerConfig
from ds_al.config.settings import Settings
from ds_al.module import ALPipelineModule
from ds_al.optim import build, schedules
from ds_al.optim.accepted import required
from ds_al.optim.groups import ParamGroups, Selection
from ds_al.optim.local import Factory, LocalOptimizer
from ds_al.optim.names import NamedOptimizers
from ds_al.parallel.replicas import Replicas


class OptimizerEngine(NamedOptimizers):
    """Makes the optimizer of one stage; base of :class:`~ds_al.training.engine.TrainingEngine`.

    Private names of DeepSpeed that it overrides or uses (runtime/engine.py, 0.19.0 and 0.19.8): ``_config``,
    ``_configure_optimizer``, ``_configure_basic_optimizer``, ``_configure_lr_scheduler``.

    Attributes:
        settings: the config, validated.
        replicas: of this stage.
        optimizer: of the local layers; ``None`` while the constructor runs, and without one.
    """

    module: ALPipelineModule
    settings: Settings
    replicas: Replicas
    client_optimizer: Any
    optimizer: LocalOptimizer | None
    _selection: Selection | None

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        """Makes the optimizer of the local layers."""
        self.basic_optimizer = self.optimizer = build.local_optimizer(
            self.module.local_layers,
            settings=self.settings,
            replicas=self.replicas,
            given=client_optimizer,
            by_config=self._factory,
            selection=self._selection,
        )

    def _configure_lr_scheduler(self) -> None:
        """Makes the LR schedule as DeepSpeed does; what it or torch raises becomes an error that names the schedule."""
        with schedules.made(self._config, given=self.client_lr_scheduler, instance=self.client_optimizer):
            super()._configure_lr_scheduler()
        schedules.check_made(self.lr_scheduler)

    def _make_optimizer_again(self) -> None:
        """Makes optimizer and LR schedule for the layers that this stage holds now; the optimizer stays the object that
        it was."""
        former, precision = self.optimizer, self.settings.precision
        if former is None:
            return
        host.set_precision(self._config, dtype=torch.float32, zero_stage=0)  # as in DeepSpeed's constructor
        try:
            self._configure_optimizer(self.client_optimizer, None)
        finally:
            host.set_precision(self._config, dtype=precision.dtype, zero_stage=self.settings.zero_stage)
        former.become(required(self.optimizer))
        self.basic_optimizer = self.optimizer = former
        self._configure_lr_scheduler()

    def get_lr(self) -> list[float]:
        """Returns the learning rates of this stage's parameter groups; ``[0.0]`` if it trains nothing."""
        return super().get_lr() or [0.0]

    def _factory(self, block: OptimizerConfig | None) -> Factory:
        """Makes optimizers by a block of the config, as DeepSpeed makes that of ``"optimizer"``."""
        if block is None:
            return self._configure_basic_optimizer

        def make(groups: ParamGroups) -> torch.optim.Optimizer:
            given, self.client_optimizer = self.client_optimizer, None  # it would name the optimizer
            try:
                with host.optimizer_block(self._config, type=block.type, params=block.params):
                    return self._configure_basic_optimizer(groups)
            finally:
                self.client_optimizer = given

        return make
