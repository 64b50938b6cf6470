"""Attention within a reach, in blocks, against one mask over all pairs of tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allmlp.ops import attention, attention_reference, visible_tokens
from tests.tolerances import assert_close

# At most twice the reach, and more, in whole blocks and not.
SIZES = [(None, 5), (7, 5), (4, 7), (4, 8), (4, 9), (3, 12), (5, 23), (1, 4)]
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(3, tokens, 6).to(dtype).requires_grad_() for _ in range(3)]


def padded(tokens: int) -> torch.Tensor:
    """Padding behind, in front and in between, and a row of nothing else."""
    padding = torch.rand(3, tokens) < 0.7
    padding[0, tokens // 2 :] = False
    padding[1] = False
    return padding


@CAUSAL
@pytest.mark.parametrize("hidden", ["nothing", "padding", "mask", "mask of each", "mask and padding"])
@pytest.mark.parametrize(("reach", "tokens"), SIZES)
def test_output_and_gradients_follow_the_reference(reach, tokens, hidden, causal) -> None:
    q, k, v = inputs(tokens)
    mask = padding = None
    if "mask" in hidden:
        mask = torch.rand(*([3] if "each" in hidden else []), tokens, tokens) < 0.6
    if "padding" in hidden:
        padding = padded(tokens)
    out, expected = (
        form(q, k, v, mask, padding, causal=causal, reach=reach) for form in (attention, attention_reference)
    )
    assert_close(out, expected)
    upstream = torch.randn_like(out)
    for grad, reference in zip(
        torch.autograd.grad(out, [q, k, v], upstream), torch.autograd.grad(expected, [q, k, v], upstream), strict=True
    ):
        assert_close(grad, reference)


def test_one_row_of_the_band() -> None:
    assert visible_tokens(4, causal=True, reach=2)[2].tolist() == [False, True, True, False]
    assert visible_tokens(4, causal=False, reach=2)[1].tolist() == [True, True, True, False]


@pytest.mark.parametrize(("reach", "tokens"), [(4, 8), (4, 9)])
def test_causal_sees_nothing_later_to_the_bit(reach, tokens) -> None:
    given = [x.detach() for x in inputs(tokens, torch.float32)]
    out = attention(*given, causal=True, reach=reach)
    for t in range(1, tokens):
        changed = [torch.cat([x[:, :t], torch.randn_like(x[:, t:])], dim=1) for x in given]
        assert torch.equal(attention(*changed, causal=True, reach=reach)[:, :t], out[:, :t])


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype, causal) -> None:
    given = [x.detach() for x in inputs(23, dtype)]
    out = attention(*given, causal=causal, reach=5)
    assert out.dtype == dtype
    assert_close(out, attention_reference(*(x.double() for x in given), causal=causal, reach=5))


class _Largest(TorchDispatchMode):
    """The numbers in the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return made


@CAUSAL
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_memory_grows_with_the_reach_and_not_with_the_square(padding, causal) -> None:
    reach, tokens = 8, 803
    given = inputs(tokens)
    with _Largest() as largest:
        out = attention(*given, None, padded(tokens) if padding else None, causal=causal, reach=reach)
        out.sum().backward()
    assert largest.numbers < len(out) * (tokens + reach) * 4 * reach
    with _Largest() as largest:
        attention_reference(*given, causal=causal, reach=reach)
    assert largest.numbers >= tokens * tokens


@pytest.mark.usefixtures("unchecked")
@CAUSAL
def test_compiled_for_any_length(causal) -> None:
    compiled = torch.compile(
        lambda q, k, v, padding: attention(q, k, v, None, padding, causal=causal, reach=4), backend="aot_eager",
        dynamic=True, fullgraph=True,
    )  # fmt: skip
    with torch.no_grad():
        for tokens in (17, 21):
            given, padding = inputs(tokens), padded(tokens)
            expected = attention_reference(*given, None, padding, causal=causal, reach=4)
            assert_close(compiled(*given, padding), expected)
