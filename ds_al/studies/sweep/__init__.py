"""Compares methods on one network and data set: what ``run/compare.py`` does."""
