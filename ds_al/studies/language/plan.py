"""Plans the runs: trials that choose settings, then every method with every seed at each budget.

All local methods have the same number of trials, over learning rate and bridge blocks, shorter than the runs; the twins
have one more, over the learning rate, of full length, since short trials chose a rate that is too low for them. Trials
use seed 0 and are evaluated on validation texts only.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ds_al.studies.language.training import TWIN, Run
from ds_al.studies.runs import Result

BUDGETS = ("tokens", "operations", "longer")
"""What equals the twin's: tokens, operations, or operations of a training that is several times longer."""

Form = tuple[str, int]
"""A method and its K."""


class Method(NamedTuple):
    """A method in addition to the twin, and the settings of its trials, all combinations.

    Attributes:
        name: name of the method, and of its objective unless ``objective`` has a ``"name"``.
        objective: options of the objective.
        code_width: width K of the codes that private heads read; ``None`` for that of the model.
        rates, blocks: learning rates and numbers of bridge blocks (H).
        layers: values of K; ``None`` for those of the plan. With K = 1 it is the twin with another loss.
    """

    name: str
    objective: tuple[tuple[str, Any], ...] = ()
    code_width: int | None = None
    rates: tuple[float, ...] = (1e-3, 2e-3)
    blocks: tuple[int, ...] = (0, 1)
    layers: tuple[int, ...] | None = None


BARE = Method("bare", objective=(("name", "next_token"),), rates=(1e-3, 2e-3, 3e-3, 4e-3), blocks=(0,))
"""``next_token`` without private blocks."""
QUARTER = BARE._replace(name="quarter", objective=(*BARE.objective, ("token_share", 0.25)))
"""The same, whose layers before the last learn from a quarter of the tokens."""
SAMPLED = BARE._replace(name="sampled", objective=(*BARE.objective, ("vocabulary_share", 0.25)))
"""``bare``, whose layers before the last compute the softmax over a quarter of the vocabulary."""
SAMPLED_ALL = SAMPLED._replace(name="sampled_all", objective=(*SAMPLED.objective, ("last_layer", True)))
"""The same, the last layer, too."""
TWIN_SAMPLED = SAMPLED_ALL._replace(name="backprop_sampled", layers=(1,), rates=(5e-4, 1e-3, 2e-3, 3e-3, 4e-3))
"""The twin with that loss: an AL network of one layer."""
LIGHT = QUARTER._replace(name="light", code_width=32)
"""The same with heads that read narrow codes."""


@dataclass(frozen=True)
class Plan:
    """Settings of the whole study.

    Attributes:
        methods: methods in addition to the twin.
        layers: values of K of each objective.
        seeds: number of seeds.
        steps: steps of the runs at equal tokens.
        trial_steps: steps of the trials of local methods.
        twin_rates: learning rates of the twin's trials.
        longer: how many times longer the longer runs are; 0 for none.
        in_longer: methods that have longer runs.
        longer_rates: learning rates of their trials, which are the runs of seed 0.
    """

    methods: tuple[Method, ...] = (
        Method("next_token"), Method("readout"), Method("token_codes"), BARE, QUARTER, LIGHT, SAMPLED,
        SAMPLED_ALL, TWIN_SAMPLED,
    )  # fmt: skip
    layers: tuple[int, ...] = (2, 4)
    seeds: int = 3
    steps: int = 1000
    trial_steps: int = 250
    twin_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 3e-3, 4e-3)
    longer: int = 4
    in_longer: tuple[str, ...] = (TWIN, TWIN_SAMPLED.name, SAMPLED_ALL.name)
    longer_rates: tuple[float, ...] = (2e-3, 3e-3, 4e-3)

    def forms(self) -> list[Form]:
        """Returns all forms, the twin first; the twin is the same network for every K and runs once."""
        return [(TWIN, 1), *((method.name, layers) for layers, method in self._pairs())]

    def _pairs(self) -> list[tuple[int, Method]]:
        depths = sorted({*self.layers, *(layers for method in self.methods for layers in method.layers or ())})
        return [
            (layers, method)
            for layers in depths
            for method in self.methods
            if layers in (self.layers if method.layers is None else method.layers)
        ]

    def runs(self, method: str, budget: str) -> bool:
        """Whether a method is measured at a budget; at that of operations the twin would be the same run again."""
        if budget == "longer":
            return self.longer > 0 and method in self.in_longer
        return budget == "tokens" or method != TWIN

    def trials(self) -> Iterator[Run]:
        """Yields the trials of all forms."""
        for lr in self.twin_rates:
            yield Run(TWIN, 1, 0, lr, self.steps, budget="trial")
        for layers, method in self._pairs():
            for lr in method.rates:
                for blocks in method.blocks:
                    steps = self.steps if layers == 1 else self.trial_steps
                    yield self.run(method.name, layers, 0, lr, steps, blocks, budget="trial")

    def run(self, method: str, layers: int, seed: int, lr: float, steps: int, blocks: int, *, budget: str) -> Run:
        """Returns a run of a method, or of the twin."""
        own = next((each for each in self.methods if each.name == method), Method(method))
        return Run(method, layers, seed, lr, steps, blocks, own.objective, budget, own.code_width)


