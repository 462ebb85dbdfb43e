"""Process and machine: supported versions, provenance of results, memory allocator."""

VERSION = "0.1.0"
"""Release of ds_al, as in ``pyproject.toml``; public as ``ds_al.__version__``."""
