"""``python -m ds_al doctor``: reports installed packages, the machine, and which features will work.

It only looks: no process group is started, nothing is compiled, nothing is downloaded.
"""

from ds_al.doctor.command import add_command, examine, exit_code, run
from ds_al.doctor.row import Row, Status

__all__ = ["Row", "Status", "add_command", "examine", "exit_code", "run"]
