"""Compiles every kernel for a GPU that is not there, as far as machine code, and runs none.

    python -m tests.ops.kernels.compiling CAPABILITY DTYPE

Triton's interpreter takes what its compiler refuses. Prints the kernels' names, one a line, with the bytes of shared
memory that each takes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from allmlp.ops import backends


class _AbsentGPU:
    """What Triton asks a driver before it launches anything."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_only(capability: int) -> Iterator[dict[str, int]]:
    """Inside, a launched kernel is compiled and not run; gives their names and shared memory."""
    found: dict[str, int] = {}
    run = JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        assert len(binary.asm["cubin"]) > 0
        name = kernel.__name__
        found[name] = max(found.get(name, 0), binary.metadata.shared)
        return binary

    triton.runtime.driver.set_active(_AbsentGPU(capability))
    with patch.object(JITFunction, "run", compiled), patch.object(backends, "_obstacle", lambda *_: None):
        yield found


def run_every_operator(dtype: torch.dtype) -> None:
    """Forward and backward of each operator at the sizes of the papers' networks."""
    from allmlp.ops import (
        axial_shift_linear,
        normalized_spatial_gating,
        permute_linear,
        pool_branches,
        spatial_shift_linear,
        split_attention,
    )

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    for causal in (False, True):
        x = leaf(1, 196, 1536)
        u, v = x.chunk(2, dim=-1)
        weight, bias = leaf(1, 196, 196), leaf(1, 196)
        norm_weight, norm_bias = leaf(768), leaf(768)
        unit = (u, v, norm_weight, norm_bias, 1e-5, weight, bias)
        normalized_spatial_gating(*unit, causal=causal, backend="triton").sum().backward()
    branches = [leaf(1, 16, 16, 384) for _ in range(3)]
    split_attention(branches, leaf(1, 3, 384), backend="triton").sum().backward()
    pool_branches(branches, backend="triton").sum().backward()
    x, weight, bias = leaf(1, 28, 28, 192), leaf(192, 192), leaf(192)
    for axis in ("height", "width"):
        axial_shift_linear(x, weight, bias, 5, axis, backend="triton").sum().backward()
    spatial_shift_linear(x, weight, bias, backend="triton").sum().backward()
    x, weight = leaf(1, 16, 16, 384), leaf(384, 384)
    for axis in ("height", "width"):
        permute_linear(x, weight, None, 16, axis, backend="triton").sum().backward()


def main() -> None:
    capability, dtype = sys.argv[1:]
    with compiled_only(int(capability)) as found:
        run_every_operator(getattr(torch, dtype))
    for name, shared in sorted(found.items()):
        sys.stdout.write(f"{name} {shared}\n")


if __name__ == "__main__":
    main()
