"""Freed memory stays with the process: a training step frees all its activations and needs them again at once.

The GNU C library gives large freed pieces back to the system, which must then provide - and clear - the same pages for
the next batch: 11 000 pages and a tenth of the time per batch of 64 in a ResNet-20, more in threads, whose heaps are
small. `keep` tells it not to, for the whole process; `release` gives back what is free. Other C libraries are left
alone, and so is one whose user has set MALLOC_TRIM_THRESHOLD_ or its relatives (mallopt(3)).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 28))


@functools.cache
def keep() -> bool:
    """Let the process keep the memory it frees, from now on; whether that could be arranged."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no GNU C library
        return False
    return all([mallopt(what, value) for what, value in _SETTINGS])


def settle() -> None:
    """Take everything there is now out of Python's garbage collection: for a process of our own, once it has started.

    What the imports made (170 000 objects with torch 2.13) lives as long as the process; going through it again and
    again cost a fifth of the time of a message of 4 KiB.
    """
    gc.collect()
    gc.freeze()


def release() -> None:
    """Give free memory back to the system now, if it was kept."""
    if keep.cache_info().currsize and keep():
        ctypes.CDLL(None).malloc_trim(0)
