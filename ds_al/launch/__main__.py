"""``python -m ds_al.launch TARGET FOLDER``: entry point of one rank, started by :mod:`ds_al.launch.ranks`."""

import sys

from ds_al.launch.ranks import main

main(*sys.argv[1:])
