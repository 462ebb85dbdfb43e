"""``MuonAdamW``: Muon on matrices, AdamW on all other parameters, as one optimizer under one LR schedule.

Muon steps along the orthogonalized momentum, whose singular values are near 1. It is meant for weights that multiply
activations; AdamW steps biases, scales of norms and embeddings. A convolution kernel ``(out, in, h, w)`` is treated
as the matrix ``(out, in * h * w)``. Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural
networks", 2024.

This file is independent of DeepSpeed; :mod:`ds_al.optim.names` adds the name ``"MuonAdamW"`` to the config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Params = Iterable[Tensor] | Iterable[dict[str, Any]]

_MUON, _ADAMW = "muon", "adamw"
_NS_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Coefficients of the quintic iteration: the largest slope at 0 for which singular values still converge near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class MuonAdamW(torch.optim.Optimizer):
    """Steps matrices by Muon, as ``torch.optim.Muon`` does, and all other parameters by ``torch.optim.AdamW``.

    A matrix is a parameter of two or more dimensions, unless its attribute ``use_muon`` is ``False`` (DeepSpeed's
    own tag): see :func:`tag_embeddings`; tag a classifier's weight likewise to train it with AdamW.

    Each group is split into up to two ``param_groups`` with a key ``"method"``: ``"muon"``, then ``"adamw"``.
    The ``"lr"`` of both is Muon's, and an LR schedule sets Muon's rate: AdamW steps with
    ``adamw_lr * group["lr"] / group["base_lr"]``. The two rates thus keep their ratio under schedules that scale each
    group's rate (``WarmupCosineLR``, torch's) as well as under those that set one rate for all groups (``WarmupLR``).

    State, by parameter: ``momentum_buffer`` ``(out, rest)`` for a matrix; ``step``, ``exp_avg`` and ``exp_avg_sq`` for
    others; in the parameter's dtype. Defaults are Jordan's for Muon and torch's for AdamW.

    Args:
        params: parameters or parameter groups; a group may have options of its own. Floating point, of any memory
            format, on any device.
        lr: learning rate of Muon, above 0.
        momentum: decay of Muon's running mean of gradients.
        nesterov: whether to use Nesterov momentum.
        weight_decay: weight decay of matrices; a step multiplies them by ``1 - lr * weight_decay``.
        adjust_lr_fn: ``"original"`` scales the rate of a matrix by ``sqrt(max(1, out / rest))``;
            ``"match_rms_adamw"`` by ``0.2 * sqrt(max(out, rest))``, so that AdamW's rates and decays can be reused.
        ns_steps: number of Newton-Schulz iterations.
        ns_dtype: dtype of these iterations, ``"bfloat16"`` or ``"float32"``; ``"auto"`` is bfloat16 on an accelerator,
            as in ``torch.optim.Muon``, and float32 on a CPU, since most CPUs compute bfloat16 many times slower.
        adamw_lr: learning rate of AdamW while Muon's rate is ``lr``.
        adamw_betas: decays of AdamW's two running means.
        adamw_eps: added to AdamW's denominator.
        adamw_weight_decay: weight decay of the parameters that AdamW steps.

    Raises:
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
        ns_dtype: str = "auto",
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
    ) -> None:
        self._make_adamw()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        super().__init__(params, defaults)

    def _make_adamw(self) -> None:
        # It keeps nothing between steps: each step sets its groups and state. It cannot be created without a parameter.
        self._adamw = torch.optim.AdamW([torch.zeros(1)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or copied optimizer."""
        super().__setstate__(state)
        self._make_adamw()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, split into parameters for Muon and for AdamW; an empty part is omitted."""
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
        """Performs one step of all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["method"] == _MUON:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, group)
        try:
            self._step_adamw([group for group in self.param_groups if group["method"] == _ADAMW])
        finally:  # otherwise it would keep gradients alive
            self._adamw.param_groups, self._adamw.state = [], defaultdict(dict)
        return loss

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad, beta = parameter.grad.flatten(1), group["momentum"]  # type: ignore[union-attr]  # there is one
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        mean = state["momentum_buffer"].lerp_(grad, 1 - beta)
        along = grad.lerp(mean, beta) if group["nesterov"] else mean
        dtype = _NS_DTYPES[group["ns_dtype"]] or (torch.float32 if grad.device.type == "cpu" else torch.bfloat16)
        direction = orthogonalized(along, steps=group["ns_steps"], dtype=dtype)
        out, rest = grad.shape
        scale = max(1, out / rest) ** 0.5 if group["adjust_lr_fn"] == "original" else 0.2 * max(out, rest) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _step_adamw(self, groups: list[dict[str, Any]]) -> None:
        self._adamw.state = self.state
        self._adamw.param_groups = [
            {
                **self._adamw.defaults,
                "lr": group["adamw_lr"] * (group["lr"] / group["base_lr"]),  # this order is exact without a schedule
                "betas": group["adamw_betas"],
                "eps": group["adamw_eps"],
                "weight_decay": group["adamw_weight_decay"],
                "params": group["params"],
                # On CPU fused is much faster for many small tensors (docs/performance.md); elsewhere torch chooses.
                "fused": all(p.device.type == "cpu" for p in group["params"]) or None,
            }
            for group in groups
        ]
        for parameter in (p for group in groups for p in group["params"]):
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                # The fused step assumes equal strides.
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        self._adamw.step()


def tag_embeddings(module: nn.Module) -> None:
    """Sets ``use_muon = False`` on the weights of ``nn.Embedding`` and ``nn.EmbeddingBag``, unless they have a tag.

    They have the shape of a matrix, but their rows are indexed, not multiplied. Call it before the optimizer is
    created; an engine that creates ``MuonAdamW`` from its config does so.
    """
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and not hasattr(part.weight, "use_muon"):
            part.weight.use_muon = False  # type: ignore[attr-defined]  # DeepSpeed tags in this way, too


def orthogonalized(matrix: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Returns a matrix with its singular values brought near 1, by Newton-Schulz iterations ``X <- p(X X^T) X``.

    Source: K. Jordan et al. (2024). In bfloat16 the result is bit-identical to ``torch.optim.Muon``. In wider types the
    iteration runs on the small Gram matrix ``G = X X^T`` alone, since ``p(G) G p(G)`` is the next one, and X is
    multiplied once: two to three times faster for matrices several times as long as wide. G squares the singular
    values, for which bfloat16 lacks precision.

    Args:
        matrix: ``(out, rest)``, floating point.
        steps: number of iterations.
        dtype: dtype of the computation and of the result ``(out, rest)``.
    """
    x = matrix.to(dtype, copy=True)
    if x.size(0) > x.size(1):
        x = x.T
    x.div_(x.norm().clamp(min=1e-7))  # no singular value above 1
    x = _iterated(x, steps) if dtype == torch.bfloat16 else _iterated_gram(x @ x.T, steps) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


def _iterated(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def _iterated_gram(gram: Tensor, steps: int) -> Tensor:
    """Returns the product of ``p(G)`` over all steps."""
    product = None
    for step in range(steps):
        p = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        p.diagonal().add_(_A)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ gram @ p
    assert product is not None
    return product


def _is_matrix(parameter: Any) -> bool:
    tensor = parameter[1] if isinstance(parameter, tuple) else parameter  # torch also accepts (name, parameter)
    return tensor.ndim >= 2 and getattr(tensor, "use_muon", True)


def _check(options: dict[str, Any]) -> None:
    """Checks all options; torch's own check is not reached, since its AdamW is created with defaults."""
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
    if options["ns_dtype"] not in _NS_DTYPES:
        raise ValueError(f"ns_dtype: got {options['ns_dtype']!r}, expected one of {', '.join(_NS_DTYPES)}")
    if not 1 <= options["ns_steps"] < 100:
        raise ValueError(f"ns_steps: got {options['ns_steps']}, expected 1 to 99")
