"""How this process's allocator treats the memory that networks hand back."""

from functools import cache

import numpy as np

# The largest block that glibc keeps when it is freed; what is larger goes back to the system at once
# (DEFAULT_MMAP_THRESHOLD_MAX in mallopt(3)).
LARGEST_KEPT_BYTES = 32 << 20


@cache
def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to `LARGEST_KEPT_BYTES`, which costs at most twice as much idle memory.

    At the start of a process it hands blocks back from 128 KiB on, so that every layer gets its activations' memory
    anew from the system, page by page; from the largest block that was ever freed it learns to keep what is smaller.
    Here it learns it at once. A process that sets `MALLOC_MMAP_THRESHOLD_` or `MALLOC_TRIM_THRESHOLD_` keeps what it
    set, and other allocators do not notice.
    """
    np.empty(LARGEST_KEPT_BYTES - (64 << 10), dtype=np.uint8)
