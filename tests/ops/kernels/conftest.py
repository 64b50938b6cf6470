from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that an element no kernel writes is seen."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*args, **kwargs) -> Tensor:
            x = function(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return new

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
