"""Which process of a run holds which stage, of which data parallel replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Processes in DeepSpeed's order: all replicas of the first stage, then all replicas of the second one ...

    Attributes:
        stages: stages of the pipeline, P.
        replicas: data parallel replicas, R; of the pipeline, or of the whole network with ``bp_dp``.
        rank: rank of this process.
    """

    stages: int
    replicas: int
    rank: int

    @property
    def stage(self) -> int:
        """Stage of this process."""
        return self.rank // self.replicas

    @property
    def replica(self) -> int:
        """Replica of this process."""
        return self.rank % self.replicas

    @property
    def writer(self) -> int:
        """Rank that shows progress and writes files: the last stage of the first replica, which knows all losses."""
        return (self.stages - 1) * self.replicas
