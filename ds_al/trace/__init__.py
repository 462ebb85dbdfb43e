"""What each rank did, when, and with how much memory."""

from ds_al.trace.event import Event
from ds_al.trace.memory import ActivationMeter
from ds_al.trace.recorder import Observation, RecordedSchedule, Recorder
from ds_al.trace.stall import StallWatch
from ds_al.trace.stats import StageStats
from ds_al.trace.tracing import Tracing
from ds_al.trace.vitals import Report, Vitals, VitalsMeter

__all__ = [
    "ActivationMeter",
    "Event",
    "Observation",
    "RecordedSchedule",
    "Recorder",
    "Report",
    "StageStats",
    "StallWatch",
    "Tracing",
    "Vitals",
    "VitalsMeter",
]
