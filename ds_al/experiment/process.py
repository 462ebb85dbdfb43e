"""The process of a rank: what it prints, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ds_al.errors import ALConfigError, ALDataError, ALError, ALTransportError
from ds_al.experiment.stopping import Stopped
from ds_al.parallel import presence
from ds_al.parallel.agreement import ALDisagreement, is_first_here
from ds_al.parallel.lost import is_loss


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards what libraries print inside; after an error it is printed, as it may explain the error."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    except BaseException:
        print(text.getvalue(), end="")
        raise


def run_rank(main: Callable[[], None]) -> NoReturn:
    """Calls the main function of a rank, and ends the process.

    The exit code is 0, or 1 where the function raised, or 128 and the signal's number where a signal has ended the run
    (:mod:`ds_al.experiment.stopping`).
    """
    code = 0
    try:
        main()
    except SystemExit:
        raise
    except Stopped as stop:
        code = stop.code
        if is_first_here():
            print(stop, file=sys.stderr)
    except BaseException as error:
        _report(error)
        _leave(1)  # an orderly exit would wait for ranks that wait for this one
    atexit._run_exitfuncs()  # of W&B, and of threads that have to be joined
    _finalize_mpi()
    _leave(code)


def _report(error: BaseException) -> None:
    """Prints an error so that all ranks together show its cause first, and once on each host if all have the same."""
    here = presence.here()
    who = f"rank {os.environ.get('RANK', 0)} ({here.own.host})"
    lost = here.world > 1 and is_loss(error)
    here.fail(error, lost=lost)
    if lost or isinstance(error, ALTransportError):
        cause = here.cause()  # waits until the rank that caused this has told why
        print(f"{who}: {error}{'' if cause in str(error) else f' {cause}'}", file=sys.stderr)
    elif isinstance(error, (ALConfigError, ALDataError)):
        alike = here.all_failed_alike()
        if not alike or isinstance(error, ALDisagreement):
            print(f"{who}: error: {error}", file=sys.stderr)
        elif is_first_here():
            print(f"error: {error}", file=sys.stderr)
    else:
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        if isinstance(error, ALError):
            print(f"{who}: {error}", file=sys.stderr)


def _finalize_mpi() -> None:
    """Ends MPI where mpi4py has started it: ``mpirun`` reports a process that leaves without it as failed."""
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _leave(code: int) -> NoReturn:
    """Ends the process at once.

    In an orderly exit, a thread of gloo that frees a tensor during the interpreter's teardown aborts the process
    (pytorch pull request 179291), after all has been trained and written.
    """
    presence.here().end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
