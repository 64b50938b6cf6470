"""Networks with fused operators beside the same networks without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

from allmlp.ops import set_fused
from tests.tolerances import assert_close


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "allmlp":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def fused() -> Iterator[set[str]]:
    """Take fused operators wherever they can run; gives the names of those that ran."""
    set_fused(True)
    try:
        with _Seen() as seen:
            yield seen.names
    finally:
        set_fused(None)


def assert_fused_matches(model: nn.Module, forward: Callable[[], Tensor], operators: set[str]) -> None:
    """Fail unless `operators` run when fused ones are taken, and give the output and gradients that torch's give."""
    parameters = dict(model.named_parameters())
    expected = forward()
    expected_grads = grad(expected.square().mean(), list(parameters.values()))
    with fused() as ran:
        out = forward()
        grads = grad(out.square().mean(), list(parameters.values()))
    assert operators <= ran
    assert_close(out, expected.double())
    for got, wanted in zip(grads, expected_grads, strict=True):
        # A gradient that sums over many positions is judged on its own scale.
        scale = wanted.abs().max().clamp_min(1e-6)
        assert_close(got / scale, (wanted / scale).double())
