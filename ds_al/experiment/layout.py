"""Which process has which stage of a run, of which copy of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from ds_al.baseline import data_parallel
from ds_al.errors import ALConfigError
from ds_al.experiment.config import BLOCK


@dataclass(frozen=True)
class Layout:
    """Processes in DeepSpeed's order: all copies of the first stage, then all of the second ...

    Attributes:
        stages: of the pipeline, P.
        copies: of the pipeline, R; replicas of the whole network with ``bp_dp``.
        rank: of this process.
    """

    stages: int
    copies: int
    rank: int

    @classmethod
    def of(cls, *, method: str, num_stages: int | None, world: int, rank: int) -> Layout:
        """The layout that a config asks for.

        Raises:
            ALConfigError: the number of processes is no multiple of the number of stages, or ``bp_dp`` shall have more
                than one stage.
        """
        if method == data_parallel.METHOD:
            if num_stages not in (None, 1):
                raise ALConfigError(
                    f'"{BLOCK}.num_stages": got {num_stages} for {method}, where every process is a replica of the '
                    "whole network: leave it out, or use another bp_* method"
                )
            return cls(1, world, rank)
        stages = world if num_stages is None else num_stages
        if world % stages:
            raise ALConfigError(
                f'"{BLOCK}.num_stages": got {stages} for {world} processes: start as many processes as stages, or a '
                "multiple of it for data parallel copies (deepspeed --num_accelerators N)"
            )
        return cls(stages, world // stages, rank)

    @property
    def stage(self) -> int:
        """This process's stage."""
        return self.rank // self.copies

    @property
    def copy(self) -> int:
        """Which copy of the pipeline this process belongs to."""
        return self.rank % self.copies

    @property
    def recorder(self) -> int:
        """The process that shows progress and writes files: the first copy's last stage, which knows all losses."""
        return (self.stages - 1) * self.copies

    def micro_batches_of_a_copy(self, micro_batches: int, *, method: str) -> int:
        """What each copy trains of a batch of a config with so many micro-batches.

        Raises:
            ALConfigError: the replicas of ``bp_dp`` cannot share them evenly.
        """
        if method != data_parallel.METHOD:
            return micro_batches
        if micro_batches % self.copies:
            raise ALConfigError(
                f'"gradient_accumulation_steps": got {micro_batches} for {self.copies} replicas of {method}, which '
                "share the micro-batches of a batch: expected a multiple of them"
            )
        return micro_batches // self.copies
