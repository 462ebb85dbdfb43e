"""Partitioning of a network into stages: methods, layer costs, and their measurement."""
