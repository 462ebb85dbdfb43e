"""Measurements of the schedules: time compared with the ideal, memory held for backward, time breakdowns."""
