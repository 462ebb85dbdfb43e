"""Every error that ds_al raises on purpose.

Each message says what came, what was expected and what to change.
"""

from __future__ import annotations


class ALError(Exception):
    """Base of all errors raised by ds_al."""


class ALConfigError(ALError, ValueError):
    """A configuration asks for something unknown, contradictory or not supported."""


class ALDataError(ALError, ValueError):
    """A batch, a label or a data set is not what the engine can train on."""


class ALLayerError(ALError, RuntimeError):
    """A layer raised, or returned something that cannot travel to the next stage."""


class ALTransportError(ALError, RuntimeError):
    """A neighbouring stage could not be reached, or its messages changed shape."""


class ALCheckpointError(ALError, RuntimeError):
    """A checkpoint is missing, incomplete, or of another layout."""


class ALReportError(ALError, RuntimeError):
    """A report cannot be made of these runs, or not where it should go."""


class ALVersionError(ALError, RuntimeError):
    """A package is missing, or of a release that ds_al does not work with."""
