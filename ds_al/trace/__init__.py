"""What each rank did, when, and with how much memory."""

from ds_al.trace.memory import ActivationMeter
from ds_al.trace.recorder import Event, RecordedSchedule, Recorder
from ds_al.trace.stall import StallWatch
from ds_al.trace.stats import StageStats
from ds_al.trace.timeline import draw, idle_share
from ds_al.trace.vitals import Report, Vitals, VitalsMeter

__all__ = [
    "ActivationMeter",
    "Event",
    "RecordedSchedule",
    "Recorder",
    "Report",
    "StageStats",
    "StallWatch",
    "Vitals",
    "VitalsMeter",
    "draw",
    "idle_share",
]
