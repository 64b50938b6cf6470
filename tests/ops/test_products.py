"""Products of 16-bit factors, as a processor without instructions for them computes them."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from allmlp.language import GMLPConfig, GMLPForCausalLM
from allmlp.ops import linear, products, spatial_gating, toeplitz_product, token_linear
from allmlp.ops.linear import linear_input_gradient, linear_weight_gradient
from allmlp.ops.products import multiplies_in_float32, multiply
from tests.compilers import need_to_know_the_compiler
from tests.tolerances import assert_close
from tests.vision.nano import NANO, shallow_model

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies no 16-bit numbers, whatever this one does."""
    monkeypatch.setattr(products, "WITHOUT_INSTRUCTIONS", list(DTYPES))
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["allmlp.ops.linear"], "_MULTIPLIES_BFLOAT16", False)


class SixteenBitProducts(TorchDispatchMode):
    """Lists the products of 16-bit factors with more than a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        factors = [x for x in args if isinstance(x, Tensor) and x.dim() > 1]
        is_product = func.overloadpacket in PRODUCTS and any(x.dtype in DTYPES for x in factors)
        # A few rows are those of a head, one for each sample.
        if is_product and (factors[0].dim() == 4 or min(min(x.shape[-2:]) for x in factors) > 4):
            self.found.append(f"{func}({', '.join(str(list(x.shape)) for x in factors)})")
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_computed_in_float32_and_rounded_once(dtype, without_instructions) -> None:
    x, weight = torch.randn(3, 7, 40).to(dtype), torch.randn(5, 40).to(dtype)
    exact = F.linear(x.double(), weight.double()).to(dtype)
    found = multiply(F.linear, x, weight, None)
    assert found.dtype == dtype
    # The sums of both differ by roundings of float32.
    torch.testing.assert_close(found, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_what_has_instructions_or_no_one_dtype_is_torchs(without_instructions) -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    assert not multiplies_in_float32(x, weight)
    assert not multiplies_in_float32(x.double(), weight.double())
    assert not multiplies_in_float32(x.bfloat16().to("meta"), None)
    assert not multiplies_in_float32(torch.fx.Proxy(torch.fx.Graph().placeholder("x")), weight.bfloat16())
    assert multiplies_in_float32(x.bfloat16(), None, weight.bfloat16())
    with pytest.raises(RuntimeError, match="dtype"):
        multiply(torch.mm, x.bfloat16(), weight.t())


def test_where_the_processor_has_them_nothing_changes(monkeypatch) -> None:
    monkeypatch.setattr(products, "WITHOUT_INSTRUCTIONS", [])
    assert not multiplies_in_float32(torch.zeros(2, 2, dtype=torch.bfloat16))


def test_autocast_decides_the_dtype(without_instructions) -> None:
    x, weight = torch.randn(6, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert multiplies_in_float32(x, weight)
        assert not multiplies_in_float32(x.double(), weight)
        found = multiply(F.linear, x, weight)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, F.linear(x.bfloat16().float(), weight.bfloat16().float()).bfloat16())


def test_exporters_and_traces_get_torchs_products(without_instructions, unchecked) -> None:
    class Map(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return linear(x, weight)

    x, weight = torch.randn(9, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    assert "float32" not in str(torch.export.export(Map(), (x, weight)).graph)
    need_to_know_the_compiler()
    graphs: list[str] = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(Map(), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, weight), Map()(x, weight))
    assert "float()" in graphs[0]


@pytest.mark.parametrize("rows", [1, 4, 5, 30])
def test_linear_maps_and_their_gradients(rows, without_instructions) -> None:
    factors = [torch.randn(shape).bfloat16() for shape in ((rows, 8), (6, 8), (6,))]
    leaves = [x.clone().requires_grad_() for x in factors]
    exact = [x.double().requires_grad_() for x in factors]
    out, expected = linear(*leaves), F.linear(*exact)
    assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert_close(grad, expected_grad)
    assert torch.autograd.grad(grads[1].square().sum(), leaves[0])[0].abs().sum() > 0


def test_backward_keeps_sixteen_bits(without_instructions) -> None:
    kept = []
    x, weight = torch.randn(50, 8).bfloat16(), torch.randn(6, 8).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        linear(x, weight)
    assert kept == [torch.bfloat16, torch.bfloat16]


def test_operators_take_no_sixteen_bit_product(without_instructions) -> None:
    x, grad = torch.randn(4, 32, 24).bfloat16(), torch.randn(4, 32, 40).bfloat16()
    weight, bias = torch.randn(1, 32, 32).bfloat16(), torch.ones(1, 32).bfloat16()
    heads, head_bias = torch.randn(2, 32, 32).bfloat16(), torch.ones(2, 32).bfloat16()
    with SixteenBitProducts() as seen:
        token_linear(x, weight[0], bias[0])
        spatial_gating(x, x, weight, bias)
        spatial_gating(x, x, heads, head_bias)
        spatial_gating(x, x, weight.expand(4, 1, 32, 32), bias.expand(4, 1, 32))
        toeplitz_product(torch.randn(1, 63).bfloat16(), x, causal=True, backend="dense")
        toeplitz_product(torch.randn(2, 63).bfloat16(), x, causal=True, backend="dense")
        linear_weight_gradient(grad, x)
        linear_input_gradient(grad, torch.randn(40, 24).bfloat16())
    assert not seen.found


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_networks_take_no_sixteen_bit_product(name, training, without_instructions) -> None:
    model, images = shallow_model(name, drop_path_rate=0.0), torch.randn(4, 3, 32, 32)
    expected = copy.deepcopy(model).double()(images.double())
    with SixteenBitProducts() as seen:
        if training:
            with torch.autocast("cpu", torch.bfloat16):
                out = model.train()(images)
            out.float().square().sum().backward()
        else:
            with torch.no_grad():
                out = model.eval().bfloat16()(images.bfloat16())
    assert not seen.found
    assert ((out - expected).abs().max() / expected.abs().max()).item() < 0.05


@pytest.mark.parametrize("attention", [0, 4])
def test_language_models_take_no_sixteen_bit_product(attention, without_instructions) -> None:
    torch.manual_seed(0)
    config = GMLPConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=40,
        num_spatial_heads=2, tiny_attention_size=attention,
    )  # fmt: skip
    model, ids = GMLPForCausalLM(config).bfloat16(), torch.randint(0, 64, (4, 40))
    with SixteenBitProducts() as seen:
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.eval()(ids)
    assert not seen.found
