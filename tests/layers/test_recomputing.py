import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from allmlp import ops
from allmlp.layers import AxialShift, ChannelMLP, PermuteMLP, TokenLinear, TokenMixingMLP, WeightedPermuteMLP
from allmlp.layers.recomputing import activated, mapped, mapped_halves, residual
from allmlp.ops import linear_onto
from allmlp.vision.gmlp import GMLPBlock
from allmlp.vision.s2mlpv2 import S2Attention

LAYERS = {"channels": (nn.Linear(6, 8), (2, 5, 6)), "tokens": (TokenLinear(5, 7), (2, 5, 6))}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that a GELU was written over."""
    found: list[Tensor] = []
    gelu_ = torch._C._nn.gelu_

    def recorded(x: Tensor, **options: str) -> Tensor:
        found.append(x)
        return gelu_(x, **options)

    monkeypatch.setattr(torch._C._nn, "gelu_", recorded)
    return found


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("kind", LAYERS)
def test_in_inference_the_activation_takes_over_the_memory(kind: str, approximate: str, written: list) -> None:
    linear, shape = LAYERS[kind]
    x, act = torch.randn(shape), nn.GELU(approximate)
    given = x.clone()
    with torch.no_grad():
        y = mapped(linear, x, act)
        assert torch.equal(y, act(linear(x)))
    assert len(written) == 1
    assert written[0] is y
    assert torch.equal(x, given)


class _Adapter(nn.Linear):
    """A layer that goes on reading what it has put out."""


def _hooked(linear: nn.Module, act: nn.Module) -> None:
    linear.register_forward_hook(lambda *_: None)


def _act_hooked(linear: nn.Module, act: nn.Module) -> None:
    act.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize("watch", [_hooked, _act_hooked])
def test_what_somebody_watches_is_left_alone(watch, written: list) -> None:
    linear, act, x = nn.Linear(6, 8), nn.GELU(), torch.randn(3, 6)
    watch(linear, act)
    with torch.no_grad():
        assert torch.equal(mapped(linear, x, act), act(linear(x)))
    assert not written


@pytest.mark.parametrize(
    ("linear", "act"),
    [(_Adapter(6, 8), nn.GELU()), (nn.Identity(), nn.GELU()), (nn.Linear(6, 8), nn.ReLU())],
    ids=["adapter", "identity", "another-activation"],
)
def test_other_layers_keep_their_output(linear: nn.Module, act: nn.Module, written: list) -> None:
    x = torch.randn(3, 6)
    given = x.clone()
    with torch.no_grad():
        assert torch.equal(mapped(linear, x, act), act(linear(x)))
    assert torch.equal(x, given)
    assert not written


def test_gradients_and_transforms_get_the_plain_form(written: list) -> None:
    linear, act, x = nn.Linear(6, 8), nn.GELU(), torch.randn(3, 6)
    mapped(linear, x, act).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(lambda row: mapped(linear, row, act))(x), act(linear(x)))
    assert not written


def with_bias(linear: nn.Linear, act: nn.Module) -> None:
    pass


def without_bias(linear: nn.Linear, act: nn.Module) -> None:
    linear.bias = None


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
@pytest.mark.parametrize("change", [with_bias, without_bias])
def test_halves_are_contiguous(change, act: nn.Module, grad: bool) -> None:
    linear, x = nn.Linear(6, 8), torch.randn(2, 5, 6)
    change(linear, act)
    with torch.set_grad_enabled(grad):
        u, v = mapped_halves(linear, x, act)
        torch.testing.assert_close(torch.cat((u, v), -1), act(linear(x)))
    assert u.is_contiguous()
    assert v.is_contiguous()
    if grad:
        (u.sum() + v.square().sum()).backward()
        got = [p.grad for p in linear.parameters()]
        linear.zero_grad()
        u, v = act(linear(x)).chunk(2, -1)
        (u.sum() + v.square().sum()).backward()
        for gradient, expected in zip(got, (p.grad for p in linear.parameters()), strict=True):
            torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("watch", [_hooked, _act_hooked])
def test_halves_of_what_somebody_watches(watch) -> None:
    linear, act, x = nn.Linear(6, 8), nn.GELU(), torch.randn(2, 5, 6)
    shapes: list[torch.Size] = []
    act.register_forward_hook(lambda module, given, out: shapes.append(out.shape))
    watch(linear, act)
    halves = mapped_halves(linear, x, act)
    assert torch.equal(torch.cat(halves, -1), act(linear(x)))
    assert shapes == [(2, 5, 8)] * 2


def test_halves_of_an_adapter() -> None:
    adapter, act, x = nn.Sequential(nn.Linear(6, 8)), nn.GELU(), torch.randn(2, 5, 6)
    assert torch.equal(torch.cat(mapped_halves(adapter, x, act), -1), act(adapter(x)))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
def test_activations_of_compiled_models(act: nn.Module, unchecked: None) -> None:
    x = torch.randn(3, 4)
    watched, seen = copy.deepcopy(act), []
    watched.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        expected = act(x)
        for layer in act, watched:
            torch.compiler.reset()
            out = torch.compile(partial(activated, layer), backend="eager")(x)
            torch.testing.assert_close(out, expected)
    assert len(seen) == 1


BRANCHES = {
    "channel_mlp": lambda: ChannelMLP(8, 16, drop=0.5),
    "permute_mlp": lambda: PermuteMLP(8, (3, 4), 2),
    "weighted_permute_mlp": lambda: WeightedPermuteMLP(8, (3, 4), 2),
    "axial_shift": lambda: AxialShift(8, 3, drop=0.5),
    "s2_attention": lambda: S2Attention(8),
}


class _Tripled(ChannelMLP):
    """A branch derived from one that adds, without the argument for it."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_add_what_they_are_given(name: str, dtype: torch.dtype, grad: bool) -> None:
    branch, drop_path = BRANCHES[name]().to(dtype).train(grad), DropPath(0.5).train(grad)
    x, given = torch.randn(2, 3, 4, 8, dtype=dtype), torch.randn(2, 3, 4, 8, dtype=dtype)
    before = x.clone()
    # In 16 bits the sum is rounded once and not twice.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for form, plain in (
        (lambda: residual(x, branch, given, drop_path), lambda: x + drop_path(branch(given))),
        (lambda: branch(given, x), lambda: x + branch(given)),
    ):
        outs = []
        for run in (form, plain):
            torch.manual_seed(3)
            with torch.set_grad_enabled(grad):
                outs.append(run())
        torch.testing.assert_close(*outs, **tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", [*BRANCHES, "gmlp"])
def test_in_inference_the_last_product_is_added_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []

    def recorded(onto: Tensor, *given: Tensor) -> Tensor:
        found.append(onto)
        return linear_onto(onto, *given)

    monkeypatch.setattr(ops, "linear_onto", recorded)
    x = torch.randn(2, 3, 4, 8)
    with torch.no_grad():
        if name == "gmlp":
            GMLPBlock(8, 12, 16).eval()(x)
        else:
            residual(x, BRANCHES[name]().eval(), x, DropPath(0.5).eval())
    (onto,) = found
    assert onto.data_ptr() == x.data_ptr()


class _Quantised(Tensor):
    """A weight that plain linear layers hold, as torchao's are: their product is all it knows to compute."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> "_Quantised":
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.numbers = (weight.detach() * 10).round().to(torch.int8)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.numbers.to(dtype) / 10

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return super().__torch_function__(function, types, args, kwargs)
        x, weight, *bias = args
        return F.linear(x, weight.dequantised(x.dtype), *bias)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, f"{function} of a quantised weight"
        return args[0]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", [*BRANCHES, "gmlp"])
def test_layers_with_a_quantised_weight_are_called(name: str, grad: bool) -> None:
    quantised = GMLPBlock(8, 12, 16) if name == "gmlp" else BRANCHES[name]()
    quantised.eval()
    plain, linears = copy.deepcopy(quantised), 0
    for layer, same in zip(quantised.modules(), plain.modules(), strict=True):
        if type(layer) is nn.Linear:
            weight = _Quantised(layer.weight)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            same.weight = nn.Parameter(weight.dequantised(torch.float32), requires_grad=False)
            linears += 1
    assert linears >= 2
    x = torch.randn(2, 3, 4, 8, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        outs = [branch(x) for branch in (quantised, plain)]
    torch.testing.assert_close(*outs)
    if grad:
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x) for out in outs))


@pytest.mark.parametrize("watched", ["branch", "drop_path", "last"])
def test_who_watches_a_branch_sees_what_it_gives(watched: str) -> None:
    branch, drop_path = ChannelMLP(8, 16).eval(), DropPath(0.5).eval()
    x, given = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    seen: list[Tensor] = []
    module = {"branch": branch, "drop_path": drop_path, "last": branch.drop2}[watched]
    module.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        out = residual(x, branch, given, drop_path)
    torch.testing.assert_close(seen[0], Mlp.forward(branch, given))
    torch.testing.assert_close(out, x + seen[0])


@pytest.mark.parametrize("branch", [_Tripled(8, 16), nn.Linear(8, 8)], ids=["derived", "another"])
def test_other_branches_are_added_to(branch: nn.Module) -> None:
    x, given = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with torch.no_grad():
        out = residual(x, branch.eval(), given, DropPath(0.5).eval())
        torch.testing.assert_close(out, x + branch(given))


@pytest.mark.parametrize("layer", [ChannelMLP(6, 6), TokenMixingMLP(6, 6)], ids=lambda layer: type(layer).__name__)
def test_gradients_that_are_differentiated_are_the_same_with_tied_weights(layer: nn.Module) -> None:
    """The hidden layer depends on the tied weight as well: that way is not counted twice."""
    layer = copy.deepcopy(layer).double()
    layer.fc2.weight = layer.fc1.weight
    x, parameters = torch.randn(2, 6, 6, dtype=torch.float64), list(layer.parameters())
    plain = torch.autograd.grad(layer(x).square().sum(), parameters)
    graph = torch.autograd.grad(layer(x).square().sum(), parameters, create_graph=True)
    torch.testing.assert_close(graph, plain)


class Shifted(nn.Module):
    """An activation with a parameter for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift).tanh()


