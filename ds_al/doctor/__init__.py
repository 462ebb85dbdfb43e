"""``python -m ds_al doctor``: what is installed, what this machine has, and what works on it.

It only examines: it starts no process group, compiles nothing and downloads nothing.
"""

from ds_al.doctor.command import add_command, examine, exit_code, run
from ds_al.doctor.finding import Finding, Status

__all__ = ["Finding", "Status", "add_command", "examine", "exit_code", "run"]
