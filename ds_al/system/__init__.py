"""This process and machine: versions, origin of results, allocator."""

VERSION = "0.1.0"
"""The release of ds_al, as in ``pyproject.toml``; public as ``ds_al.__version__``."""
