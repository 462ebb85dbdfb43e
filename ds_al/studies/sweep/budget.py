"""Finds the budget of each group of a sweep: the number of epochs after which the twin hardly gains by a quarter more.

The twin alone is trained at growing numbers of epochs, the group's ``budgets``, each with its own learning-rate
schedule, and judged by validation accuracy; the test part is not read::

    accuracy, mean over seeds    a_1     a_2     a_3     a_4           a_(n+1) - a_n < 0.5 points: n is the budget
    epochs                       8       10      13      17
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.config.base import read_file
from ds_al.studies.runs import Result
from ds_al.studies.sweep.runner import is_done
from ds_al.studies.sweep.spec import Group, Run, Sweep, runs_of

GAIN = 0.005
"""Gain of the validation accuracy below which the twin has slowed down."""
RULE = (
    "the smallest number of epochs after which the next one tried, at least a quarter more, raises the validation "
    "accuracy of the twin, mean over seeds, by less than 0.5 points"
)
_TWIN = "bp"


def explanation(sweep: Sweep, folder: Path) -> str:
    """Returns the sentences of a page on how the epochs of each group were found; empty if the sweep sets them.

    Args:
        sweep: the sweep.
        folder: folder of the sweep file, to which its paths are relative.
    """
    if sweep.budget is None:
        return ""
    path, own = folder / sweep.budget, {group.name for group in sweep.groups}
    rows = read_file(path)["rows"] if path.exists() else []
    beyond = [_beyond(row) for row in rows if row["group"] in own and not row.get("settled", True)]
    text = f"Every group trains until back-propagation has slowed down, for {RULE}."
    if not beyond:
        return text
    return f"{text} Not so in these groups, which have the largest number that was tried: {'; '.join(beyond)}."


def _beyond(row: Mapping[str, Any]) -> str:
    """Describes the last gain of a group whose twin has not slowed down; one number of epochs alone shows none."""
    *tried, (epochs, more) = sorted((int(number), accuracy) for number, accuracy in row["tried"].items())
    gain = f": {100 * (more - tried[-1][1]):.2f} points more than {tried[-1][0]}" if tried else ""
    return f"{row['group']} ({epochs} epochs{gain})"


def trials(
    sweep: Sweep, group: Group, *, epochs: int, folder: Path, seeds: int, assignments: Sequence[str]
) -> list[Run]:
    """Returns the runs of a group's twin with a number of epochs, evaluated on validation samples at their end.

    Args:
        sweep: the sweep.
        group: the group; its method ``bp`` is the twin.
        epochs: number of epochs.
        folder: folder of the sweep file, to which its paths are relative.
        seeds: number of seeds.
        assignments: ``"key=value"`` for all runs.
    """
    own = group.model_copy(update={"methods": {_TWIN: group.methods[_TWIN]}, "budgets": []})
    keys = {"epochs": epochs, "evaluate_every": epochs, "evaluate_fully": "false", "test": "false"}
    alone = sweep.model_copy(update={"groups": [own]})
    trial = [*assignments, *(f"experiment.{key}={value}" for key, value in keys.items())]
    return list(runs_of(alone, folder=folder, seeds=seeds, assignments=trial))


def settle(tried: Mapping[int, float]) -> int | None:
    """Returns the budget by :data:`RULE` from the accuracy at each number of epochs, or ``None``."""
    numbers = sorted(tried)
    for less, more in zip(numbers, numbers[1:], strict=False):
        if tried[more] - tried[less] < GAIN:
            return less
    return None


class Budgets:
    """The trials of all groups of a sweep that have ``budgets``.

    Args:
        sweep: the sweep.
        folder: folder of the sweep file.
        seeds: number of seeds of every trial.
        assignments: ``"key=value"`` for all runs.
    """

    def __init__(self, sweep: Sweep, folder: Path, *, seeds: int, assignments: Sequence[str] = ()) -> None:
        self.seeds = seeds
        self.trials = {
            group.name: {
                epochs: trials(sweep, group, epochs=epochs, folder=folder, seeds=seeds, assignments=assignments)
                for epochs in group.budgets
            }
            for group in sweep.groups
            if group.budgets
        }

    def next(self, found: Mapping[str, Result], *, groups: str = "") -> list[Run]:
        """Returns the trials to run next: those of the next number of epochs of each group that is not settled.

        Args:
            found: results by key.
            groups: only groups whose name contains this text.
        """
        return [
            run
            for name, tried in self._tried(found)
            if groups in name and settle(tried) is None
            for run in self._after(name, tried)
        ]

    def rows(self, found: Mapping[str, Result]) -> list[dict[str, Any]]:
        """Returns a row ``group, epochs, settled, gain, seeds, runs, tried`` for each group that is settled, or whose
        ``budgets`` have all been tried without that; then the last one is taken."""
        rows = []
        for name, tried in self._tried(found):
            budget = settle(tried)
            if budget is None and len(tried) < len(self.trials[name]):
                continue
            epochs = max(tried) if budget is None else budget
            later = [number for number in tried if number > epochs]
            rows.append({
                "group": name, "epochs": epochs, "settled": budget is not None,
                "gain": tried[min(later)] - tried[epochs] if later else None,
                "seeds": self.seeds, "runs": len(tried) * self.seeds,
                "tried": {str(number): accuracy for number, accuracy in tried.items()},
            })  # fmt: skip
        return rows

    def _tried(self, found: Mapping[str, Result]) -> Iterator[tuple[str, dict[int, float]]]:
        for name, trials_of in self.trials.items():
            yield (
                name,
                {
                    epochs: statistics.mean(found[run.key]["validation_accuracy"][-1] for run in runs)
                    for epochs, runs in trials_of.items()
                    if runs and all(is_done(run, found) for run in runs)
                },
            )

    def _after(self, name: str, tried: Mapping[int, float]) -> list[Run]:
        return next((runs for epochs, runs in self.trials[name].items() if epochs not in tried), [])
