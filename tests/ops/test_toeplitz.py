import pytest
import torch
from torch.autograd import gradcheck

from allmlp.ops import toeplitz_matrix, toeplitz_product, toeplitz_product_reference
from allmlp.ops.toeplitz import FFT_TOKENS
from tests.tolerances import assert_close

SIZES = pytest.mark.parametrize(("trained", "tokens"), [(5, 5), (5, 3), (5, 12), (1, 4), (4, 1), (7, 8)])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def inputs(trained: int, tokens: int, heads: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    lags, v = torch.randn(heads, 2 * trained - 1), torch.randn(3, tokens, 6)
    return [lags.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()]


@CAUSAL
@SIZES
def test_matrix_has_the_lags_on_its_diagonals(trained, tokens, causal) -> None:
    lags = torch.randn(2, 2 * trained - 1)
    weight = toeplitz_matrix(lags, tokens, causal=causal)
    for i in range(tokens):
        for j in range(tokens):
            read = abs(i - j) < trained and not (causal and j > i)
            expected = lags[:, i - j + trained - 1] if read else torch.zeros(2)
            assert torch.equal(weight[:, i, j], expected)


@CAUSAL
@SIZES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("backend", ["dense", "fft"])
def test_output_and_gradients_follow_the_reference(backend, heads, trained, tokens, causal) -> None:
    lags, v = inputs(trained, tokens, heads)
    bias = torch.randn(heads, 1, dtype=torch.float64, requires_grad=True)
    expected = toeplitz_product_reference(lags, v, causal=causal)
    assert_close(toeplitz_product(lags, v, causal=causal, backend=backend), expected)
    out = toeplitz_product(lags, v, bias, causal=causal, backend=backend)
    expected = expected + bias.repeat_interleave(v.shape[-1] // heads)
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(out, [lags, v, bias], upstream)
    for grad, reference in zip(grads, torch.autograd.grad(expected, [lags, v, bias], upstream), strict=True):
        assert_close(grad, reference)


@CAUSAL
@pytest.mark.parametrize("backend", ["dense", "fft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype, backend, causal) -> None:
    lags, v = (x.detach() / 4 for x in inputs(9, 9, dtype=dtype))
    out = toeplitz_product(lags, v, causal=causal, backend=backend)
    assert out.dtype == dtype
    assert_close(out, toeplitz_product_reference(lags.double(), v.double(), causal=causal))


@pytest.mark.parametrize("backend", ["dense", "fft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_lags_gradient_is_summed_in_more_than_16_bits(dtype, backend) -> None:
    """Numbers of one sign would stop growing where the next one is below the sum's last bit."""
    lags, v = (x.to(dtype).requires_grad_() for x in (torch.randn(1, 511) / 16, torch.rand(1, 512, 2)))
    exact = lags.detach().double().requires_grad_()
    upstream = torch.rand(1, 512, 2).to(dtype) / 16
    (grad,) = torch.autograd.grad(toeplitz_product(lags, v, backend=backend), lags, upstream)
    dense = toeplitz_product(exact, v.double(), backend="dense")
    (expected,) = torch.autograd.grad(dense, exact, upstream.double())
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_automatic_choice_agrees_on_both_sides_of_the_crossover() -> None:
    for tokens in (FFT_TOKENS - 1, FFT_TOKENS):
        lags, v = torch.randn(1, 2 * tokens - 1) / tokens**0.5, torch.randn(1, tokens, 2)
        chosen = toeplitz_product(lags, v, causal=True)
        backend = "dense" if tokens < FFT_TOKENS else "fft"
        assert torch.equal(chosen, toeplitz_product(lags, v, causal=True, backend=backend))
        assert_close(chosen, toeplitz_product(lags.double(), v.double(), causal=True, backend="dense"))


def test_a_batch_of_none_is_taken_at_every_length() -> None:
    for tokens in (3, FFT_TOKENS):
        lags, v = torch.randn(2, 9, requires_grad=True), torch.randn(0, tokens, 4)
        out = toeplitz_product(lags, v)
        assert out.shape == v.shape
        out.sum().backward()
        assert torch.equal(lags.grad, torch.zeros(2, 9))


@pytest.mark.parametrize("backend", ["dense", "fft"])
def test_derivatives(backend) -> None:
    arguments = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True), inputs(3, 4)[1]]
    assert gradcheck(lambda *a: toeplitz_product(*a, causal=True, backend=backend), arguments)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'auto', 'dense' or 'fft', got 'cuda'"):
        toeplitz_product(*inputs(3, 3), backend="cuda")


def test_placeholders_have_the_shape_of_the_product() -> None:
    lags, v = torch.randn(2, 7, device="meta"), torch.randn(3, FFT_TOKENS, 6, device="meta")
    assert toeplitz_product(lags, v, backend="fft").shape == v.shape
