"""Measurements of the schedules: time beside the ideal, memory held for backward, where the time goes."""

from ds_al.studies.bench import guard, report
from ds_al.studies.bench.cases import SleepingCases, measure_memory, measure_sleeping

__all__ = ["SleepingCases", "guard", "measure_memory", "measure_sleeping", "report"]
