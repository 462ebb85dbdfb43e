"""Predictions for many stages."""
