"""Topology of a rank: its stage, its replica, its neighbours, and their process groups.

::

                 stage 0   stage 1        pipeline   ranks of one replica, by stage
    replica 0       0 ------- 2           same_stage ranks of one stage, by replica
    replica 1       1 ------- 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import PipelineModule

from ds_al import host
from ds_al.parallel import meetings


@dataclass(frozen=True)
class StageTopology:
    """Place of this rank in DeepSpeed's grid.

    Attributes:
        rank: global rank.
        stage, stages: index of the stage, and number of stages, P.
        replica, replicas: index of the data parallel replica of the pipeline, and number of replicas, R.
        pipeline: global ranks of this replica, by stage.
        same_stage: global ranks of this stage, by replica.
        pipeline_group, replica_group: process groups of ``pipeline`` and of ``same_stage``.
    """

    rank: int
    stage: int
    stages: int
    replica: int
    replicas: int
    pipeline: tuple[int, ...]
    same_stage: tuple[int, ...]
    pipeline_group: Any = None
    replica_group: Any = None

    @classmethod
    def of(cls, module: PipelineModule) -> StageTopology:
        """Reads the topology from the grid of a module."""
        grid = host.grid(module)
        stage, stages, replicas = grid.get_stage_id(), grid.pipe_parallel_size, grid.get_data_parallel_world_size()
        return cls(
            rank=grid.get_global_rank(),
            stage=stage,
            stages=stages,
            replica=grid.get_data_parallel_rank(),
            replicas=replicas,
            pipeline=tuple(grid.stage_to_global(other) for other in range(stages)),
            same_stage=tuple(grid.stage_to_global(stage, data=replica) for replica in range(replicas)),
            pipeline_group=grid.get_pipe_parallel_group(),
            replica_group=grid.get_data_parallel_group(),
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage."""
        return self.stage == self.stages - 1

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all stages, in order; drains the pipeline. Every rank must call it."""
        return meetings.gather(value, group=self.pipeline_group)

    def barrier(self) -> None:
        """Waits for all stages of this replica."""
        meetings.barrier(group=self.pipeline_group)
