"""Measurements and comparisons that the documentation reports. Not part of the installed package."""
