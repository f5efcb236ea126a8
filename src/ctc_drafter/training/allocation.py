"""Memory for training on a CPU: tensors of tens of megabytes that come and go in every step."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Let this process keep the memory that it frees, in huge pages where the system grants them.

    glibc gives large blocks back at once, and the system clears every page again when it hands them out anew. The
    process then holds its largest use until it ends. Call it before torch's first tensor, which is when torch asks
    about huge pages. What the user has chosen by MALLOC_MMAP_MAX_ or THP_MEM_ALLOC_ENABLE stays; other C libraries than
    glibc are left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_MMAP_MAX_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
