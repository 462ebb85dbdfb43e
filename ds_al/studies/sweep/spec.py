"""Reads sweep files and creates the runs of a sweep with their configs.

A sweep is a YAML file (``ds_configs/suites/``)::

    name: small
    config: ../cifar10_vgg_al.json         # config of run/train.py that all runs share
    groups:
      - name: CIFAR-10, VGG                # one table, with the same data, network and budget
        set: {experiment.epochs: 15}       # keys of the config, for all methods of this group
        layers: [2, 4]                     # K, the number of AL layers
        cuts: {2: [1, 3]}                  # blocks per AL layer, if uneven
        stages: [1]                        # P, the number of processes
        methods:
          bp: {}                           # a name, and keys for this method only
          contrast: {experiment.model.al_options.objective.temperature: 0.05}
          contrast, no mimic: {method: contrast, experiment.model.al_options.bridge_depth: 0}

A sweep that chooses settings has ``trials`` for every method, and ``own_trials`` for single methods::

        trials:
          AdamW 0.001: {optimizer.params.lr: 0.001}
          AdamW 0.003: {optimizer.params.lr: 0.003}
        own_trials:
          contrast: {warm: {experiment.model.al_options.objective.temperature: 0.3}}

Another sweep uses the chosen settings (:mod:`ds_al.studies.sweep.choice`) by ``chosen: [results.json]`` at its top
level and ``tuned: <tuned group>`` in a group. Until ``bp`` and every objective of the group have chosen settings, the
group waits (:func:`waiting`): it has no runs. A recipe has its own settings.

A group with ``budgets``, numbers of epochs, takes the one that was found for it (:mod:`ds_al.studies.sweep.budget`)
from the file that the sweep names as ``budget``, and waits until there is one.

A method is named by a schedule, an objective (trained by ``streaming``), a recipe, a back-propagation schedule, or
``bp`` (same as ``bp_single``): the twin in one process. ``bp_dp`` is the twin in P processes, each a replica.
Back-propagation has no AL layers, so it runs once for all K. All of its methods use the settings chosen for ``bp``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from ds_al.config.associated_learning import al_config
from ds_al.config.base import StrictModel, read_file, read_text, validate
from ds_al.config.methods import AL_METHODS, BACKPROP_METHODS
from ds_al.errors import ALConfigError
from ds_al.experiment.config import experiment_config, override
from ds_al.experiment.recipes import RECIPES, with_recipe
from ds_al.objectives import OBJECTIVES

_SINGLE = ("bp", "bp_single")
_CHOICE = {"group", "method", "keys"}
"""Columns of a file of chosen settings."""
_BUDGET = {"group", "epochs"}
"""Columns of a file of budgets."""


class Group(StrictModel):
    """One table of a sweep."""

    name: str = Field(description="Title of the table.")
    config: str | None = Field(default=None, description="Config file of the group, instead of the sweep's.")
    set: dict[str, Any] = Field(default_factory=dict, description="Keys of the config for all methods.")
    layers: list[int] = Field(min_length=1, description="K: numbers of AL layers.")
    cuts: dict[int, list[int]] = Field(
        default_factory=dict,
        description="For a K: number of blocks of each AL layer (default: evenly many).",
    )
    stages: list[int] = Field(default=[1], min_length=1, description="P: numbers of processes.")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1, description="Methods by name, each with config keys for this method only."
    )
    trials: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Settings to choose from, for every method: config keys by name."
    )
    own_trials: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="Additional trials of single methods."
    )
    tuned: str | None = Field(
        default=None, description="Uses the settings that were chosen for each method of this tuned group."
    )
    budgets: list[int] = Field(
        default_factory=list, description="Numbers of epochs to find the budget among, each a quarter more or larger."
    )


class Sweep(StrictModel):
    """A sweep file."""

    name: str = Field(description="Name of the sweep.")
    config: str | None = Field(default=None, description="Config file that all groups share; relative to the sweep.")
    chosen: list[str] = Field(
        default_factory=list, description="Files of chosen settings, relative to the sweep, for groups with `tuned`."
    )
    budget: str | None = Field(
        default=None, description="File of the budgets found, relative to the sweep, for groups with `budgets`."
    )
    groups: list[Group] = Field(min_length=1, description="The tables.")


@dataclass(frozen=True)
class Run:
    """One run: a method on a network and data set, with one K, P and seed."""

    group: str
    method: str
    """Name of the method in the sweep."""
    trial: str | None
    """Name of the trial; ``None`` in sweeps without trials."""
    layers: int | None
    """K; ``None`` for back-propagation."""
    stages: int
    seed: int
    config: Mapping[str, Any]
    """Config of run/train.py, complete except for the output folder."""

    @property
    def key(self) -> str:
        """Key of the run's result, which depends on the config, but for what W&B is told."""
        experiment = {key: value for key, value in self.config["experiment"].items() if key != "wandb"}
        text = json.dumps([{**self.config, "experiment": experiment}, self.stages, self.seed], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def title(self) -> str:
        """Description for progress and messages."""
        depth = "" if self.layers is None else f", K = {self.layers}"
        trial = "" if self.trial is None else f" ({self.trial})"
        return f"{self.group}, {self.method}{trial}{depth}, P = {self.stages}, seed {self.seed}"


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep file.

    Raises:
        ALConfigError: the file does not exist, is not YAML, or has an unknown key or method.
    """
    if not path.is_file():
        raise ALConfigError(f"sweep {str(path)!r} does not exist: give the path of a YAML file")
    try:
        content = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise ALConfigError(f"sweep {str(path)!r} is not valid YAML in UTF-8: {error}") from error
    sweep: Sweep = validate(Sweep, content, where=path.name)
    for group in sweep.groups:
        for name, keys in group.methods.items():
            _settings(keys.get("method", name))
        for depth, cut in group.cuts.items():
            if len(cut) != depth:
                raise ALConfigError(
                    f"cuts of group {group.name!r}: got {cut} for K = {depth}, expected {depth} numbers"
                )
        if any(4 * more < 5 * less for less, more in pairwise(group.budgets)) or min(group.budgets, default=1) < 1:
            raise ALConfigError(
                f"budgets of group {group.name!r}: got {group.budgets}, expected numbers of epochs of which each is at "
                "least a quarter more than the one before it, such as [8, 10, 13]"
            )
        if stray := sorted(group.own_trials.keys() - group.methods.keys()):
            raise ALConfigError(f"own_trials of {stray[0]!r}: group {group.name!r} has {', '.join(group.methods)}")
    return sweep


def runs_of(sweep: Sweep, *, folder: Path, seeds: int, assignments: Sequence[str] = ()) -> Iterator[Run]:
    """Yields all runs ordered by seed, so that an interrupted sweep has complete rows of few seeds.

    Args:
        sweep: the sweep.
        folder: folder of the sweep file, to which paths of config files are relative.
        seeds: number of seeds, 0 .. seeds - 1.
        assignments: ``"key=value"`` for all runs, which override keys that a group sets for all of its methods.

    Raises:
        ALConfigError: a config file is missing or wrong, or a key cannot be set.
    """
    chosen, budgets = _read_chosen(sweep, folder), _read_budgets(sweep, folder)
    for seed in range(seeds):
        for group in sweep.groups:
            if _waits(group, chosen, budgets):
                continue
            name = group.config or sweep.config
            if name is None:
                raise ALConfigError(f"sweep {sweep.name!r}, group {group.name!r}: give a config, there or to the sweep")
            epochs = {"experiment.epochs": budgets[group.name]} if group.budgets and group.name in budgets else {}
            base = override(read_file(folder / name), [*_assignments({**group.set, **epochs}), *assignments])
            tuned = chosen[group.tuned] if group.tuned else {}
            seen = set()
            for stages in group.stages:
                for run in _of_group(group, base, tuned, stages=stages, seed=seed):
                    identity = (run.method, run.trial, run.layers, run.stages)
                    if identity not in seen:  # "bp" is the same for all stages
                        seen.add(identity)
                        yield run


def _of_group(
    group: Group, base: dict[str, Any], tuned: Mapping[str, Mapping[str, Any]], *, stages: int, seed: int
) -> Iterator[Run]:
    for method, keys in group.methods.items():
        name = keys.get("method", method)
        own = {key: value for key, value in keys.items() if key != "method"}
        own_choice = {} if name in RECIPES else tuned.get(method, tuned.get(name, {}))
        chosen = own_choice or (tuned.get("bp", {}) if name.startswith("bp_") else {})
        settings = {**_settings(name), **chosen, **own}
        is_backprop = str(settings["associated_learning.method"]).startswith("bp_")
        processes = 1 if name in _SINGLE else stages
        for trial, tried in _trials(group, method).items():
            for depth in [None] if is_backprop else group.layers:
                cut = None if depth is None else group.cuts.get(depth, depth)
                layers = {} if depth is None else {"experiment.model.al_options.num_layers": cut}
                keys_of_cell = {**layers, **settings, **tried, "experiment.seed": seed}
                config = with_recipe(override(base, _assignments(keys_of_cell)))
                experiment_config(config)
                al_config(config)
                yield Run(group.name, method, trial, depth, processes, seed, config)


def _trials(group: Group, method: str) -> Mapping[str | None, Mapping[str, Any]]:
    found: dict[str | None, dict[str, Any]] = {}
    found.update(group.trials)
    found.update(group.own_trials.get(method, {}))
    return found or {None: {}}


def trial_keys(group: Group, method: str, trial: str) -> dict[str, Any]:
    """Returns the config keys that a trial sets for a method, including the method's own keys."""
    own = {key: value for key, value in group.methods[method].items() if key != "method"}
    return {**own, **_trials(group, method)[trial]}


def with_methods(sweep: Sweep, methods: str) -> list[str]:
    """Adds methods to all groups, unless a group already defines a method of that name.

    Args:
        sweep: the sweep.
        methods: their names, comma-separated; names of the sweep's own methods may hold commas.

    Returns:
        The names.

    Raises:
        ALConfigError: a name is neither a method of the sweep nor a built-in method.
    """
    own = {method for group in sweep.groups for method in group.methods}
    names = _split(methods, own)
    for name in (name for name in names if name not in own):
        _settings(name)
        for group in sweep.groups:
            group.methods[name] = {}
    return names


def _split(text: str, own: Collection[str]) -> list[str]:
    """Splits comma-separated names, of which the longest is taken that is one of the sweep's own."""
    parts, names = text.split(",") if text else [], []
    while parts:
        joined = {count: ",".join(parts[:count]).strip() for count in range(len(parts), 0, -1)}
        count = next((count for count, name in joined.items() if name in own), 1)
        names.append(joined[count])
        del parts[:count]
    return names


def waiting(sweep: Sweep, folder: Path) -> list[str]:
    """Returns the groups that wait for settings to be chosen, or for their budget.

    Args:
        sweep: the sweep.
        folder: folder of the sweep file, to which its paths are relative.
    """
    chosen, budgets = _read_chosen(sweep, folder), _read_budgets(sweep, folder)
    return [group.name for group in sweep.groups if _waits(group, chosen, budgets)]


def _waits(group: Group, chosen: Mapping[str, Mapping[str, Any]], budgets: Mapping[str, int]) -> bool:
    if group.budgets and group.name not in budgets:
        return True
    if group.tuned is None:
        return False
    names = {keys.get("method", method) for method, keys in group.methods.items()}
    needed = names & {"bp", *OBJECTIVES}
    return not needed <= chosen.get(group.tuned, {}).keys()


def _read_chosen(sweep: Sweep, folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns config keys by group and method, from all existing files of chosen settings."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in (folder / name for name in sweep.chosen):
        rows = read_file(path).get("rows") if path.exists() else []
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _CHOICE for row in rows):
            raise ALConfigError(f"{path} holds no chosen settings: expected rows with {', '.join(sorted(_CHOICE))}")
        for row in rows:
            found.setdefault(row["group"], {})[row["method"]] = row["keys"]
    return found


def _read_budgets(sweep: Sweep, folder: Path) -> dict[str, int]:
    """Returns the number of epochs found for each group; without a file, of none."""
    path = None if sweep.budget is None else folder / sweep.budget
    rows = read_file(path).get("rows") if path is not None and path.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _BUDGET for row in rows):
        raise ALConfigError(f"{path} holds no budgets: expected rows with {', '.join(sorted(_BUDGET))}")
    return {row["group"]: row["epochs"] for row in rows}


def _settings(name: str) -> dict[str, Any]:
    """Returns the config keys of a method name."""
    if name in _SINGLE:
        return {"associated_learning.method": "bp_1f1b"}
    if name in (*AL_METHODS, *BACKPROP_METHODS):
        return {"associated_learning.method": name}
    if name in OBJECTIVES:
        return {"associated_learning.method": "streaming", "experiment.model.al_options.objective.name": name}
    if name in RECIPES:
        return {"associated_learning.method": "streaming", "experiment.recipe": name, "optimizer": None}
    known = [*_SINGLE, *RECIPES, *AL_METHODS, *BACKPROP_METHODS, *OBJECTIVES]
    raise ALConfigError(f"unknown method {name!r}: expected one of {', '.join(known)}, or a key 'method' that is one")


def _assignments(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]
