"""Stragglers: random jitter of computation times per micro-batch, and random speeds of stages.

Shapes: ``P`` stages, ``N`` micro-batches, ``R`` repetitions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Jitter:
    """Distribution of the factor on the computation time of one micro-batch on one stage.

    ``lognormal``: ``exp(N(0, amount))``, scaled to a mean of 1, so that jitter alone changes no stage's mean time.
    ``slow``: ``factor`` with probability ``amount``, else 1. The mean is ``1 + amount (factor - 1)``.
    """

    kind: Literal["lognormal", "slow"]
    amount: float
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Jitter:
        """Parses ``"lognormal:0.2"``, or ``"slow:0.01:5"``: with probability 1 % five times as long.

        Raises:
            ValueError: the text has neither form.
        """
        number = r"(\d+(?:\.\d+)?)"
        if match := re.fullmatch(f"lognormal:{number}", text):
            return cls("lognormal", float(match[1]))
        if (match := re.fullmatch(f"slow:{number}:{number}", text)) and float(match[1]) <= 1:
            return cls("slow", float(match[1]), float(match[2]))
        raise ValueError(f"got {text!r}: expected lognormal:SIGMA, or slow:CHANCE:FACTOR with a chance up to 1")

    @property
    def mean(self) -> float:
        """Mean of the factor."""
        return 1.0 if self.kind == "lognormal" else 1 + self.amount * (self.factor - 1)

    def sample(self, shape: tuple[int, int, int], *, seed: int) -> NDArray[np.float64]:
        """Draws factors ``(P, N, R)``, reproducible by seed."""
        generator = np.random.default_rng(seed)
        if self.kind == "lognormal":
            return np.exp(generator.normal(0.0, self.amount, shape) - self.amount**2 / 2)
        return np.where(generator.random(shape) < self.amount, self.factor, 1.0)


def spread_speeds(stages: int, *, sigma: float, seed: int) -> tuple[float, ...]:
    """Draws relative speeds of heterogeneous machines, lognormal with a median of 1: ``(P,)``."""
    return tuple(math.exp(value) for value in np.random.default_rng(seed).normal(0.0, sigma, stages))
