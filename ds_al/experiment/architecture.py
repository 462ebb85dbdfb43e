"""The network of a run in both forms, AL layers and backprop twin, and what each form costs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import LayerSpec

from ds_al.errors import ALLayerError
from ds_al.experiment.config import ExperimentConfig
from ds_al.experiment.inputs import DataFacts
from ds_al.models import build_al, build_twin
from ds_al.models.cost import network_cost
from ds_al.models.exit_cost import ExitCost, exit_costs
from ds_al.spec import ALLayerSpec


@dataclass(frozen=True)
class Architecture:
    """Builds the layers that an experiment describes for a data set.

    Attributes:
        experiment: the ``"experiment"`` block.
        data: facts of the data set; they give the model its sizes.
    """

    experiment: ExperimentConfig
    data: DataFacts

    def al_layers(self) -> list[ALLayerSpec]:
        """Returns the specs of the AL layers."""
        model = self.experiment.model
        return build_al(model.name, **self._options(), **model.al_options)

    def twin_layers(self) -> list[LayerSpec]:
        """Returns the layers of the backprop twin."""
        model = self.experiment.model
        return build_twin(model.name, **self._options(), **model.twin_options)

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of both forms: those that follow from the data, and the config's."""
        model = self.experiment.model
        return {**self.data.options(model.name), **model.options}

    def cost(self, samples: int) -> dict[str, Any]:
        """Counts ``layers``, and ``rho`` and ``flops`` per sample of a micro-batch (:mod:`ds_al.models.cost`).

        Each is ``None`` where it cannot be counted, with a warning.
        """
        found: dict[str, Any] = {"layers": None, "rho": None, "flops": None}
        try:
            al = self.al_layers()
            found["layers"] = len(al)
            cost = network_cost(al, self.twin_layers(), **self._input(samples))
            found |= {"rho": cost.rho, "flops": cost.flops()}
        except Exception as error:  # a missing figure must not end a run
            warnings.warn(f"rho is not counted: {error}", stacklevel=2)
        return found

    def exit_costs(self, samples: int) -> list[ExitCost] | None:
        """Counts what inference costs at each exit of the AL form; ``None`` where it cannot be counted."""
        try:
            return exit_costs(self.al_layers(), **self._input(samples))
        except ALLayerError as error:
            warnings.warn(f"exits have no cost: {error}", stacklevel=2)
            return None

    def _input(self, samples: int) -> dict[str, Any]:
        """Shape ``(B, ...)`` and type of a micro-batch; texts have their greatest length, so shorter ones cost less."""
        data = self.data
        return {"shape": (samples, *data.shape), "num_classes": len(data.classes), "dtype": data.dtype}
