"""What a schedule would take, computed from the time of each instruction, and which one to use."""

from ds_al.planner.predict import METHODS, Link, Prediction, Work, advice, break_even, grid, predict
from ds_al.planner.simulator import StageCost, simulate

__all__ = [
    "METHODS",
    "Link",
    "Prediction",
    "StageCost",
    "Work",
    "advice",
    "break_even",
    "grid",
    "predict",
    "simulate",
]
