"""One training run from a config file: what ``run/train.py`` does."""