def _mixers(act: Callable[[], nn.Module]) -> list[tuple[nn.Module, Tensor]]:
    axial = AxialShift(8)
    axial.act = act()
    return [
        (ChannelMLP(8, act_layer=act), torch.randn(2, 5, 8)),
        (TokenMixingMLP(5, 8, act_layer=act), torch.randn(2, 5, 8)),
        (axial, torch.randn(2, 4, 5, 8)),
    ]


@pytest.mark.parametrize("place", range(3), ids=["channels", "tokens", "axial"])
def test_activations_may_have_parameters(place: int) -> None:
    layer, x = _mixers(lambda: Shifted(8))[place]
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("place", range(2), ids=["channels", "tokens"])
def test_activations_may_be_in_place(place: int) -> None:
    layer, x = _mixers(lambda: nn.SiLU(inplace=True))[place]
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("place", range(3), ids=["channels", "tokens", "axial"])
def test_a_hook_sees_each_activation_once_as_autograd_does(place: int) -> None:
    layer, x = _mixers(nn.GELU)[place]
    seen: list[bool] = []
    layer.act.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    layer(x).sum().backward()
    assert seen == [True] * (3 if place == 2 else 1)


@pytest.mark.parametrize("act", [nn.GELU(), Shifted(8)], ids=["plain", "with parameters"])
def test_halves_of_an_activation_with_parameters(act: nn.Module) -> None:
    linear, x = nn.Linear(6, 8), torch.randn(2, 5, 6)
    torch.testing.assert_close(torch.cat(mapped_halves(linear, x, act), -1), act(linear(x)))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (ChannelMLP(8, 16, drop=0.5), torch.randn(2, 8)),
        (TokenMixingMLP(5, 16, drop=0.5), torch.randn(2, 5, 8)),
        (GMLPBlock(8, 4, 16, drop=0.5), torch.randn(2, 2, 2, 8)),
    ],
    ids=["channels", "tokens", "gmlp"],
)
def test_dropout_alone_in_training_mode_draws(layer: nn.Module, x: Tensor) -> None:
    """Monte Carlo dropout."""
    layer.eval()
    layer.drop1.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))


