"""Times a micro-batch of a recipe, all layers in one process, and of the twin with the same optimizer."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_al.experiment.recipes import RECIPES
from ds_al.launch.ranks import run_ranks
from ds_al.models import preset_options
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import Row
from ds_al.studies.bench.interleaved import quartiles, seconds_of_batch, turns
from ds_al.system.allocator import keep_freed_memory

_WARM_UP = 3
_SAMPLES = {"vgg": 100, "resnet": 100, "lstm": 50, "transformer": 50}
"""Samples per micro-batch, as in ds_configs/suites/small.yaml."""
_IMAGE = (3, 32, 32)
"""Shape of CIFAR images, on which the image recipe was chosen."""
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "vgg": {
        "half bridges": {"bridge_width": 0.5, "bridge_depth": None, "bridge_muon": True},
        "bridges 3/4": {"bridge_width": 0.75},
    },
    "resnet": {"wide bridges": {"bridge_width": 1.0, "bridge_depth": 2, "bridge_muon": False}},
}
"""Options in addition to those of the recipe ``ours``, as in the suites small.yaml and long.yaml."""


def measure_recipe(
    *,
    recipe: str = "ours",
    networks: Sequence[str] | None = None,
    layers: Sequence[int] = (2, 4),
    repeat: int = 15,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Times networks with their ``small`` preset, alternating between the two forms.

    Args:
        recipe: name of the recipe; `ours` is measured with variants, too.
        networks: names of networks; by default all networks of the recipe.
        layers: values of K.
        repeat: micro-batches of each form.
        progress: called after each row.

    Returns:
        Rows ``network, variant, K, recipe, micro_batch, repeats, al_ms, twin_ms`` (medians) and ``ratio, ratio_low,
        ratio_high`` (median and quartiles over pairs).

    Raises:
        RankFailure: the process failed.
    """
    rows = []
    for network in networks or [name for name in RECIPES[recipe] if name in _SAMPLES]:
        variants: dict[str, dict[str, Any]] = {"": {}, **(_VARIANTS.get(network, {}) if recipe == "ours" else {})}
        for variant, depth in itertools.product(variants, layers):
            what: dict[str, Any] = {"recipe": recipe, "network": network, "options": variants[variant], "layers": depth}
            (pairs,) = run_ranks(f"{__name__}:pairs_on_rank", 1, timeout=900, repeat=repeat, **what)
            al, twin = zip(*pairs, strict=True)
            low, ratio, high = quartiles([a / b for a, b in pairs])
            rows.append({
                "network": network,
                "variant": variant,
                "K": depth,
                "recipe": recipe,
                "micro_batch": _SAMPLES[network],
                "repeats": repeat,
                "al_ms": 1000 * statistics.median(al),
                "twin_ms": 1000 * statistics.median(twin),
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
            })  # fmt: skip
            if progress is not None:
                progress(rows[-1])
    return rows


def pairs_on_rank(
    *, recipe: str, network: str, options: Mapping[str, Any], layers: int, repeat: int
) -> list[tuple[float, float]]:
    """Returns pairs of seconds per micro-batch: the AL form, with options in addition to the recipe's, and the twin."""
    keep_freed_memory()  # as in a training run
    parts, size = RECIPES[recipe][network], _SAMPLES[network]
    shared = {**workloads.model_options(network, 1), **preset_options(network, "small")}
    if "in_shape" in shared:
        shared["in_shape"] = _IMAGE

    def form(method: str, **more: Any) -> Callable[[], float]:
        engine = workloads.model_engine(
            method,
            model=network,
            stages=1,
            micro_batch=size,
            options={**shared, **more, "num_layers": layers},
            optimizer=parts["optimizer"],
        )
        return lambda: seconds_of_batch(engine, workloads.model_batches(engine, model=network, image=_IMAGE))

    forms = {"al": form("streaming", **{**parts["al_options"], **options}), "twin": form("bp_1f1b")}
    pairs = []
    for number in range(repeat + _WARM_UP):
        seconds = {name: forms[name]() for name in turns(list(forms), number)}
        pairs.append((seconds["al"], seconds["twin"]))
    return pairs[_WARM_UP:]
