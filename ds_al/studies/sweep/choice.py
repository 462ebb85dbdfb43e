"""Chooses each method's settings among the trials of a sweep, by validation accuracy alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ds_al.studies.sweep.spec import Sweep, trial_keys

Result = Mapping[str, Any]
Row = dict[str, Any]


def choose(results: Sequence[Result], sweep: Sweep) -> list[Row]:
    """Returns the best trial of every group and method all of whose trials have run.

    The score of a trial is its validation accuracy in the last epoch, averaged over the numbers of layers and seeds
    that all trials of the method have, so that no trial is ahead by its seeds; among equal scores the first trial is
    chosen. Test accuracies are not read.

    Args:
        results: results of the runs; failed ones and those without a trial are ignored.
        sweep: the sweep with the trials.

    Returns:
        Rows ``group, method, trial, validation_accuracy, keys, trials, averaged, rho, seeds``: ``keys`` are the config
        keys that the trial sets, ``trials`` the score of each trial, ``averaged`` the score of the mean of all exits,
        if evaluated, ``rho`` the operations relative to the twin's (``None`` for the twin), ``seeds`` the number of
        seeds.
    """
    rows = []
    for group in sweep.groups:
        for method in group.methods:
            names = [*group.trials, *group.own_trials.get(method, {})]
            trials = _comparable(
                {name: _of(results, group=group.name, suite_method=method, trial=name) for name in names}
            )
            if not any(trials.values()):
                continue
            scores = {
                name: statistics.mean(result["validation_accuracy"][-1] for result in own)
                for name, own in trials.items()
            }
            best = max(scores, key=scores.__getitem__)
            rows.append({
                "group": group.name, "method": method, "trial": best, "validation_accuracy": scores[best],
                "keys": trial_keys(group, method, best), "trials": scores,
                "averaged": {name: _averaged(own) for name, own in trials.items()},
                "rho": {name: _rho(own) for name, own in trials.items()},
                "seeds": len({result["seed"] for result in trials[best]}),
            })  # fmt: skip
    return rows


def _of(results: Sequence[Result], **where: str) -> list[Result]:
    return [r for r in results if "failure" not in r and all(r.get(key) == value for key, value in where.items())]


def _comparable(trials: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """Returns the results whose number of layers and seed every trial has."""
    every = [{(result["K"], result["seed"]) for result in own} for own in trials.values()]
    common = set.intersection(*every) if every else set()
    return {name: [r for r in own if (r["K"], r["seed"]) in common] for name, own in trials.items()}


def _averaged(results: Sequence[Result]) -> float | None:
    known = [result.get("averaged_validation_accuracy") for result in results]
    return statistics.mean(accuracy[-1] for accuracy in known if accuracy) if known and all(known) else None


def _rho(results: Sequence[Result]) -> float | None:
    """Returns the largest rho over numbers of layers; the twin's record, which is that of its AL form, is ignored."""
    known = [r["rho"] for r in results if r["K"] is not None and r.get("rho") is not None]
    return max(known, default=None)
