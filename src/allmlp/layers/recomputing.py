"""When a layer may keep less for backward."""

from collections.abc import Callable

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


def is_watched(module: nn.Module) -> bool:
    """Whether something else is called whenever `module` is: a hook, or what was put in the place of its `forward`."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(map(bool, hooks)) or bool(_has_any_global_hook()) or "forward" in vars(module)
