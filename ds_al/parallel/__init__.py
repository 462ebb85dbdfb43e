"""Ranks: how they meet, and the data parallel replicas of a stage."""
