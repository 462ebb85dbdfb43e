"""Runs the parts one after the other, each in a process of its own, and keeps what is finished.

left      what is left of the whole time is divided over the parts that are still to run, by their shares
process   a part that fails, hangs, or runs out of time ends alone; the rows that it has told are kept
file      written after each part: a later run continues with the parts that are missing or have failed
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_al.launch.ranks import RankFailure, run_ranks, tell
from ds_al.studies.results import Row, header, now, read, write
from ds_al.studies.tables.parts import outcome

ROOT = Path(__file__).resolve().parents[2]
_LEAST = 15.0  # seconds; a part that has less is not started
_TAIL = 2000  # characters kept of a failed part's output


@dataclass(frozen=True)
class Part:
    """A part of the study.

    Attributes:
        name: name in the results.
        title: what it shows.
        target: ``"module:function"``, called in a process of its own with ``seconds``, its time limit, and the options.
        share: its share of the time, relative to those of the other parts.
        options: keyword arguments of the function.
    """

    name: str
    title: str
    target: str
    share: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def key(self, machine: Mapping[str, Any]) -> str:
        """Returns what a finished part depends on: code, machine, options."""
        text = json.dumps([code_digest(), self.target, self.options, machine], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def code_digest(root: Path = ROOT) -> str:
    """Returns a digest of the package and of its tests, since a copy of the tree may have no git history."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for folder in ("ds_al", "tests") for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def limits(shares: Sequence[float], seconds: float) -> list[float]:
    """Divides seconds by shares."""
    return [seconds * share / sum(shares) for share in shares]


def tell_row(row: Row) -> None:
    """Sends a row of the results from the process of a part."""
    tell(json.dumps({"row": row}))


def run_parts(
    parts: Sequence[Part],
    *,
    path: Path,
    minutes: float,
    machine: Mapping[str, Any],
    kind: str = "gpu",
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Runs the parts that are not finished, and writes the results after each.

    Args:
        parts: all parts.
        path: results file, of an earlier run or new.
        minutes: time of all parts together; what a part leaves is given to those after it.
        machine: facts of the machine, for the header.
        kind: kind of the results.
        device: where the parts compute: DeepSpeed's name of an accelerator.
        say: called with lines of progress.

    Returns:
        One row per part: ``part, title, key, done, reason, date, seconds, limit, rows``. ``reason`` says why a part is
        not done, and is empty where it is. ``rows`` are those of the part.
    """
    end = time.monotonic() + 60 * minutes
    known = _known(path)
    keys = {part.name: part.key(machine) for part in parts}
    todo = [part for part in parts if not _is_done(known.get(part.name), keys[part.name])]
    for part in parts:
        if part not in todo:
            say(f"{part.title}: done on {known[part.name]['date']}")
    for number, part in enumerate(todo):
        (seconds, *_) = limits([each.share for each in todo[number:]], max(0.0, end - time.monotonic()))
        say(f"{part.title}: at most {seconds:.0f} s")
        known[part.name] = row = run_part(part, seconds=seconds, key=keys[part.name], device=device, say=say)
        say(f"{part.title}: {outcome(row)}, {row['seconds']:.0f} s")
        rows = list(known.values())  # those of other parts, too, where only some are asked for
        write(path, kind=kind, header=header(minutes=minutes, **machine), rows=rows, as_csv=False)
    return [known[part.name] for part in parts]


def plan(
    parts: Sequence[Part], *, path: Path, minutes: float, machine: Mapping[str, Any]
) -> list[tuple[Part, float | None]]:
    """Returns each part with the least time limit that :func:`run_parts` would give it; ``None`` if it is finished."""
    known = _known(path)
    todo = [part for part in parts if not _is_done(known.get(part.name), part.key(machine))]
    seconds = dict(zip([part.name for part in todo], limits([part.share for part in todo], 60 * minutes), strict=True))
    return [(part, seconds.get(part.name)) for part in parts]


def _known(path: Path) -> dict[str, Row]:
    """Returns the rows of an earlier run by part."""
    return {row["part"]: row for row in read(path).rows} if path.exists() else {}


def _is_done(row: Row | None, key: str) -> bool:
    return row is not None and row["done"] and row["key"] == key


def run_part(part: Part, *, seconds: float, key: str, device: str, say: Callable[[str], None]) -> Row:
    """Runs one part in a process of its own, and returns its row; never raises."""
    start, rows, reason = time.monotonic(), list[Row](), ""

    def news(line: str) -> None:
        row = _row_of(line)
        if row is None:
            say(f"  {line}")
        else:
            rows.append(row)
            say(f"  {', '.join(_told(row))}")

    if seconds < _LEAST:
        reason = f"not started: {seconds:.0f} s were left; run it again"
    else:
        env = {"DS_ACCELERATOR": device}
        try:
            run_ranks(part.target, 1, timeout=seconds, env=env, news=news, seconds=seconds, **part.options)
        except RankFailure as failure:
            late = failure.seconds >= seconds
            reason = f"not done after {seconds:.0f} s" if late else _last_line(failure.outputs[0])
    return {
        "part": part.name,
        "title": part.title,
        "key": key,
        "done": not reason,
        "reason": reason,
        "date": now(),
        "seconds": time.monotonic() - start,
        "limit": seconds,
        "rows": rows,
    }


def _row_of(line: str) -> Row | None:
    """Returns the row that a line of :func:`tell_row` holds; ``None`` for any other line."""
    try:
        return json.loads(line)["row"]
    except (ValueError, KeyError, TypeError):
        return None


def _told(row: Row) -> Iterator[str]:
    """Yields the values of a row that fit into a line of progress."""
    for name, value in row.items():
        if isinstance(value, float):
            yield f"{name} {value:.4g}"
        elif isinstance(value, (str, int)) and value != "":
            yield f"{name} {str(value).splitlines()[0][:120]}"


def _last_line(output: str) -> str:
    """Returns the end of an output, its last line, which names the error, first."""
    lines = output.strip()[-_TAIL:].splitlines()
    return "\n".join([lines[-1], *lines[:-1]]) if lines else "the process ended without a word"
