"""What the server of preloaded processes imports last: it leaves to its forks what each would otherwise do again."""

from __future__ import annotations

import gc

from ds_al.parallel.facts import environment

environment()  # reads the code of ds_al and the metadata of packages, and keeps what it found
gc.collect()
gc.freeze()  # collections of the forks leave out what was imported, and so do not copy its pages
