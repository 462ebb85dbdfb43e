"""What each rank did, when, and with how much memory."""

from ds_al.trace.memory import ActivationMeter
from ds_al.trace.recorder import Event, RecordedSchedule, Recorder
from ds_al.trace.stats import StageStats
from ds_al.trace.timeline import draw, idle_share

__all__ = ["ActivationMeter", "Event", "RecordedSchedule", "Recorder", "StageStats", "draw", "idle_share"]
