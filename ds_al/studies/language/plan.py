"""Which runs are run: trials that choose settings, then every method with every seed, at equal tokens and operations.

Every method has as many trials as every other: the twin by its learning rate alone, the others by learning rate and
bridge blocks. Trials are shorter, have seed 0, and see validation text alone.
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
    """Of a whole table.

    Attributes:
        methods: objectives beside the twin, with their options.
        layers: K of each of them.
        seeds: how many.
        steps: of the runs at equal tokens.
        trial_steps: of the trials.
        twin_rates: learning rates that the twin's trials have.
        rates, blocks: those of the other methods, and H; each with each.
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
        """The twin first. It is the same network for every K, and is run once."""
        return [(TWIN, 1), *((method, layers) for layers in self.layers for method, _ in self.methods)]

    def trials(self) -> Iterator[Run]:
        """Of all forms."""
        for method, layers in self.forms():
            pairs = [(lr, 0) for lr in self.twin_rates]
            if method != TWIN:
                pairs = [(lr, blocks) for lr in self.rates for blocks in self.blocks]
            for lr, blocks in pairs:
                yield Run(method, layers, 0, lr, self.trial_steps, blocks, self.options(method), "trial")

    def options(self, method: str) -> tuple[tuple[str, Any], ...]:
        """Of an objective."""
        return dict(self.methods).get(method, ())


def choose(results: Iterable[Result], plan: Plan) -> dict[Form, Result]:
    """The best trial of each form that has all of its trials, by the last exit's loss on validation text."""
    found = {result["key"]: result for result in results}
    chosen: dict[Form, Result] = {}
    for form in plan.forms():
        own = [found.get(run.key) for run in plan.trials() if (run.method, run.layers) == form]
        good = [result for result in own if result is not None and "failure" not in result]
        if all(own) and good:
            chosen[form] = min(good, key=lambda result: result["validation_loss"][-1])
    return chosen


def measured_runs(chosen: dict[Form, Result], plan: Plan) -> list[Run]:
    """Cells with the chosen settings, seed by seed: at equal tokens, then at as many operations as the twin has."""
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
    """Runs what is not there yet, and keeps each result; what fails is kept with its reason.

    Args:
        file: of results.
        train: runs one.
        done: told of each run, of its result, and whether it was there already.
    """
    found = file.read()
    for run in runs:
        known = run.key in found
        if known:
            result = found[run.key]
        else:
            try:
                result = {"key": run.key, **train(run)}
            except Exception as error:  # a failure is a result, too
                result = {"key": run.key, "failure": f"{type(error).__name__}: {error}"}
            file.keep(run.key, result)
        done(run, result, known)
