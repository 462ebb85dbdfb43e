"""Tracing and metrics: executed instructions, waiting times, activation memory, and a watchdog for stalls."""

from ds_al.trace.calls import Calls, batch_call, joint_call
from ds_al.trace.events import Event
from ds_al.trace.meter import ActivationMeter
from ds_al.trace.metrics import Report, StageMeter, StageMetrics
from ds_al.trace.recorder import Observation, Progress, Recorder, Recording
from ds_al.trace.stats import StageCounters, StageStats
from ds_al.trace.tracing import Tracing
from ds_al.trace.watchdog import Watchdog

__all__ = [
    "ActivationMeter",
    "Calls",
    "Event",
    "Observation",
    "Progress",
    "Recorder",
    "Recording",
    "Report",
    "StageCounters",
    "StageMeter",
    "StageMetrics",
    "StageStats",
    "Tracing",
    "Watchdog",
    "batch_call",
    "joint_call",
]