def test_one_row_without_a_batch() -> None:
    layer = ChannelMLP(8, 16).train()
    x = torch.randn(8)
    layer(x).square().sum().backward()
    got = layer.fc2.weight.grad
    layer.zero_grad()
    layer(x[None]).square().sum().backward()
    torch.testing.assert_close(got, layer.fc2.weight.grad)


def test_hooks_on_gradients_are_called() -> None:
    mlp, seen = ChannelMLP(4, 8), []
    mlp.fc2.register_full_backward_pre_hook(lambda module, grad: seen.append(module))
    mlp(torch.randn(2, 4)).sum().backward()
    assert seen == [mlp.fc2]


def test_hooks_of_all_modules_are_called() -> None:
    mlp, seen = ChannelMLP(4, 8).eval(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            mlp(torch.randn(2, 4))
    finally:
        handle.remove()
    assert {mlp.fc1, mlp.act, mlp.fc2} <= set(seen)


@pytest.mark.parametrize("kind", ["halves", "permute"])
def test_under_autocast_products_of_one_input_keep_one_copy(kind: str) -> None:
    linear, permute = nn.Linear(8, 16), PermuteMLP(8, (4, 4), 4)
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = mapped_halves(linear, x, nn.GELU()) if kind == "halves" else permute.mix(x)
    assert all(part.dtype == torch.bfloat16 for part in out)
    assert not any(tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for tensor in kept)
    copies = [tensor for tensor in kept if tensor.numel() == x.numel() and tensor.dtype == torch.bfloat16]
    values = x.detach().bfloat16().flatten().sort().values
    same = {
        tensor.untyped_storage().data_ptr() for tensor in copies if torch.equal(tensor.flatten().sort().values, values)
    }
    assert len(same) == 1
