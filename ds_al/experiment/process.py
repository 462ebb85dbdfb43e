"""The process of a rank: what it prints, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from ds_al.errors import ALConfigError, ALDataError, ALError, ALTransportError


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
    """Calls the main function of a rank, and ends the process with 0, or with 1 where it raised."""
    try:
        main()
        atexit._run_exitfuncs()  # of W&B, and of threads that have to be joined
    except SystemExit:
        raise
    except BaseException as error:
        _report(error)
        _leave(1)  # an orderly exit would wait for ranks that wait for this one
    _leave(0)


def _report(error: BaseException) -> None:
    """Prints an error so that all ranks together show its cause once and first."""
    rank = int(os.environ.get("RANK", 0))
    if isinstance(error, ALTransportError) or "Connection closed by peer" in str(error):
        time.sleep(1)  # the neighbour that caused this prints first
        print(f"rank {rank}: {error}", file=sys.stderr)
    elif isinstance(error, (ALConfigError, ALDataError)):
        if rank == 0:  # all ranks read the same config
            print(f"error: {error}", file=sys.stderr)
    else:
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        if isinstance(error, ALError):
            print(f"rank {rank}: {error}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """Ends the process at once.

    In an orderly exit, a thread of gloo that frees a tensor during the interpreter's teardown aborts the process
    (pytorch pull request 179291), after all has been trained and written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
