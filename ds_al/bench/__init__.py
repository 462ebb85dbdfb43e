"""Measurements of the schedules: time beside the ideal, memory held for backward, who did what when."""

from ds_al.bench import report
from ds_al.bench.cases import SleepingCases, measure_memory, measure_sleeping, record_timelines

__all__ = ["SleepingCases", "measure_memory", "measure_sleeping", "record_timelines", "report"]
