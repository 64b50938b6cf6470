"""Which form of an operator runs, torch's or the fused Triton kernel: the one rule for all operators."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from allmlp.ops.execution import is_transformed

Backend = Literal["auto", "torch", "triton"]

# Operators whose fused form beat torch's compiler where it was measured (benchmarks/fused.py): what "auto" takes.
MEASURED_FASTER: frozenset[str] = frozenset()

# Asked once: a compiler that reads along cannot follow the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_fused: bool | None = None


def set_fused(enable: bool | None) -> None:
    """Set what `backend="auto"` means for every operator, after the manner of timm's `set_fused_attn`.

    Args:
        enable: True: the fused form wherever it can run; False: torch's form; None, as at the start: the fused form
            where it can run and was measured to be faster.
    """
    global _fused
    _fused = enable


def takes_fused(operator: str, backend: Backend, *tensors: Tensor | None, unfit: str | None = None) -> bool:
    """Whether an operator takes its fused form for these tensors.

    Args:
        operator: its name.
        backend: `"auto"` as `set_fused` says, `"torch"`, or `"triton"`.
        tensors: everything the kernel would read.
        unfit: what of the operator's arguments has no fused form, None where they all have.

    Raises:
        ValueError: if `backend` is unknown, or is `"triton"` and the kernel cannot run, with the reason.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        wanted = operator in MEASURED_FASTER if _fused is None else _fused
        return wanted and not _traced_for_elsewhere() and (unfit or _obstacle(*tensors)) is None
    if backend != "triton":
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    reason = unfit or _obstacle(*tensors)
    if reason is not None:
        raise ValueError(f"backend 'triton' cannot run {operator}: {reason}")
    return True


def _traced_for_elsewhere() -> bool:
    """Whether what runs is being written down for another runtime, which knows no operator of ours."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _obstacle(*tensors: Tensor | None) -> str | None:
    """Why no kernel can read these tensors, None where one can."""
    given = [x for x in tensors if x is not None]
    if not all(isinstance(x, Tensor) for x in given):
        return "a symbolic trace hands it placeholders"
    if not torch.compiler.is_compiling() and is_transformed():
        return "the kernels know no function transforms (torch.func) and no forward-mode gradients"
    if not _HAS_TRITON:
        return "Triton is not installed"
    devices = {x.device for x in given}
    if len(devices) > 1:
        return f"its tensors lie on {', '.join(sorted(map(str, devices)))}"
    kind = devices.pop().type
    if kind != "cuda" and not (kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"its tensors lie on {kind!r}, the kernels run on 'cuda' (on 'cpu' under TRITON_INTERPRET=1)"
    dtypes = {x.dtype for x in given}
    if not dtypes <= set(_DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - set(_DTYPES)))
        return f"the kernels read float32, bfloat16 and float16, not {names}"
    if len(dtypes) > 1 and not torch.is_autocast_enabled(kind):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its tensors are of several dtypes, {names}, and autocast is off"
    return None
