"""Times a training step of each method, all layers in this process, in turns with a step of the twin.

Operations are counted by matrix products alone; the time also holds what they leave out: optimizer steps, the draw of a
part of the vocabulary, and the start of many small kernels.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ds_al.studies.bench.interleaved import quartiles, seconds_of_batch, turns
from ds_al.studies.language.corpus import Corpus
from ds_al.studies.language.plan import Plan, choose
from ds_al.studies.language.training import TWIN, Run, Sizes, make_engine, pieces
from ds_al.studies.results import Row
from ds_al.studies.runs import Result

_WARM_UP = 5
"""Steps of each method before those that count."""


def speed_of(json_path: Path) -> Path:
    """Returns the file of times that belongs to a results file."""
    return json_path.with_name(f"{json_path.stem}_speed.json")


def measure_speed(
    results: Iterable[Result],
    plan: Plan,
    sizes: Sizes,
    corpus: Corpus,
    *,
    repeat: int,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Returns a row per form whose settings are chosen, the twin excepted.

    Args:
        results: results of the trials, which choose the number of bridge blocks.
        plan: the study.
        sizes: sizes of the network and of a step.
        corpus: the data.
        repeat: steps of each of the two that count.
        tell: called with a line for each row.

    Returns:
        Rows ``method, K, bridge_blocks, repeats, step_ms, twin_ms`` (medians), ``times_as_long`` with its quartiles
        ``times_low, times_high`` over pairs of steps, and ``times_operations`` of the twin's.
    """
    chosen = choose(results, plan)
    twin = chosen.pop((TWIN, 1), None)
    rows: list[Row] = []
    for (method, layers), trial in chosen.items():
        if twin is None:
            break
        runs = [
            plan.run(name, k, 0, each["lr"], plan.steps, each["bridge_blocks"], budget="tokens")
            for name, k, each in ((method, layers, trial), (TWIN, 1, twin))
        ]
        own, beside = zip(*_pairs(runs, sizes, corpus, repeat=repeat), strict=True)
        low, ratio, high = quartiles([a / b for a, b in zip(own, beside, strict=True)])
        rows.append({
            "method": method,
            "K": layers,
            "bridge_blocks": trial["bridge_blocks"],
            "repeats": repeat,
            "step_ms": 1000 * statistics.median(own),
            "twin_ms": 1000 * statistics.median(beside),
            "times_as_long": ratio,
            "times_low": low,
            "times_high": high,
            "times_operations": trial["operations_per_token"] / twin["operations_per_token"],
        })  # fmt: skip
        more = rows[-1]["times_operations"]
        tell(f"{method}, K = {layers}: {ratio:.2f} times as long, {more:.2f} times the operations")
    return rows


def _pairs(runs: list[Run], sizes: Sizes, corpus: Corpus, *, repeat: int) -> Iterator[tuple[float, ...]]:
    """Yields the seconds of a step of each run, which take turns."""
    engines = [make_engine(run, sizes, corpus) for run in runs]
    batches = itertools.tee(pieces(corpus.train, size=sizes.batch, seed=0), len(runs))
    for number in range(_WARM_UP + repeat):
        seconds = [0.0] * len(runs)
        for place in turns(range(len(runs)), number):
            seconds[place] = seconds_of_batch(engines[place], batches[place])
        if number >= _WARM_UP:
            yield tuple(seconds)
    for engine in engines:
        engine.destroy()
