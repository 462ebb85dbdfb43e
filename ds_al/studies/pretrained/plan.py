"""Plans the runs: trials that choose the learning rate, then every method with every seed.

Every form (texts, method, what trains) has a trial at each rate, with its least K, seed 0 and fewer texts; the
best validation accuracy of the last exit decides for all of its K.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ds_al.studies.pretrained.training import BY_WORK, TWIN, Adapt, Run, Settings
from ds_al.studies.runs import Result

Form = tuple[str, str, Adapt]
"""Texts, method, what of the model trains."""


@dataclass(frozen=True)
class Plan:
    """Settings of the whole study.

    Attributes:
        data: names of the texts.
        methods: objectives in addition to back-propagation.
        adapt: what trains; other than all of the model by back-propagation and the first objective alone, with frozen
            blocks and the least K also by work.
        layers: values of K.
        seeds: number of seeds.
        samples, trial_samples: texts of a run and of a trial.
        rates: learning rates of the trials.
        adapter_rates: the same of adapters, which start at zero and hardly move at rates of pretrained weights.
        pooling: what the head reads, ``None`` for what the model's class reads.
        settings: what all runs share.
    """

    data: tuple[str, ...] = ("ag-news", "imdb", "imdb-short")
    methods: tuple[str, ...] = ("greedy", "contrast", "decoded", "mse")
    adapt: tuple[Adapt, ...] = ("all", "frozen", "lora")
    layers: tuple[int, ...] = (2, 3, 6)
    seeds: int = 3
    samples: int = 3200
    trial_samples: int = 1600
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    adapter_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    pooling: str | None = None
    settings: Settings = field(default_factory=Settings)

    def forms(self) -> list[Form]:
        """Returns all forms, text by text, back-propagation first."""
        return [
            (data, method, adapt)
            for data in self.data
            for adapt in self.adapt
            for method in (TWIN, *self._local_methods(adapt))
        ]

    def _local_methods(self, adapt: Adapt) -> tuple[str, ...]:
        first = self.methods[0]
        return {"all": self.methods, "frozen": (first, first + BY_WORK), "lora": (first,)}[adapt]

    def depths(self, form: Form) -> tuple[int, ...]:
        """Returns the values of K of a form."""
        if form[1] == TWIN:
            return (1,)
        return (min(self.layers),) if form[1].endswith(BY_WORK) else self.layers

    def trials(self) -> Iterator[Run]:
        """Yields the trials of all forms."""
        for form in self.forms():
            for lr in self.adapter_rates if form[2] == "lora" else self.rates:
                yield Run(*form, min(self.depths(form)), 0, lr, self.trial_samples, "trial", self.pooling)

    def runs(self, results: Iterable[Result]) -> list[Run]:
        """Returns the runs of all forms with complete trials, ordered by seed."""
        rates = self.chosen(results)
        return [
            Run(*form, depth, seed, lr, self.samples, "run", self.pooling)
            for seed in range(self.seeds)
            for form, lr in rates.items()
            for depth in self.depths(form)
        ]

    def at(self, rates: Iterable[float]) -> list[Run]:
        """Returns the runs of all forms at some rates, whatever the trials have chosen."""
        return [
            Run(*form, depth, seed, lr, self.samples, "run", self.pooling)
            for seed in range(self.seeds)
            for form in self.forms()
            for depth in self.depths(form)
            for lr in rates
        ]

    def chosen(self, results: Iterable[Result]) -> dict[Form, float]:
        """Returns the learning rate of each form with complete trials."""
        found = {result["key"]: result for result in results if "failure" not in result}
        rates = {}
        for form in self.forms():
            own = [run for run in self.trials() if (run.data, run.method, run.adapt) == form]
            if all(run.key in found for run in own):
                best = max(own, key=lambda run: found[run.key]["validation_accuracy"][-1])
                rates[form] = best.lr
        return rates
