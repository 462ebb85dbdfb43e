"""Exception types of ds_al.

Each message says what came, what was expected and what to change.
"""

from __future__ import annotations


class ALError(Exception):
    """Base of all errors raised by ds_al."""


class ALConfigError(ALError, ValueError):
    """A configuration asks for something unknown, contradictory or not supported."""


class ALDataError(ALError, ValueError):
    """The engine cannot train on a batch, a label or a data set."""


class ALLayerError(ALError, RuntimeError):
    """A layer raised, or returned a value that cannot be sent to the next stage."""


class ALTransportError(ALError, RuntimeError):
    """A neighbouring stage could not be reached, or its messages changed shape."""


class ALCheckpointError(ALError, RuntimeError):
    """A checkpoint is missing, incomplete, or of another layout."""


class ALReportError(ALError, RuntimeError):
    """A report of these runs cannot be made, or cannot be written to its path."""


class ALVersionError(ALError, RuntimeError):
    """A package is missing, or ds_al does not support its release."""
