"""Exception types of ds_al. Each message states what was given, what is expected and what to change."""

from __future__ import annotations


class ALError(Exception):
    """Base class of all errors raised by ds_al."""


class ALConfigError(ALError, ValueError):
    """A config has a key or value that is unknown, contradictory or not supported."""


class ALDataError(ALError, ValueError):
    """The engine cannot train on a batch, a label or a data set."""


class ALLayerError(ALError, RuntimeError):
    """A layer raised an exception, or returned a value that cannot be sent to the next stage."""


class ALTransportError(ALError, RuntimeError):
    """A neighbouring stage could not be reached, or its messages changed shape.

    ``lost`` is true where the process of the neighbour has ended, or the connection to it is broken.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class ALCheckpointError(ALError, RuntimeError):
    """A checkpoint is missing, incomplete, or does not fit the network or job."""


class ALRecoveryError(ALError, RuntimeError):
    """A process that took the place of another one cannot do again what that one did."""


class ALReportError(ALError, RuntimeError):
    """A report cannot be built from these runs, or cannot be written."""


class ALVersionError(ALError, RuntimeError):
    """A package is missing, or ds_al does not support the installed release."""
