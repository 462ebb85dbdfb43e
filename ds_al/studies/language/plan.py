"""Plans the runs: trials that choose settings, then every method with every seed, at equal tokens and operations.

All methods have the same number of trials: over the learning rate for the twin, over learning rate and bridge blocks
for the others. Trials are shorter, use seed 0, and are evaluated on validation texts only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_al.studies.language.training import TWIN, Run
from ds_al.studies.runs import Result, RunFile

Form = tuple[str, int]
"""A method and its K."""


@dataclass(frozen=True)
class Plan:
    """Settings of the whole study.

    Attributes:
        methods: objectives in addition to the twin, with their options.
        layers: values of K of each objective.
        seeds: number of seeds.
        steps: steps of the runs at equal tokens.
        trial_steps: steps of the trials.
        twin_rates: learning rates of the twin's trials.
        rates, blocks: learning rates and numbers of bridge blocks (H) of the other methods' trials, all combinations.
    """

    methods: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
        ("next_token", ()),
        ("readout", ()),
        ("token_codes", ()),
    )
    layers: tuple[int, ...] = (2, 4)
    seeds: int = 3
    steps: int = 1000
    trial_steps: int = 250
    twin_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    rates: tuple[float, ...] = (1e-3, 2e-3)
    blocks: tuple[int, ...] = (0, 1)

    def forms(self) -> list[Form]:
        """Returns all forms, the twin first; the twin is the same network for every K and runs once."""
        return [(TWIN, 1), *((method, layers) for layers in self.layers for method, _ in self.methods)]

    def trials(self) -> Iterator[Run]:
        """Yields the trials of all forms."""
        for method, layers in self.forms():
            pairs = [(lr, 0) for lr in self.twin_rates]
            if method != TWIN:
                pairs = [(lr, blocks) for lr in self.rates for blocks in self.blocks]
            for lr, blocks in pairs:
                yield Run(method, layers, 0, lr, self.trial_steps, blocks, self.options(method), "trial")

    def options(self, method: str) -> tuple[tuple[str, Any], ...]:
        """Returns the options of an objective."""
        return dict(self.methods).get(method, ())


def choose(results: Iterable[Result], plan: Plan) -> dict[Form, Result]:
    """Returns the best trial of each form with complete trials, by the last exit's loss on validation texts."""
    found = {result["key"]: result for result in results}
    chosen: dict[Form, Result] = {}
    for form in plan.forms():
        own = [found.get(run.key) for run in plan.trials() if (run.method, run.layers) == form]
        good = [result for result in own if result is not None and "failure" not in result]
        if all(own) and good:
            chosen[form] = min(good, key=lambda result: result["validation_loss"][-1])
    return chosen


def measured_runs(chosen: dict[Form, Result], plan: Plan) -> list[Run]:
    """Returns the runs with the chosen settings, ordered by seed: at equal tokens, then at the twin's operations."""
    equal_tokens = [
        Run(method, layers, seed, trial["lr"], plan.steps, trial["bridge_blocks"], plan.options(method))
        for seed in range(plan.seeds)
        for (method, layers), trial in chosen.items()
    ]
    if (TWIN, 1) not in chosen:
        return equal_tokens
    twin = chosen[TWIN, 1]["operations_per_token"]
    equal_operations = [
        replace(
            run,
            steps=round(run.steps * twin / chosen[run.method, run.layers]["operations_per_token"]),
            budget="operations",
        )
        for run in equal_tokens
        if run.method != TWIN
    ]
    return equal_tokens + equal_operations


def run_all(
    runs: Sequence[Run], file: RunFile, train: Callable[[Run], Result], *, done: Callable[[Run, Result, bool], None]
) -> None:
    """Executes the missing runs and saves each result, or the reason of a failure.

    Args:
        runs: all runs.
        file: file of results.
        train: executes one run.
        done: called with each run, its result, and whether the result already existed.
    """
    found = file.read()
    for run in runs:
        known = run.key in found
        if known:
            result = found[run.key]
        else:
            try:
                result = {"key": run.key, **train(run)}
            except Exception as error:  # a failure is also a result
                result = {"key": run.key, "failure": f"{type(error).__name__}: {error}"}
            file.keep(run.key, result)
        done(run, result, known)
