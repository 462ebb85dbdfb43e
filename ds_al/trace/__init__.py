"""What each rank did, when, and with how much memory."""

from ds_al.trace.event import Event
from ds_al.trace.memory import ActivationMeter
from ds_al.trace.recorder import Observation, RecordedSchedule, Recorder
from ds_al.trace.stats import StageStats
from ds_al.trace.tracing import Tracing

__all__ = ["ActivationMeter", "Event", "Observation", "RecordedSchedule", "Recorder", "StageStats", "Tracing"]
