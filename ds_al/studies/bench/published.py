"""The published scaling study of pipelined associated learning, for comparison with ours.

AG News, a Transformer and its AL form; one process drives all GPUs, layers are assigned round-robin, and
back-propagation uses naive model parallelism; seconds per epoch. Source: ``Scale.csv`` of the repository
``nick880107-git/Pipeline-Associated-Learning`` (MIT licence), the code of the thesis of 2023 in which it was published.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "nick880107-git/Pipeline-Associated-Learning, Scale.csv"
STRONG_LAYERS = 12

SECONDS: Mapping[str, Mapping[str, Mapping[int, float]]] = {
    "weak": {
        "AL": {1: 7.44, 2: 9.54, 3: 11.96, 4: 15.55, 5: 21.04, 6: 26.23},
        "BP": {1: 8.67, 2: 16.07, 3: 24.54, 4: 32.46, 5: 40.83, 6: 48.07},
    },
    "strong": {
        "AL": {1: 66.20, 2: 65.46, 3: 55.59, 4: 51.05, 6: 60.85},
        "BP": {1: 78.52, 2: 87.12, 3: 91.23, 4: 89.10, 6: 94.16},
    },
}
"""Study, method, number of GPUs. Weak: as many layers as GPUs. Strong: :data:`STRONG_LAYERS` layers."""


def speedups(study: str, method: str) -> dict[int, float]:
    """Returns the speed-up over one GPU with the same layers; the weak study multiplies its time for one layer."""
    seconds = SECONDS[study][method]
    return {gpus: seconds[1] / each * (gpus if study == "weak" else 1) for gpus, each in seconds.items()}


def parallel_efficiency(study: str, method: str) -> dict[int, float]:
    """Returns the speed-up divided by the number of GPUs."""
    return {gpus: speedup / gpus for gpus, speedup in speedups(study, method).items()}


SLOW_LINK: Mapping[str, float] = {"streaming": -0.012, "bp_1f1b": -0.51}
"""Throughput change of language models on a 1 Gbit/s link, two stages: Yin et al., SOLO, arXiv 2609.35440."""
SLOW_LINK_MBIT = 1000.0
