"""Measurements of the schedules: time beside the ideal, memory held for backward, where the time goes."""
