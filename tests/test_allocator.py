import os
import platform
import subprocess
import sys

import pytest

# Pages that the system has to give anew for some blocks of 10 MiB, eight times, over the pages they have.
FAULTS = """
import resource, numpy as np
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    blocks = [np.empty(10 << 20, dtype=np.uint8) for _ in range({blocks})]
    for block in blocks:
        block.fill(1)
fill()
fill()
begin = faults()
for _ in range(8):
    fill()
print((faults() - begin) / (8 * {blocks} * (10 << 20) / resource.getpagesize()))
"""
KEEP = "from allmlp.allocator import keep_freed_memory; keep_freed_memory()"


glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")


def faulted(before: str, blocks: int, **environment: str) -> float:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    # Of huge pages a few would do.
    own |= {"NUMPY_MADVISE_HUGEPAGE": "0", **environment}
    command = [sys.executable, "-c", FAULTS.format(before=before, blocks=blocks)]
    return float(subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout)


@glibc_only
@pytest.mark.parametrize("blocks", [3, 9], ids=["one layer's", "a training step's"])
def test_freed_memory_serves_again(blocks: int) -> None:
    assert faulted("", blocks) > 0.5
    assert faulted(KEEP, blocks, MALLOC_ARENA_MAX="2") < 0.05


@glibc_only
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000")],
)
def test_what_the_environment_says_about_malloc_stands(name: str, value: str) -> None:
    assert faulted(KEEP, 3, **{name: value}) > 0.5
