"""Prediction of time, bubble, memory and traffic of every method by simulation or formula, and advice which to use."""

from ds_al.planner.advice import advice, break_even, summary
from ds_al.planner.formulas import bubble_formula, ideal_seconds
from ds_al.planner.predict import COMPARED, METHODS, Prediction, grid, predict
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
    "Work",
    "advice",
    "break_even",
    "bubble_formula",
    "grid",
    "ideal_seconds",
    "predict",
    "simulate",
    "spread_speeds",
    "stage_ends",
    "summary",
]
