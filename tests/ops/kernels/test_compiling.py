"""Every kernel through Triton's compiler, for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "_adjoint",
    "_gated_product",
    "_linear",
    "_norm_backward",
    "_pool",
    "_token_statistics",
    "_transposed_product",
    "_weigh",
    "_weigh_grad",
    "_weight_backward",
    "_weight_grad",
}
# What one program may take, in bytes, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


# Both capabilities and both widths; float32 takes more shared memory, and 8.0 has less.
@pytest.mark.parametrize(("capability", "dtype"), [(80, "float32"), (90, "bfloat16")])
def test_kernels_compile_and_fit(capability: int, dtype: str, tmp_path: Path) -> None:
    # In a process of its own, which is not told to interpret.
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.kernels.compiling", str(capability), dtype],
        capture_output=True,
        text=True,
        env={**own, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    shared = {name: int(size) for name, size in (line.split() for line in done.stdout.splitlines())}
    assert set(shared) == KERNELS
    assert max(shared.values()) <= SHARED_MEMORY[capability]
