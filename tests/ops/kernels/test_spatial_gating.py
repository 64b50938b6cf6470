from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from allmlp.layers import SpatialGatingUnit
from allmlp.layers.spatial_gating import gated_feed_forward
from allmlp.ops import backends, normalized_spatial_gating, normalized_spatial_gating_reference
from allmlp.ops.kernels import spatial_gating as kernels
from allmlp.ops.kernels.spatial_gating import Blocks
from tests.ops.kernels.parity import DEVICE, DTYPES, assert_matches
from tests.tolerances import assert_close

EPS = 1e-5
fused = partial(normalized_spatial_gating, backend="triton")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few tokens take several of them."""
    monkeypatch.setattr(kernels, "choose_blocks", lambda rows, columns, dtype: Blocks(16, 16, 16, warps=1))
    monkeypatch.setattr(kernels, "choose_weight_blocks", lambda dtype: Blocks(16, 16, 16, warps=1))


def inputs(
    batch: int, written: int, read: int, channels: int, heads: int, *, shared_bias: bool = False
) -> list[Tensor]:
    shapes = [(batch, written, channels), (batch, read, channels), (channels,), (channels,), (heads, written, read)]
    drawn = [torch.randn(shape) for shape in (*shapes, (heads, 1 if shared_bias else written))]
    drawn[4] /= read**0.5
    return drawn


def as_function(operator: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
    return lambda u, v, norm_weight, norm_bias, weight, bias: operator(
        u, v, norm_weight, norm_bias, EPS, weight, bias, **options
    )


def check(drawn: list[Tensor], dtype: torch.dtype, **options) -> None:
    assert_matches(
        as_function(fused, **options), as_function(normalized_spatial_gating_reference, **options), drawn, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_output_and_gradients_follow_the_float64_reference(causal, dtype, small_tiles) -> None:
    check(inputs(2, 37, 37, 42, 2), dtype, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 1, 1, 1, 1), {}),
        ((3, 5, 5, 6, 3), {"shared_bias": True}),
        ((1, 33, 33, 17, 1), {}),
        ((2, 19, 35, 16, 1), {}),
        ((2, 35, 19, 16, 1), {}),
    ],
    ids=["one", "shared-bias", "odd", "reads-more", "writes-more"],
)
def test_sizes(sizes, options, causal, small_tiles) -> None:
    check(inputs(*sizes, **options), torch.float32, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_a_real_machine(dtype) -> None:
    check(inputs(2, 40, 40, 70, 1), dtype, causal=True)


def test_halves_of_one_tensor_are_read_where_they_lie(small_tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, *parameters = inputs(2, 20, 20, 10, 2)
    monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("a copy") if x.dim() == 3 else x)

    def of_halves(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *parameters: as_function(operator)(*x.chunk(2, dim=-1), *parameters)

    x = torch.randn(2, 20, 20)
    assert_matches(of_halves(fused), of_halves(normalized_spatial_gating_reference), [x, *parameters], torch.float32)


def test_any_layout_is_read(small_tiles) -> None:
    u, v, norm_weight, norm_bias, *_ = inputs(2, 20, 20, 10, 2)
    longer = torch.randn(2, 30, 31)
    layouts = [u.transpose(1, 2).contiguous().transpose(1, 2), v[:1].expand(2, -1, -1), norm_weight, norm_bias]
    layouts += [longer[:, :20, :20], torch.randn(2, 30)[:, :20]]
    expected = as_function(normalized_spatial_gating_reference)(*(x.double() for x in layouts))
    leaves = [x.to(DEVICE).requires_grad_() for x in layouts]
    out = as_function(fused)(*leaves)
    assert_close(out, expected)
    # The gradient of a sum is one number for all of its terms.
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


def test_later_tokens_and_tiles_are_not_read(small_tiles) -> None:
    u, v, *parameters = (x.to(DEVICE) for x in inputs(1, 40, 40, 16, 1))
    gate = as_function(fused, causal=True)
    out = gate(u, v, *parameters)
    changed = torch.cat([v[:, :21], torch.randn_like(v[:, 21:])], dim=1)
    assert torch.equal(gate(u, changed, *parameters)[:, :21], out[:, :21])
    poisoned = torch.cat([v[:, :32], torch.full_like(v[:, 32:], torch.nan)], dim=1)
    assert torch.equal(gate(u, poisoned, *parameters)[:, :32], out[:, :32])


def test_the_weights_upper_triangle_is_neither_read_nor_given_a_gradient(small_tiles) -> None:
    u, v, norm_weight, norm_bias, weight, bias = (x.to(DEVICE).requires_grad_() for x in inputs(2, 37, 37, 8, 1))
    above = torch.ones_like(weight, dtype=torch.bool).triu(1)
    poisoned = torch.where(above, torch.nan, weight).detach().requires_grad_()
    out, expected = (as_function(fused, causal=True)(u, v, norm_weight, norm_bias, w, bias) for w in (poisoned, weight))
    assert torch.equal(out, expected)
    grad_v, grad = torch.autograd.grad(out.square().sum(), (v, poisoned))
    assert (grad[above] == 0).all()
    assert grad.isfinite().all()
    assert grad_v.isfinite().all()


def test_a_feed_forward_network_takes_it_where_it_is_on(small_tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    sgu = SpatialGatingUnit(12, 5).to(DEVICE)
    proj_in, proj_out = (nn.Linear(*size, device=DEVICE) for size in [(8, 12), (6, 8)])
    network = partial(gated_feed_forward, proj_in, nn.Tanh(), sgu, proj_out, torch.randn(2, 5, 8, device=DEVICE))
    expected = network()
    taken: list[Tensor] = []
    product = kernels.gated_product
    monkeypatch.setattr(kernels, "gated_product", lambda *given: taken.append(product(*given)) or taken[-1])
    monkeypatch.setattr(backends, "_fused", True)
    assert_close(network(), expected.double())
    assert len(taken) == 1
    assert taken[0].requires_grad


def test_only_the_gradients_asked_for_are_computed(small_tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    u, v, norm_weight, norm_bias, weight, bias = (x.to(DEVICE) for x in inputs(1, 5, 5, 6, 1))
    for name in ("_backward_read", "_backward_weight"):
        monkeypatch.setattr(kernels, name, lambda *args: pytest.fail("frozen"))
    u.requires_grad_()
    as_function(fused)(u, v, norm_weight, norm_bias, weight, bias).sum().backward()
    assert u.grad is not None


# torch's own check looks at the gradient of a tensor that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_custom_operators(small_tiles) -> None:
    u, v, norm_weight, norm_bias, weight, bias = (x.to(DEVICE) for x in inputs(2, 5, 5, 6, 2))
    mean, rstd = kernels.token_statistics(v, EPS)
    leaves = [x.requires_grad_() for x in (u, v)]
    parameters = [x.requires_grad_() for x in (norm_weight, norm_bias, weight, bias)]
    torch.library.opcheck(kernels.token_statistics, (v.detach(), EPS))
    torch.library.opcheck(kernels.gated_product, (*leaves, mean, rstd, *parameters, True), atol=1e-4, rtol=1e-4)


def test_without_autocast_the_dtypes_must_agree() -> None:
    u, v, *parameters = (x.to(DEVICE) for x in inputs(1, 4, 4, 6, 1))
    with pytest.raises(ValueError, match=r"cannot run normalized_spatial_gating: .* autocast is off"):
        as_function(fused)(u.bfloat16(), v.bfloat16(), *parameters)


def test_under_autocast(small_tiles) -> None:
    drawn = [x.to(DEVICE).requires_grad_() for x in inputs(2, 5, 5, 6, 1)]
    expected = as_function(normalized_spatial_gating_reference)(*(x.detach().double() for x in drawn))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = as_function(fused)(*drawn)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected)
    for x, grad in zip(drawn, torch.autograd.grad(out.sum(), drawn), strict=True):
        assert grad.dtype == x.dtype == torch.float32


def test_compiled_without_a_break(small_tiles, unchecked) -> None:
    drawn = [x.to(DEVICE).requires_grad_() for x in inputs(2, 5, 5, 6, 2)]
    gate = as_function(fused, causal=True)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*drawn), gate(*drawn)
    assert_close(out, expected.double())
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), drawn) for y in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad.double())
