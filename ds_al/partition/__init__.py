"""Partition of a network into stages: methods, measured layer times, and their cache."""
