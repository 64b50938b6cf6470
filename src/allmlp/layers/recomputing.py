"""When a layer may keep less, for backward and in inference, or leave what its parts compute to one operator."""

from collections.abc import Callable
from functools import partial
from typing import TypeGuard, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from allmlp import ops
from allmlp.layers.token_linear import TokenLinear
from allmlp.ops.execution import autocast, is_compiled, is_compiled_inference, is_plain_inference, is_plain_training
from allmlp.ops.gelu import gelu_of_product
from allmlp.ops.products import multiplies_in_float32
from allmlp.ops.recomputing import Across, recomputing_linear

Branch = TypeVar("Branch", bound=nn.Module)
_ADD_ONTO: set[type[nn.Module]] = set()
_ACROSS: dict[type[nn.Module], Across] = {nn.Linear: "channels", TokenLinear: "tokens"}
_RATES: dict[type[nn.Module], str] = {nn.Dropout: "p", DropPath: "drop_prob"}
# Under a function transform parameters are plain tensors, in an exporter's trace stand-ins for them.
_WEIGHTS: set[type[Tensor]] = {nn.Parameter, Tensor, FakeTensor}
_ELEMENTWISE = {nn.GELU, nn.ReLU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh}


def linear_after(linear: nn.Module, prologue: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`linear(prologue(*inputs))`, keeping `inputs` for backward in place of what `prologue` makes of them.

    A layer in the place of `linear` that is no plain `nn.Linear` or `TokenLinear` (an adapter, a quantised one, a plain
    one with a quantised weight), or whose calls a hook watches, is called as it is.

    Args:
        linear: the layer.
        prologue: cheap to compute, without parameters and randomness.
        inputs: what `prologue` is given.
    """
    across = _ACROSS.get(type(linear))
    if across is None or not _is_readable(linear) or not all(isinstance(x, Tensor) for x in inputs):
        return mapped(linear, prologue(*inputs))
    if not is_plain_training(*inputs, linear.weight, linear.bias):  # type: ignore[arg-type]
        return mapped(linear, prologue(*inputs))
    return recomputing_linear(across, prologue, inputs, linear.weight, linear.bias)  # type: ignore[arg-type]


def mapped(linear: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """`linear(x)`, or `act(linear(x))`; in inference a GELU is applied where the output lies (see `ops.linear`).

    Args:
        linear: the layer; one that is no plain `nn.Linear` or `TokenLinear`, or is watched, is called as it is.
        x: what it is given.
        act: the activation; one that is no `nn.GELU`, or is watched, is called as it is.
    """
    alone = is_plain_inference() or is_compiled_inference()
    fits = alone and (act is None or (type(act) is nn.GELU and not is_watched(act)))
    gelu = act.approximate if fits and act is not None else None
    if is_plain_linear(linear, x) and (fits or multiplies_in_float32(x, linear.weight, linear.bias)):
        y = ops.linear(x, linear.weight, linear.bias, gelu)  # type: ignore[arg-type]  (nn.GELU says str)
        return y if act is None or gelu is not None else activated(act, y)
    y = linear(x)
    if gelu is not None and type(linear) is TokenLinear and not is_watched(linear):
        return gelu_of_product(y, gelu)
    return y if act is None else activated(act, y)


def activated(act: nn.Module, x: Tensor) -> Tensor:
    """`act(x)`; in compiled models by `ops.gelu`, unless `act` is no `nn.GELU` or is watched."""
    if is_compiled() and type(act) is nn.GELU and not is_watched(act):
        return ops.gelu(x, act.approximate)
    return act(x)


def mapped_onto(onto: Tensor | None, linear: nn.Module, x: Tensor) -> Tensor:
    """`onto + linear(x)`, in inference without a pass of its own for the addition (see `ops.linear_onto`).

    Args:
        onto: what the product is added to; None for nothing.
        linear: the layer; one that is no plain `nn.Linear`, or is watched, is called as it is.
        x: what it is given.
    """
    if onto is None:
        return mapped(linear, x)
    if is_plain_inference() and is_plain_linear(linear, x):
        return ops.linear_onto(onto, x, linear.weight, linear.bias)
    return onto + mapped(linear, x)


def adds_onto(branch: type[Branch]) -> type[Branch]:
    """Mark a class whose `forward(x, onto)` adds `onto`, None for nothing, to its result."""
    _ADD_ONTO.add(branch)
    return branch


def residual(x: Tensor, branch: nn.Module, given: Tensor, drop_path: nn.Module) -> Tensor:
    """`x + drop_path(branch(given))`, in inference by a branch that adds `x` itself where it is such a one.

    Args:
        x: what the branch is added to.
        branch: of any class; of those marked by `adds_onto` nobody notices, in inference, what they add to.
        given: what the branch is given.
        drop_path: stochastic depth.
    """
    if type(branch) in _ADD_ONTO and not is_watched(branch) and pass_unchanged(x, drop_path):
        return branch(given, x)
    return x + drop_path(branch(given))


def laid_out(x: Tensor) -> Tensor:
    """`x`, which in inference a compiler for CPUs keeps in the order it has in plain execution, and computes once.

    A sum of maps that permuted branches read is laid out for these otherwise: what reads it row by row then gathers
    number by number, and what torch 2.14 makes of transposing bfloat16 with AVX-512 returns numbers nobody wrote.
    """
    return torch.as_strided(x, x.shape, x.stride()) if is_compiled_inference() and x.is_cpu else x


def pass_unchanged(x: Tensor, *drops: nn.Module) -> bool:
    """Whether in plain inference these dropouts hand on tensors like `x`, no placeholders, and nobody watches them."""
    return is_plain_inference() and isinstance(x, Tensor) and all(map(is_idle, drops))


def mapped_halves(linear: nn.Module, x: Tensor, act: nn.Module) -> tuple[Tensor, Tensor]:
    """The halves of `act(linear(x))`'s channels, each contiguous where `linear` and `act` are plain.

    Args:
        linear: the layer; one that is no plain `nn.Linear`, or is watched, is called as it is.
        x: what it is given.
        act: the activation, element by element; one that is watched or has parameters is called once.
    """
    if not is_plain_linear(linear, x) or is_watched(act) or next(act.parameters(), None) is not None:
        u, v = mapped(linear, x, act).chunk(2, dim=-1)
        return u, v
    gelu = act.approximate if type(act) is nn.GELU else None
    # Once for both: else each would keep a copy.
    (x,) = autocast(x)
    weights = linear.weight.chunk(2)
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    u, v = (ops.linear(x, *half, gelu) for half in zip(weights, biases, strict=True))  # type: ignore[arg-type]
    return (u, v) if gelu is not None else (act(u), act(v))


def linear_act_linear(fc1: nn.Module, act: nn.Module, fc2: nn.Module, x: Tensor) -> Tensor:
    """`fc2(act(fc1(x)))`, keeping the hidden layer once: for backward before the activation, in inference behind it."""
    if torch.is_grad_enabled() and is_repeatable(act):
        return linear_after(fc2, partial(activated, act), mapped(fc1, x))
    return mapped(fc2, mapped(fc1, x, act))


def is_plain_linear(linear: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether nobody notices if an operator reads the parameters of `linear` and computes what `linear` would of `x`.

    It is an `nn.Linear` and no adapter or quantised layer, its weight is a plain tensor and no quantised or sharded one
    of a class of its own, no hook watches it, and `x` is no placeholder of a trace.
    """
    return type(linear) is nn.Linear and _is_readable(linear) and isinstance(x, Tensor)


def _is_readable(linear: nn.Module) -> bool:
    return type(linear.weight) in _WEIGHTS and not is_watched(linear)


def is_idle(drop: nn.Module) -> bool:
    """Whether a dropout or stochastic depth hands on what it is given, and nobody notices if it is not called."""
    if is_watched(drop):
        return False
    rate = _RATES.get(type(drop))
    return type(drop) is nn.Identity or (rate is not None and not (drop.training and getattr(drop, rate)))


def is_repeatable(act: nn.Module) -> bool:
    """Whether backward may compute an activation again: it has no parameters, draws nothing, and nobody watches it."""
    return type(act) in _ELEMENTWISE and not getattr(act, "inplace", False) and not is_watched(act)


def is_watched(module: nn.Module) -> bool:
    """Whether something else is called whenever `module` is: a hook, or what was put in the place of its `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
        or "forward" in module.__dict__
    )
