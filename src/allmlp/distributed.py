"""Which process of a distributed training this is."""

import os


def is_first_process() -> bool:
    """Whether this process speaks and writes: the first as torchrun numbers them, or the only one."""
    return os.environ.get("RANK", "0") == "0"
