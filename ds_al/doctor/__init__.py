"""``python -m ds_al doctor``: reports the installed software, the machine, and the features that work on it.

The report has no side effects: it starts no process group, compiles nothing and downloads nothing.
"""

from ds_al.doctor.command import add_command, examine, exit_code, run
from ds_al.doctor.finding import Finding, Status

__all__ = ["Finding", "Status", "add_command", "examine", "exit_code", "run"]
