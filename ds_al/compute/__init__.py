"""Compilation and recomputation of layers."""
