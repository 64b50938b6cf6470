import os
import platform
import subprocess
import sys

import pytest

# Pages that the system has to give anew for three blocks of 10 MiB, eight times, over the pages they have.
FAULTS = """
import resource, numpy as np
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    blocks = [np.empty(10 << 20, dtype=np.uint8) for _ in range(3)]
    for block in blocks:
        block.fill(1)
fill()
fill()
begin = faults()
for _ in range(8):
    fill()
print((faults() - begin) / (8 * 3 * (10 << 20) / resource.getpagesize()))
"""
KEEP = "from allmlp.allocator import keep_freed_memory; keep_freed_memory()"


def faulted(before: str) -> float:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # Of huge pages a few would do.
    own["NUMPY_MADVISE_HUGEPAGE"] = "0"
    command = [sys.executable, "-c", FAULTS.format(before=before)]
    return float(subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")
def test_freed_memory_serves_again() -> None:
    assert faulted("") > 0.5
    assert faulted(KEEP) < 0.05
