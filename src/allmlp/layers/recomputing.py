"""When a layer may keep less, for backward and in inference, or leave what its parts compute to one operator."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from allmlp.layers.token_linear import TokenLinear
from allmlp.ops.recomputing import Across, recomputing_linear, worth_recomputing

_ACROSS: dict[type[nn.Module], Across] = {nn.Linear: "channels", TokenLinear: "tokens"}


def linear_after(linear: nn.Module, prologue: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`linear(prologue(*inputs))`, keeping `inputs` for backward in place of what `prologue` makes of them.

    A layer in the place of `linear` that is no plain `nn.Linear` or `TokenLinear` (an adapter, a quantised one), or
    whose calls a hook watches, is called as it is.

    Args:
        linear: the layer.
        prologue: cheap to compute, without parameters and randomness.
        inputs: what `prologue` is given.
    """
    across = _ACROSS.get(type(linear))
    if across is None or is_watched(linear) or not all(isinstance(x, Tensor) for x in inputs):
        return linear(prologue(*inputs))
    if not worth_recomputing(*inputs, linear.weight, linear.bias):  # type: ignore[arg-type]
        return linear(prologue(*inputs))
    return recomputing_linear(across, prologue, inputs, linear.weight, linear.bias)  # type: ignore[arg-type]


def activated(linear: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """`act(linear(x))`; in plain eager inference a GELU is written over the map's output, which nobody else reads.

    Args:
        linear: the layer; one that is no plain `nn.Linear` or `TokenLinear`, or is watched, keeps its output.
        act: the activation; one that is no `nn.GELU`, or is watched, is called as it is.
        x: what `linear` is given.
    """
    y = linear(x)
    plain = type(linear) in _ACROSS and type(act) is nn.GELU and not (is_watched(linear) or is_watched(act))
    if plain and type(y) is Tensor and _is_plain_inference():
        return torch.ops.aten.gelu_(y, approximate=act.approximate)
    return act(y)


def linear_act_linear(fc1: nn.Module, act: nn.Module, fc2: nn.Module, x: Tensor) -> Tensor:
    """`fc2(act(fc1(x)))`, keeping the hidden layer once: for backward before the activation, in inference behind it."""
    if torch.is_grad_enabled():
        return linear_after(fc2, act, fc1(x))
    return fc2(activated(fc1, act, x))


def _is_plain_inference() -> bool:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return not (traced or torch.is_grad_enabled())


def is_plain_linear(linear: nn.Module, x: Tensor) -> bool:
    """Whether nobody notices if an operator reads the parameters of `linear` and computes what `linear` would of `x`.

    It is an `nn.Linear` and no adapter or quantised layer, no hook watches it, and `x` is no placeholder of a trace.
    """
    return type(linear) is nn.Linear and not is_watched(linear) and isinstance(x, Tensor)


def is_watched(module: nn.Module) -> bool:
    """Whether something else is called whenever `module` is: a hook, or what was put in the place of its `forward`."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(map(bool, hooks)) or bool(_has_any_global_hook()) or "forward" in vars(module)
