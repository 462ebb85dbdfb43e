"""Prediction of time, bubble, memory and traffic of every method by simulation or formula, and advice which to use."""

from ds_al.planner.advice import Wishes, advice, best_of_all, break_even, choose, summary
from ds_al.planner.formulas import bubble_formula, ideal_seconds
from ds_al.planner.groups import group_sizes, predict_groups
from ds_al.planner.predict import COMPARED, METHODS, grid, predict
from ds_al.planner.prediction import Prediction
from ds_al.planner.simulator import StageCost, simulate, stage_ends
from ds_al.planner.stragglers import Jitter, spread_speeds
from ds_al.planner.work import Layer, Link, Machines, Work

__all__ = [
    "COMPARED",
    "METHODS",
    "Jitter",
    "Layer",
    "Link",
    "Machines",
    "Prediction",
    "StageCost",
    "Wishes",
    "Work",
    "advice",
    "best_of_all",
    "break_even",
    "bubble_formula",
    "choose",
    "grid",
    "group_sizes",
    "ideal_seconds",
    "predict",
    "predict_groups",
    "simulate",
    "spread_speeds",
    "stage_ends",
    "summary",
]
