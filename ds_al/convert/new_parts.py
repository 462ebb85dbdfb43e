"""New parts of a converted network, beside those of the model: how they start.

New bridges, codes and classifiers start from random numbers. Two means keep their first gradients from changing what
the model has learned: ``from_pretrained(new_parts_first=N)``, where they train alone on the first N samples
(:mod:`ds_al.optim.held`), and a higher learning rate of their own (:func:`ds_al.convert.parameter_groups`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_al.errors import ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.optim.held import pretrained_weights


def groups(network: nn.Module, *, lr: float, new_lr: float) -> list[dict[str, Any]]:
    """Returns the groups of :func:`ds_al.convert.parameter_groups`."""
    own = set(pretrained_weights(network))
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    both = [
        {"params": [weight for weight in trained if weight in own], "lr": lr, "name": "pretrained"},
        {"params": [weight for weight in trained if weight not in own], "lr": new_lr, "name": "new"},
    ]
    return [group for group in both if group["params"]]


def set_samples(module: ALPipelineModule, new_parts_first: Any) -> None:
    """Sets the number of samples on which new parts train alone.

    Raises:
        ALConfigError: it is not a whole number of 0 or more, or an AL layer spans several stages, between which
            gradients are messages of one form.
    """
    if not isinstance(new_parts_first, int) or isinstance(new_parts_first, bool) or new_parts_first < 0:
        raise ALConfigError(
            f"got new_parts_first={new_parts_first!r}: expected a number of samples, 0 to train all from the start"
        )
    if new_parts_first and module.runs is not None and not module.dynamic_shape:
        raise ALConfigError(
            f"got new_parts_first={new_parts_first} for an AL layer on several stages: expected dynamic_shape=True, "
            "since no gradient is sent between its stages while the model's weights rest; or as many stages as layers"
        )
    module.new_parts_first = new_parts_first
