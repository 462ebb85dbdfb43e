"""``python -m ds_al.launch TARGET FOLDER``: one rank, as :mod:`ds_al.launch.ranks` starts it."""

import sys

from ds_al.launch.ranks import main

main(*sys.argv[1:])
