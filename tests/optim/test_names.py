"""Names of optimizers are known before training, or refused with what to use instead."""

from __future__ import annotations

from typing import Any

import pytest

from ds_al.config.associated_learning import ALConfig
from ds_al.config.optimizers import OptimizerConfig
from ds_al.errors import ALConfigError
from ds_al.optim.names import check


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AdamX", "got 'AdamX', which neither DeepSpeed nor torch.optim has: did you mean 'Adam"),
        ("OneBitAdam", "which neither DeepSpeed nor torch.optim has"),
        ("Optimizer", "which neither DeepSpeed nor torch.optim has"),
        (None, "got None, which neither"),
        ("LBFGS", "evaluates the loss anew.*use another"),
        ("SparseAdam", "sparse gradients alone"),
        ("Muon", 'use "MuonAdamW"'),
    ],
)
def test_what_cannot_train_layers_is_refused_by_name(name: Any, message: str) -> None:
    with pytest.raises(ALConfigError, match=f'"optimizer.type": .*{message}'):
        check({"optimizer": {"type": name}}, ALConfig())


def test_that_of_g_and_h_is_looked_at_too() -> None:
    al = ALConfig(autoencoder_optimizer=OptimizerConfig(type="SDG"))
    with pytest.raises(ALConfigError, match=r'autoencoder_optimizer.type": got .SDG.*did you mean .SGD.'):
        check({}, al)


@pytest.mark.parametrize("name", ["Adam", "adamw", "Lamb", "Lion", "Adagrad", "RMSprop", "NAdam", "SGD", "MuonAdamW"])
def test_names_of_deepspeed_and_torch_pass(name: str) -> None:
    check({"optimizer": {"type": name}}, ALConfig())


def test_back_propagation_takes_what_deepspeed_takes() -> None:
    check({"optimizer": {"type": "LBFGS"}}, ALConfig(method="bp_1f1b"))
