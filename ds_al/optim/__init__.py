"""Optimizers of one stage: by layer, with masters, loss scales and ZeRO-1."""
