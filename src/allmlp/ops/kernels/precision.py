"""How products inside kernels round."""

import torch
import triton
import triton.language as tl

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def factor_dtype(dtype: torch.dtype) -> tl.dtype:
    """What `tl.dot` is given tensors of a dtype in."""
    # Triton's interpreter would multiply the bits of bfloat16 numbers.
    interpreted = dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return tl.float32 if interpreted else _TYPES[dtype]


def input_precision() -> str:
    """`tl.dot`'s `input_precision`: float32 factors are rounded to TF32 where torch's own products may do so."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
