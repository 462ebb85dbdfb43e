"""What a step frees stays with the process."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from ds_al.system.allocator import keep_freed_memory

_STEP = """
import ctypes, resource, sys
from ds_al.system.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def step(pieces=[0] * 16, size=8 * 2**20):
    for n in range(16):
        pieces[n] = libc.malloc(size)
        libc.memset(pieces[n], 1, size)
    for piece in reversed(pieces):
        libc.free(piece)
step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(); step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is asked")
def test_freed_memory_is_not_paged_in_again() -> None:
    def faults(what: str) -> tuple[bool, int]:
        run = subprocess.run([sys.executable, "-c", _STEP, what], capture_output=True, text=True, timeout=120)
        kept, count = run.stdout.split()
        return kept == "True", int(count)

    kept, count = faults("keep")
    if not kept:
        pytest.skip("no glibc")
    pages = 128 * 2**20 // resource.getpagesize()
    assert count < pages / 2
    assert faults("not")[1] > pages  # or this test shows nothing


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
