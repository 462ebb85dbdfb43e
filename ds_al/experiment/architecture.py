"""The network of a run in both forms, AL layers and backprop twin, and what each form costs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec

from ds_al.errors import ALConfigError, ALError, ALLayerError
from ds_al.experiment.config import BLOCK, ExperimentConfig
from ds_al.experiment.inputs import DataFacts
from ds_al.models import build_al, build_twin
from ds_al.models.cost import isolated, network_cost
from ds_al.models.exit_cost import ExitCost, exit_costs
from ds_al.spec import ALLayerSpec

_STATES = 4
"""Numbers that training keeps per parameter: itself, its gradient and two of Adam's."""


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

    def check(self, *, is_al: bool) -> None:
        """Builds one form without memory, so that options that make no network are named before ranks build it.

        Raises:
            ALConfigError: a layer cannot be built, has a weight without elements, or is larger than this machine.
        """
        model, largest = self.experiment.model, 0
        options = {**model.options, **(model.al_options if is_al else model.twin_options)}
        specs = self.al_layers() if is_al else self.twin_layers()
        try:
            with isolated("meta"):
                for spec in specs:
                    weights = list(spec.build().parameters())
                    if empty := [tuple(weight.shape) for weight in weights if not weight.numel()]:
                        raise ValueError(f"a weight of shape {empty[0]} has no elements")
                    largest = max(largest, sum(weight.numel() for weight in weights))
        except ALError:
            raise
        except Exception as error:  # of torch and of the layers, which check their arguments by using them
            raise ALConfigError(
                f'"{BLOCK}.model": {model.name!r} cannot be built with {options}: {type(error).__name__}: {error}'
            ) from error
        needed, there = _STATES * 4 * largest, get_accelerator().total_memory()
        if needed > there:
            raise ALConfigError(
                f'"{BLOCK}.model": {model.name!r} with {options} has a layer of {largest:,} parameters. With '
                f"gradients and the state of Adam these are {needed / 2**30:,.0f} GiB, and a rank has "
                f"{there / 2**30:,.0f} GiB: make it smaller"
            )

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
