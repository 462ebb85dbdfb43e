"""Forms of a run: associated learning, a backprop pipeline, data parallel replicas of the backprop twin."""

from __future__ import annotations

from ds_al.baseline import data_parallel
from ds_al.config.associated_learning import ALConfig
from ds_al.config.methods import AL_METHODS
from ds_al.experiment.forms.associated import AssociatedLearning
from ds_al.experiment.forms.backprop import BackpropPipeline, BackpropReplicas
from ds_al.experiment.forms.form import Form

__all__ = ["AssociatedLearning", "BackpropPipeline", "BackpropReplicas", "Form", "form_of"]


def form_of(config: ALConfig) -> Form:
    """Returns the form of a run that trains by ``config.method``."""
    if config.method in AL_METHODS:
        return AssociatedLearning(config)
    if config.method == data_parallel.METHOD:
        return BackpropReplicas(config)
    return BackpropPipeline(config)
