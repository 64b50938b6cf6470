from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from allmlp.ops.kernels import gathered_linear
from allmlp.ops.kernels.gathered_linear import Blocks


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that an element no kernel writes is seen."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*args, **kwargs) -> Tensor:
            x = function(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return new

    # torch remembers the functions that `with torch.device(…)` concerns; asked first now, it would remember these.
    _device_constructors()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a small map takes several of them, and its positions several parts of a sum."""
    monkeypatch.setattr(gathered_linear, "choose_blocks", lambda *_: Blocks(16, 16, 16, warps=4))
    monkeypatch.setattr(gathered_linear, "choose_programs", lambda _: 100)
    monkeypatch.setattr(gathered_linear, "FEWEST_STEPS", 2)
