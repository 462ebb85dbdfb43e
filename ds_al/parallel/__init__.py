"""Ranks: initialization of the process group, topology of stages and replicas, and gradient averaging."""
