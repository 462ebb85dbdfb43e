"""``MuonAdamW``: Muon on matrices, AdamW on everything else, as one optimizer under one LR schedule.

Muon steps along the momentum with its singular values brought near 1. That is meant for weights that multiply
activations; biases, scales of norms and embeddings go to AdamW. A convolution's kernel ``(out, in, h, w)`` is taken
as the matrix ``(out, in * h * w)``. Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural
networks", 2024.

This file knows no DeepSpeed; :mod:`ds_al.optimizer_names` makes the name ``"MuonAdamW"`` known to a config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.errors import ALConfigError

Params = Iterable[Tensor] | Iterable[dict[str, Any]]

_MUON, _ADAMW = "muon", "adamw"
_MUON_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay", "adjust_lr_fn", "ns_steps")


class MuonAdamW(torch.optim.Optimizer):
    """Steps matrices by ``torch.optim.Muon`` and all other parameters by ``torch.optim.AdamW``.

    A matrix is a parameter of two or more dimensions, unless its attribute ``use_muon`` is ``False`` (DeepSpeed's
    own tag): see :func:`tag_embeddings`, and tag a classifier's weight likewise to leave it to AdamW.

    Each given group becomes up to two of ``param_groups``, told apart by ``"method"``: ``"muon"``, then ``"adamw"``.
    The ``"lr"`` of both is Muon's, and so is what an LR schedule sets: AdamW steps by
    ``adamw_lr * group["lr"] / group["base_lr"]``. So the two keep their ratio under schedules that scale each group's
    rate (``WarmupCosineLR``, torch's) as well as under those that set one rate for all (``WarmupLR``).

    State, by parameter: ``momentum_buffer`` ``(out, rest)`` for a matrix; ``step``, ``exp_avg`` and ``exp_avg_sq`` for
    others; in the parameter's dtype. Defaults are Jordan's for Muon and torch's for AdamW.

    Args:
        params: parameters or parameter groups; a group may have options of its own. Floating point, of any memory
            format, on any device.
        lr: learning rate of Muon, above 0.
        momentum: decay of Muon's running mean of gradients.
        nesterov: look one step ahead along it.
        weight_decay: of matrices; a step shrinks them by the factor ``1 - lr * weight_decay``.
        adjust_lr_fn: ``"original"`` scales the rate of a matrix by ``sqrt(max(1, out / rest))``;
            ``"match_rms_adamw"`` by ``0.2 * sqrt(max(out, rest))``, so that AdamW's rates and decays fit.
        ns_steps: Newton-Schulz iterations, done in bfloat16.
        adamw_lr: learning rate of AdamW where Muon's is ``lr``.
        adamw_betas: decays of AdamW's two running means.
        adamw_eps: added to AdamW's denominator.
        adamw_weight_decay: as ``weight_decay``, of all that AdamW steps.

    Raises:
        ALConfigError: this torch has no Muon.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adjust_lr_fn: str = "original",
        ns_steps: int = 5,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
    ) -> None:
        check_torch()
        self._make_parts()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_steps": ns_steps,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        super().__init__(params, defaults)

    def _make_parts(self) -> None:
        # The two keep nothing between steps: groups, state and gradients are lent to them for each. Neither can be
        # made without a parameter.
        self._muon = torch.optim.Muon([torch.zeros(1, 1)])
        self._adamw = torch.optim.AdamW([torch.zeros(1)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or copied optimizer."""
        super().__setstate__(state)
        self._make_parts()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, split into what Muon steps and what AdamW steps; a group without parameters is left out."""
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        options = {**self.defaults, **param_group}
        _check(options)
        for method in (_MUON, _ADAMW):
            own = [p for p in params if _is_matrix(p) == (method == _MUON)]
            if own:
                super().add_param_group(
                    {**param_group, "params": own, "method": method, "base_lr": options["lr"]},
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all parameters that have a gradient.

        Args:
            closure: evaluates the model anew and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step_muon([group for group in self.param_groups if group["method"] == _MUON])
            self._step_adamw([group for group in self.param_groups if group["method"] == _ADAMW])
        finally:
            for part in (self._muon, self._adamw):  # or they would keep gradients alive
                part.param_groups, part.state = [], defaultdict(dict)
        return loss

    def _step_muon(self, groups: list[dict[str, Any]]) -> None:
        self._muon.param_groups, self._muon.state = [], defaultdict(dict)
        copies: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            matrices = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                matrix = parameter.detach().flatten(1)
                if matrix.data_ptr() != parameter.data_ptr():  # no view: channels last, for one
                    copies.append((parameter, matrix))
                matrix.grad = parameter.grad.detach().flatten(1)
                self._muon.state[matrix] = self.state[parameter]
                matrices.append(matrix)
            own = {key: group[key] for key in _MUON_OPTIONS}
            self._muon.param_groups.append({**self._muon.defaults, **own, "params": matrices})
        self._muon.step()
        for parameter, matrix in copies:
            parameter.copy_(matrix.view(parameter.shape))

    def _step_adamw(self, groups: list[dict[str, Any]]) -> None:
        self._adamw.state = self.state
        self._adamw.param_groups = [
            {
                **self._adamw.defaults,
                "lr": group["adamw_lr"] * (group["lr"] / group["base_lr"]),  # so exact where there is no schedule
                "betas": group["adamw_betas"],
                "eps": group["adamw_eps"],
                "weight_decay": group["adamw_weight_decay"],
                "params": group["params"],
            }
            for group in groups
        ]
        self._adamw.step()


def tag_embeddings(module: nn.Module) -> None:
    """Sets ``use_muon = False`` on the weights of ``nn.Embedding`` and ``nn.EmbeddingBag``, unless they have a tag.

    Their shape is that of a matrix, but a row is looked up, not multiplied. Call it before the optimizer is made;
    an engine that makes ``MuonAdamW`` from its config does.
    """
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and not hasattr(part.weight, "use_muon"):
            part.weight.use_muon = False  # type: ignore[attr-defined]  # DeepSpeed tags in this way, too


def check_torch() -> None:
    """Raises :class:`~ds_al.errors.ALConfigError` where ``torch.optim`` has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise ALConfigError(
            f"MuonAdamW needs torch.optim.Muon, which came with torch 2.9: this is torch {torch.__version__}. Install "
            'torch>=2.9, or use an optimizer of type "AdamW"'
        )


def _is_matrix(parameter: Any) -> bool:
    tensor = parameter[1] if isinstance(parameter, tuple) else parameter  # torch takes (name, parameter), too
    return tensor.ndim >= 2 and getattr(tensor, "use_muon", True)


def _check(options: dict[str, Any]) -> None:
    """AdamW's and Muon's own checks are not reached, since both are made with their defaults."""
    if not options["lr"] > 0:
        raise ValueError(
            f"lr: got {options['lr']}, expected a number above 0: AdamW's rate is kept in proportion to it. Freeze "
            "parameters by requires_grad_(False)"
        )
    for name in ("adamw_lr", "adamw_eps", "weight_decay", "adamw_weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"{name}: got {options[name]}, expected a number of at least 0")
    for name, value in (("momentum", options["momentum"]), *(("adamw_betas", beta) for beta in options["adamw_betas"])):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 0 and below 1")
    if options["adjust_lr_fn"] not in ("original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn: got {options['adjust_lr_fn']!r}, expected 'original' or 'match_rms_adamw'")
    if not 1 <= options["ns_steps"] < 100:
        raise ValueError(f"ns_steps: got {options['ns_steps']}, expected 1 to 99")
