"""Runs one experiment from a config file, for ``run/train.py``."""
