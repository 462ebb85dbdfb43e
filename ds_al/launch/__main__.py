"""``python -m ds_al.launch TARGET FOLDER``: entry point of one rank, started by :mod:`ds_al.launch.ranks`."""

import sys

from ds_al.launch.ranks import main
from ds_al.launch.warm import run_and_leave

run_and_leave(main, *sys.argv[1:])
