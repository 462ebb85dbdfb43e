"""Execution of layers: ``torch.compile``, and activation checkpointing."""
