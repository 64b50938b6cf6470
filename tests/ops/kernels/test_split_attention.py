from functools import partial

import pytest
import torch
from torch import Tensor

from allmlp.ops import pool_branches, pool_branches_reference, split_attention, split_attention_reference
from allmlp.ops.kernels import split_attention as kernels
from tests.ops.kernels.parity import DEVICE, DTYPES, assert_matches

SIZES = [(1, 1, 1, 1), (2, 5, 7, 19), (3, 1, 40, 33)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few positions take several of them."""
    monkeypatch.setattr(kernels, "choose_blocks", lambda channels: (16, 16))


def inputs(batch: int, height: int, width: int, channels: int) -> list[Tensor]:
    maps = [torch.randn(batch, height, width, channels) for _ in range(3)]
    return [*maps, torch.randn(batch, 3, channels)]


def pool(*branches: Tensor, backend: str = "triton") -> Tensor:
    return pool_branches(branches, backend=backend)


def weigh(*inputs: Tensor, backend: str = "triton") -> Tensor:
    return split_attention(inputs[:3], inputs[3], backend=backend)


def weigh_reference(*inputs: Tensor) -> Tensor:
    return split_attention_reference(inputs[:3], inputs[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients_follow_the_float64_reference(sizes, dtype) -> None:
    assert_matches(weigh, weigh_reference, inputs(*sizes), dtype)
    assert_matches(pool, lambda *branches: pool_branches_reference(branches), inputs(*sizes)[:3], dtype)


def test_views_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirds of one tensor's channels, a permuted map, and logits with the branches of a channel together."""

    def views(function, expanded: Tensor, permuted: Tensor, logits: Tensor) -> Tensor:
        x1, x2, _ = expanded.chunk(3, dim=-1)
        return function(x1, x2, permuted.transpose(1, 2), logits.transpose(1, 2))

    drawn = [torch.randn(2, 5, 6, 57), torch.randn(2, 6, 5, 19), torch.randn(2, 19, 3)]
    copied = Tensor.contiguous
    monkeypatch.setattr(
        Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("a copy") if x.dim() == 4 else copied(x)
    )
    assert_matches(partial(views, weigh), partial(views, weigh_reference), drawn, torch.float32)


def test_any_layout_is_read() -> None:
    def channels_apart(function, x: Tensor, logits: Tensor) -> Tensor:
        return function(*(x.permute(0, 2, 3, 1),) * 3, logits)

    drawn = [torch.randn(2, 19, 5, 6), torch.randn(2, 3, 19)]
    assert_matches(partial(channels_apart, weigh), partial(channels_apart, weigh_reference), drawn, torch.float32)


def test_large_logits_do_not_overflow() -> None:
    *maps, logits = inputs(2, 3, 5, 7)
    assert_matches(weigh, weigh_reference, [*maps, logits * 200], torch.float32)


def test_other_numbers_of_branches_have_no_kernel() -> None:
    *maps, logits = inputs(1, 2, 2, 3)
    with pytest.raises(ValueError, match="it has 2 branches, the kernels take three"):
        pool_branches(maps[:2], backend="triton")
    with pytest.raises(ValueError, match="it has 2 branches, the kernels take three"):
        split_attention(maps[:2], logits[:, :2], backend="triton")


# torch's own check looks at the gradient of a tensor that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_custom_operators() -> None:
    drawn = [x.to(DEVICE).requires_grad_() for x in inputs(2, 3, 5, 7)]
    torch.library.opcheck(kernels.pool_branches, tuple(drawn[:3]))
    torch.library.opcheck(kernels.weigh_branches, tuple(drawn))


def test_compiled_without_a_break(unchecked) -> None:
    drawn = [x.to(DEVICE).requires_grad_() for x in inputs(2, 3, 5, 7)]

    def merge(x1: Tensor, x2: Tensor, x3: Tensor, logits: Tensor) -> Tensor:
        return weigh(x1, x2, x3, logits + pool(x1, x2, x3)[:, None])

    out, expected = torch.compile(merge, fullgraph=True, backend="aot_eager")(*drawn), merge(*drawn)
    torch.testing.assert_close(out, expected)
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), drawn) for y in (out, expected))
    torch.testing.assert_close(grads, expected_grads)
