"""Products of 16-bit factors on a CPU that has no instructions for them.

There torch multiplies them number by number, many times as slowly as in float32 (docs/speed.md, "Without 16-bit
instructions"). So they are multiplied in float32 and the result is rounded, which is what instructions for them do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from allmlp.ops.execution import autocast


def multiply(product: Callable[..., Tensor], *factors: Tensor | None) -> Tensor:
    """`product(*factors)`, in float32 where the processor has no instructions for the factors' dtype.

    Args:
        product: a matrix product, which may add something: a function of these tensors alone.
        factors: its arguments, the first one not None; under autocast they are cast as torch's products cast them.

    Returns:
        The product in the factors' dtype, autocast's where that is on.
    """
    if not multiplies_in_float32(*factors):
        return product(*factors)
    given = autocast(*factors)
    with torch.autocast("cpu", enabled=False):
        return product(*(x if x is None else x.float() for x in given)).to(given[0].dtype)


def multiplies_in_float32(*factors: Tensor | None) -> bool:
    """Whether `multiply` takes these factors, of which the first is given, to float32 and back."""
    if not WITHOUT_INSTRUCTIONS or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False  # what is exported or traced runs elsewhere
    # A symbolic trace (torch.fx) hands over placeholders.
    if not all(x is None or (isinstance(x, Tensor) and x.is_cpu) for x in factors):
        return False
    dtypes = [x.dtype for x in factors if x is not None]
    if torch.is_autocast_enabled("cpu"):
        dtypes = [x if x == torch.float64 else torch.get_autocast_dtype("cpu") for x in dtypes]
    return dtypes[0] in WITHOUT_INSTRUCTIONS and all(dtype == dtypes[0] for dtype in dtypes)


def _without_instructions() -> list[torch.dtype]:
    """The dtypes that this processor and torch's build cannot multiply."""
    onednn = torch.backends.mkldnn.is_available()
    can = {
        torch.bfloat16: onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: onednn and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return [dtype for dtype, supported in can.items() if not supported]


# Asked once: a compiler cannot ask while it reads.
WITHOUT_INSTRUCTIONS = _without_instructions()
