"""How this process's allocator treats the memory that networks hand back."""

import ctypes
import os
import sys
from functools import cache

# The largest block that glibc can keep when it is freed; what is larger goes back to the system at once
# (DEFAULT_MMAP_THRESHOLD_MAX in mallopt(3)).
LARGEST_KEPT_BYTES = 32 << 20

# Parameters of mallopt(3), with their numbers in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1


@cache
def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to `LARGEST_KEPT_BYTES`, as torch's allocator does on a GPU.

    At the start of a process it hands blocks back from 128 KiB on, and later whatever lies free above 64 MiB: every
    layer gets its activations' memory anew from the system, page by page, and every training step what was kept for
    the last one's backward. Keeping it costs no memory at the highest point, and idle memory afterwards, which
    `malloc_trim(3)` gives back. A process whose environment sets one of both thresholds (`MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`) is left as it was set up; other allocators do not notice.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    tuned = any(
        f"MALLOC_{threshold.upper()}_" in os.environ or f"glibc.malloc.{threshold}" in tunables
        for threshold in ("trim_threshold", "mmap_threshold")
    )
    if tuned or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # One without the other would leave the first at its small value: setting either ends glibc's own adjustment.
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES):
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
