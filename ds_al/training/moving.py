"""``MovingEngine``: layers that move between the stages during training, with all their state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_al.checkpoint import moves
from ds_al.compute.compile import compile_layers
from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError
from ds_al.parallel.agreement import agreed
from ds_al.partition.plan import explicit
from ds_al.partition.rebalance import Rebalance
from ds_al.trace import joint_call
from ds_al.training.saving import SavingEngine


class MovingEngine(SavingEngine):
    """Moves what a :class:`~ds_al.training.saving.SavingEngine` saves."""

    @joint_call
    def repartition(self, bounds: Sequence[int] | str) -> bool:
        """Moves layers between the stages, with all their state; training continues bit for bit. Drains the pipeline.

        Every rank calls it, after the same batch. The layers that move are built anew on their new stage, and the
        stage's LR schedule on every rank: read :attr:`lr_scheduler` again afterwards.

        Args:
            bounds: of the stages, ``[0, ..., N]``, or the first layers of all stages but the first, ``"cuts:2,5"``.

        Returns:
            Whether a layer has moved.

        Raises:
            ALConfigError: on every rank, and nothing has changed: the bounds do not fit, or what the user gave to
                ``initialize`` or changed since cannot follow a layer, nor can a sparse tensor of a layer or its
                optimizer.
        """
        self._refuse_with_recovery("repartition()")
        found = agreed(
            "repartition", lambda: self._checked_bounds(bounds), facts=lambda found: {"bounds": found}, bounded=False
        )
        if found == self.module.bounds:
            return False
        self.flush()
        with self.runner.timed("Repartition"), self.generators.aside():
            former, count = self._parts.report, self.stage.trained_micro_batches
            moved = moves.move(self.state(), found)
            self._make_optimizer_again()
            arrived = [(index, layer) for index, layer in self.module.local_layers if index in moved.arrived]
            self._prepare(arrived)
            if self._compiled is not None:
                compile_layers(arrived, self._compiled, dynamic_shape=self.dynamic_shape)
            self.param_names = {weight: name for name, weight in self.module.named_parameters()}
            self._take_layers(watch=count == 0)
            self.stage.trained_micro_batches = count
            self._parts.report.continue_from(former, layers=found[self.stage_id + 1])
            self.preparation.objective = self.module.objective
            self.inference.reset()
            self.links.reset()
            moves.restore(self.state(), moved)
        return True

    def _move_if_better(self, rebalance: Rebalance) -> None:
        bounds = rebalance.after_batch(self.layers, self.module.bounds, micro_batches=self.micro_batches)
        if bounds is None:
            return
        if self.global_rank == 0 and self.steps_per_print():
            print(f"ds_al: layers move after {self.global_steps} steps: {self.module.bounds} -> {bounds}", flush=True)
        self.repartition(bounds)

    def _check_can_move(self) -> None:
        """Raises :class:`~ds_al.errors.ALConfigError` if something that the user gave cannot follow a layer."""
        given = {
            "more stages than AL layers": self.module.runs is not None,
            "new_parts_first": self.module.new_parts_first > 0,
            f'"{BLOCK}.recovery": a new process could not repeat it': self._recovery is not None,
            "an optimizer instance: give a callable, lambda groups: torch.optim.AdamW(groups)": isinstance(
                self.client_optimizer, torch.optim.Optimizer
            ),
            "model_parameters: freeze the others by requires_grad_(False)": self._selection is not None,
            "an LR schedule instance: give a callable, lr_scheduler=lambda optimizer: ...": not (
                self.client_lr_scheduler is None or callable(self.client_lr_scheduler)
            ),
        }
        for what, is_given in given.items():
            if is_given:
                raise ALConfigError(f"layers cannot change their stage with {what}")

    def _checked_bounds(self, bounds: Sequence[int] | str) -> list[int]:
        self._check_can_move()
        layers, stages = self.module.num_layers, self.num_stages
        text = bounds if isinstance(bounds, str) else f"cuts:{','.join(str(bound) for bound in list(bounds)[1:-1])}"
        found = explicit(text, layers=layers, stages=stages)
        if not isinstance(bounds, str) and list(bounds) != found:
            raise ALConfigError(f"got bounds {list(bounds)}: expected {stages + 1} of them, from 0 to {layers}")
        return found
