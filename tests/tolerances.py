"""How close is equal, in one place."""

import torch
from torch import Tensor

# Largest relative and absolute deviation from a float64 reference, by the dtype of what was computed.
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}

# Largest deviation of a converted model's output from its original's, relative to the output's largest number.
PARITY: dict[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-5}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Fail unless `actual` has the shape and, within its dtype's tolerance, the values of `expected`."""
    torch.testing.assert_close(actual.double(), expected.double(), **TOLERANCES[actual.dtype])
