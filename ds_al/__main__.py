"""``python -m ds_al COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ds_al import doctor
from ds_al.checkpoint import consolidate
from ds_al.convert import export_command

_COMMANDS = (
    doctor.add_command,
    consolidate.add_command,
    export_command.add_command,
)
"""Each adds one sub-parser, whose default ``run`` takes the parsed arguments and returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ds_al", description="Tools of ds_al.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in _COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
