"""Keeps start-up prints of libraries off the console."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards what is printed inside; after an error it is printed, as it may explain the error."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    except BaseException:
        print(text.getvalue(), end="")
        raise
