"""Checkpoints by AL layer: loadable on any number of stages, verified before any state changes, asynchronous saves."""
