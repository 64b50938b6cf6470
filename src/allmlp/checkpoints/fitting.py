"""Whether weights fit a model."""

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from allmlp.errors import UserError, listed


def with_weights(
    blank: nn.Module, build: Callable[[], nn.Module], state: Mapping[str, Tensor], where: str
) -> nn.Module:
    """A model with weights, all of them and no others, in the dtype that holds them.

    Args:
        blank: the model on the meta device, where it takes no memory; it may be the one that is filled.
        build: makes it with fresh weights. It is asked only where a model is made of more than its weights: drawing
            numbers for them takes several times as long as reading those that replace them.
        state: the weights.
        where: what they are from.

    Raises:
        UserError: as `load_weights`.
    """
    dtype = widest(state)
    model = blank.to(dtype).to_empty(device="cpu") if _is_its_weights(blank) else build().to(dtype)
    load_weights(model, state, where)
    return model


def _is_its_weights(model: nn.Module) -> bool:
    """Whether all tensors of a model stand in its state dict, each under one name."""
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    beside = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return len(names) == len(kept) and all(id(tensor) in kept for _, tensor in names) and next(beside, None) is None


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load weights, all of them and no others.

    Raises:
        UserError: if model and weights do not match; the message lists what is missing, unexpected or of another shape.
    """
    check_shapes(model, {name: list(tensor.shape) for name, tensor in state.items()}, where)
    model.load_state_dict(state)


def check_shapes(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], where: str, shared: Container[str] = ()
) -> None:
    """Check that weights of these shapes can be loaded; `shared` ones may be missing, others stand for them.

    Raises:
        UserError: as `load_weights`.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": [name for name in wanted if name not in shapes and name not in shared],
        "unexpected": [name for name in shapes if name not in wanted],
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {shape}"
            for name, shape in wanted.items()
            if name in shapes and list(shapes[name]) != shape
        ],
    }
    found = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"The weights of {where} do not match the model.\n  " + "\n  ".join(found))


def widest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype to hold them all without loss: float32, or float64 where one is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32
