"""Which process of a run holds which stage, of which data parallel replica."""

from __future__ import annotations

from dataclasses import dataclass

from ds_al.errors import ALConfigError
from ds_al.experiment.config import BLOCK


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

    @classmethod
    def of_pipeline(cls, *, num_stages: int | None, world: int, rank: int) -> Layout:
        """Returns the layout of a pipeline of ``num_stages`` stages, by default one per process.

        Raises:
            ALConfigError: the number of processes is no multiple of the number of stages.
        """
        stages = world if num_stages is None else num_stages
        if world % stages:
            raise ALConfigError(
                f'"{BLOCK}.num_stages": got {stages} for {world} processes: start as many processes as stages, or a '
                "multiple of it for data parallel replicas (deepspeed --num_accelerators N)"
            )
        return cls(stages, world // stages, rank)

    @property
    def stage(self) -> int:
        """Stage of this process."""
        return self.rank // self.replicas

    @property
    def replica(self) -> int:
        """Replica of this process."""
        return self.rank % self.replicas

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the first stage."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the last stage."""
        return self.stage == self.stages - 1

    @property
    def writer(self) -> int:
        """Rank that shows progress and writes files: the last stage of the first replica, which knows all losses."""
        return (self.stages - 1) * self.replicas
