"""How torch is executing: plainly, or with something in charge that forms of our own would get in the way of."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_plain_inference() -> bool:
    """Whether torch just computes: no gradients, no trace, no function transform."""
    return not (torch.is_grad_enabled() or _is_traced())


def is_compiled() -> bool:
    """Whether a compiler reads along whose result runs here, and no function transform stands in between."""
    return torch.compiler.is_compiling() and not (torch.compiler.is_exporting() or is_transformed())


def is_compiled_inference() -> bool:
    """Whether `is_compiled`, and nothing is kept for backward."""
    return is_compiled() and not torch.is_grad_enabled()


def is_plain_training(*inputs: Tensor | None) -> bool:
    """Whether autograd, and nothing else, keeps something of these for backward, on a device that computes."""
    if not torch.is_grad_enabled() or _is_traced():
        return False
    given = [x for x in inputs if x is not None]
    # A symbolic trace (torch.fx) hands over placeholders.
    if not all(isinstance(x, Tensor) for x in given):
        return False
    return any(x.requires_grad for x in given) and not any(x.is_meta for x in given)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """These tensors as torch hands them to its own products: in autocast's dtype where that is on for their device."""
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return tensors  # asked first: for one image, the questions below are a share of the time
    kind = next((x.device.type for x in tensors if isinstance(x, Tensor)), "cpu")
    # What compilers read along lies where autocast is known, and torch 2.9's cannot follow the question.
    known = kind != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind))
    if not (known and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in tensors)


def _is_traced() -> bool:
    """Whether a compiler, an exporter, a function transform or forward-mode differentiation reads along."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()


def is_transformed() -> bool:
    """Whether a function transform (torch.func) or forward-mode differentiation reads along."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
