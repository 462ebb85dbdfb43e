"""Starts real ranks for a test; see :mod:`ds_al.launch.ranks`."""

from pathlib import Path

from ds_al.launch.ranks import RankFailure, free_port, rank_environment, run_ranks

__all__ = ["ROOT", "RankFailure", "free_port", "rank_environment", "run_ranks"]

ROOT = Path(__file__).resolve().parents[2]
