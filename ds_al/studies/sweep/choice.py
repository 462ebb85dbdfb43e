"""Chooses each method's settings among the trials of a sweep, by validation accuracy alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ds_al.studies.sweep.spec import Sweep, trial_keys

Result = Mapping[str, Any]
Row = dict[str, Any]


def choose(results: Sequence[Result], sweep: Sweep) -> list[Row]:
    """Returns the best trial of every group and method with complete trials.

    The score of a trial is its validation accuracy in the last epoch, averaged over numbers of layers and seeds; among
    equal scores the first trial is chosen. Test accuracies are not read.

    Args:
        results: results of the runs; failed ones and those without a trial are ignored.
        sweep: the sweep with the trials.

    Returns:
        Rows ``group, method, trial, validation_accuracy, keys, trials, averaged, rho``: ``keys`` are the config keys
        that the trial sets, ``trials`` the score of each trial, ``averaged`` the score of the mean of all exits, if
        evaluated, ``rho`` the operations relative to the twin's (``None`` for the twin).
    """
    rows = []
    for group in sweep.groups:
        for method in group.methods:
            names = [*group.trials, *group.own_trials.get(method, {})]
            scores = {name: _score(results, group=group.name, suite_method=method, trial=name) for name in names}
            known = {name: score for name, score in scores.items() if score is not None}
            if not names or len(known) < len(names):
                continue
            best = max(known, key=known.__getitem__)
            rows.append({
                "group": group.name, "method": method, "trial": best, "validation_accuracy": known[best],
                "keys": trial_keys(group, method, best), "trials": known,
                "averaged": {n: _averaged(results, group=group.name, suite_method=method, trial=n) for n in names},
                "rho": {n: _rho(results, group=group.name, suite_method=method, trial=n) for n in names},
            })  # fmt: skip
    return rows


def _score(results: Sequence[Result], **where: str) -> float | None:
    own = _of(results, where)
    return statistics.mean(r["validation_accuracy"][-1] for r in own) if own else None


def _averaged(results: Sequence[Result], **where: str) -> float | None:
    known = [r.get("averaged_validation_accuracy") for r in _of(results, where)]
    return statistics.mean(accuracy[-1] for accuracy in known if accuracy) if known and all(known) else None


def _rho(results: Sequence[Result], **where: str) -> float | None:
    """Returns the largest rho over numbers of layers; the twin's record, which is that of its AL form, is ignored."""
    known = [r["rho"] for r in _of(results, where) if r["K"] is not None and r.get("rho") is not None]
    return max(known, default=None)


def _of(results: Sequence[Result], where: Mapping[str, str]) -> list[Result]:
    return [r for r in results if "failure" not in r and all(r.get(key) == value for key, value in where.items())]
