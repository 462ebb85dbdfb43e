"""Checkpoints by AL layer: saved by any number of stages, loaded by any other, checked before anything is changed."""
