"""What a schedule would take, computed from the time of each instruction."""

from ds_al.planner.simulator import StageCost, simulate

__all__ = ["StageCost", "simulate"]