def choose(results: Iterable[Result], plan: Plan) -> dict[Form, Result]:
    """Returns the best trial of each form with complete trials, by the last exit's loss on validation texts.

    Where all seeds have also run with other settings, at equal tokens, the result with the lowest mean counts instead.
    """
    found = {result["key"]: result for result in results}
    chosen: dict[Form, Result] = {}
    for form in plan.forms():
        own = [found.get(run.key) for run in plan.trials() if (run.method, run.layers) == form]
        good = [result for result in own if result is not None and "failure" not in result]
        if all(own) and good:
            chosen[form] = _confirmed(min(good, key=_loss), found.values(), plan)
    return chosen


def _confirmed(trial: Result, results: Iterable[Result], plan: Plan) -> Result:
    """Returns a run with the settings that are the best over all seeds, or the trial until its settings have run."""
    form = (trial["method"], trial["layers"])
    ran: dict[tuple[float, int], list[Result]] = {}
    for result in results:
        if "failure" in result or result["budget"] != "tokens" or result["steps"] != plan.steps:
            continue
        if (result["method"], result["layers"]) == form and result["seed"] < plan.seeds:
            ran.setdefault((result["lr"], result["bridge_blocks"]), []).append(result)
    whole = {settings: own for settings, own in ran.items() if len(own) == plan.seeds}
    if (trial["lr"], trial["bridge_blocks"]) not in whole:
        return trial
    return min(whole.values(), key=lambda own: statistics.mean(map(_loss, own)))[0]


def _loss(result: Result) -> float:
    """The loss of the last exit on validation texts."""
    return float(result["validation_loss"][-1])


def choose_longer(results: Iterable[Result], plan: Plan) -> dict[Form, Result]:
    """Returns the best longer run of seed 0 of each form that has run at all rates, by the loss on validation texts."""
    results = list(results)
    found, chosen = {result["key"]: result for result in results}, choose(results, plan)
    best: dict[Form, Result] = {}
    for form, trial in chosen.items():
        own = [found.get(run.key) for run in longer_trials(trial, chosen, plan)]
        good = [result for result in own if result is not None and "failure" not in result]
        if all(own) and good:
            best[form] = min(good, key=_loss)
    return best


def longer_trials(trial: Result, chosen: dict[Form, Result], plan: Plan) -> list[Run]:
    """Returns the longer runs of seed 0 of a form, whose chosen trial is given; none if it has no longer runs."""
    steps = steps_of("longer", trial, chosen, plan)
    rates = () if steps is None else plan.longer_rates
    return [_run(plan, {**trial, "lr": lr}, seed=0, steps=steps or 0, budget="longer") for lr in rates]


def measured_runs(results: Iterable[Result], plan: Plan) -> list[Run]:
    """Returns the runs whose settings are chosen, by budget and seed; the results of longer runs make more of them."""
    results = list(results)
    chosen, longer = choose(results, plan), choose_longer(results, plan)
    runs = [
        _run(plan, trial, seed=seed, steps=steps, budget=budget)
        for budget in ("tokens", "operations")
        for seed in range(plan.seeds)
        for trial in chosen.values()
        if (steps := steps_of(budget, trial, chosen, plan)) is not None
    ]
    runs += [run for trial in chosen.values() for run in longer_trials(trial, chosen, plan)]
    return runs + [
        _run(plan, first, seed=seed, steps=first["steps"], budget="longer")
        for seed in range(1, plan.seeds)
        for first in longer.values()
    ]


def _run(plan: Plan, trial: Result, *, seed: int, steps: int, budget: str) -> Run:
    """Returns a run with the settings of a trial."""
    return plan.run(trial["method"], trial["layers"], seed, trial["lr"], steps, trial["bridge_blocks"], budget=budget)


def steps_of(budget: str, trial: Result, chosen: dict[Form, Result], plan: Plan) -> int | None:
    """Returns the steps of a form, whose chosen trial is given, at a budget; ``None`` if it does not run there."""
    if budget == "tokens":
        return plan.steps
    if (TWIN, 1) not in chosen or not plan.runs(trial["method"], budget):
        return None
    times = plan.longer if budget == "longer" else 1
    return round(plan.steps * times * chosen[TWIN, 1]["operations_per_token"] / trial["operations_per_token"])
