"""Whether weights fit a model."""

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from allmlp.errors import UserError, listed


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
