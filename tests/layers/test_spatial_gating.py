import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allmlp.layers import SpatialGatingUnit, TinyAttention, spatial_gating
from allmlp.layers.spatial_gating import gated_feed_forward
from allmlp.ops import visible_tokens
from tests.compilers import need_to_know_the_compiler
from tests.layers.parity import assert_matches, normalise
from tests.tolerances import assert_close

TOKENS, CHANNELS, BLOCK = 6, 12, 5
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "heads": {"heads": 3},
    "no-split": {"split": False},
    "attention": {"attention_size": 4},
    "causal-attention-heads": {"causal": True, "attention_size": 4, "heads": 2},
    "toeplitz": {"toeplitz": True},
    "toeplitz-attention": {"toeplitz": True, "attention_size": 4},
    "toeplitz-causal-attention-heads": {"toeplitz": True, "causal": True, "attention_size": 4, "heads": 2},
}


def unit(tokens: int = TOKENS, **options) -> SpatialGatingUnit:
    channels = {"attention_channels": BLOCK} if options.get("attention_size") else {}
    return SpatialGatingUnit(CHANNELS, tokens, gate_act=torch.tanh, **channels, **options)


def randomised(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


def reference(layer: SpatialGatingUnit, mask: torch.Tensor | None = None):
    """The unit's equations, token by token. `mask[b, i, j]`: token i of row b reads token j."""

    def sees(b: int, i: int, j: int) -> bool:
        near = not layer.toeplitz or abs(i - j) < layer.tokens
        return near and (bool(mask[b, i, j]) if mask is not None else not (layer.causal and j > i))

    def attend(p, h, b, i):
        q, k, v = (p["attention.qkv.weight"] @ h[b].T).T.chunk(3, dim=-1)
        seen = [j for j in range(h.shape[1]) if sees(b, i, j)]
        if not seen:
            return p["attention.proj.bias"]
        shares = (k[seen] @ q[i] / q.shape[-1] ** 0.5).softmax(0)
        return p["attention.proj.weight"] @ (shares @ v[seen]) + p["attention.proj.bias"]

    def forward(p, x, h=None):
        u, v = x.chunk(2, dim=-1) if layer.split else (x, x)
        v = normalise(v, (-1,), 1e-5) * p["norm.weight"] + p["norm.bias"]
        heads, width = layer.weight.shape[0], v.shape[-1] // layer.weight.shape[0]
        rows = []
        for b, i in itertools.product(range(x.shape[0]), range(x.shape[1])):
            gate = p["bias"][:, 0 if layer.toeplitz else i].repeat_interleave(width)
            for j in range(x.shape[1]):
                if sees(b, i, j):
                    w = p["weight"][:, i - j + layer.tokens - 1] if layer.toeplitz else p["weight"][:, i, j]
                    gate = gate + w.repeat_interleave(width) * v[b, j]
            if h is not None:
                gate = gate + attend(p, h, b, i)
            rows.append(u[b, i] * torch.tanh(gate))
        assert heads * width == v.shape[-1]
        return torch.stack(rows).view(*x.shape[:2], -1)

    return forward


def inputs(layer: SpatialGatingUnit, tokens: int = TOKENS) -> list[torch.Tensor]:
    return [torch.randn(2, tokens, CHANNELS)] + ([torch.randn(2, tokens, BLOCK)] if layer.attention is not None else [])


@pytest.mark.parametrize("tokens", [TOKENS, 4, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_output_and_gradients_match_the_equations(options, tokens) -> None:
    layer = unit(**options)
    assert_matches(layer, reference(layer), *inputs(layer, tokens))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("toeplitz")])
def test_toeplitz_goes_on_beyond_the_trained_length(name) -> None:
    layer = unit(tokens=3, **OPTIONS[name])
    assert_matches(layer, reference(layer), *inputs(layer, 8))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_mask_says_who_reads_whom(options) -> None:
    layer = randomised(unit(**options)).double()
    x = [t.double() for t in inputs(layer)]
    one, per_row = torch.rand(TOKENS, TOKENS) < 0.6, torch.rand(2, TOKENS, TOKENS) < 0.6
    parameters = dict(layer.named_parameters())
    assert_close(layer(*x, mask=one), reference(layer, one.expand(2, -1, -1))(parameters, *x))
    assert_close(layer(*x, mask=per_row), reference(layer, per_row)(parameters, *x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_padding_is_read_by_nobody(options) -> None:
    layer = randomised(unit(**options)).double()
    x = [t.double() for t in inputs(layer)]
    padding = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()
    seen = visible_tokens(TOKENS, causal=layer.causal) & padding.unsqueeze(1)
    out = layer(*x, padding=padding)
    assert_close(out[padding], reference(layer, seen)(dict(layer.named_parameters()), *x)[padding])
    changed = [torch.where(padding.unsqueeze(-1), t, torch.randn_like(t)) for t in x]
    assert torch.equal(layer(*changed, padding=padding)[padding], out[padding])


@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if o.get("causal")], ids=lambda o: "-".join(o))
def test_causal_reads_nothing_later_to_the_bit(options) -> None:
    layer = randomised(unit(**options))
    x = inputs(layer)
    out = layer(*x)
    for t in range(1, TOKENS):
        changed = [torch.cat([part[:, :t], torch.randn_like(part[:, t:])], dim=1) for part in x]
        assert torch.equal(layer(*changed)[:, :t], out[:, :t])


def network(**options) -> tuple[nn.Linear, nn.Module, SpatialGatingUnit, nn.Linear]:
    """A block's feed-forward network, in training."""
    width = CHANNELS // 2 if options.get("split", True) else CHANNELS
    parts = nn.Linear(BLOCK, CHANNELS), nn.GELU(), unit(**options), nn.Linear(width, BLOCK)
    return tuple(randomised(part).double() for part in parts)  # type: ignore[return-value]


def called_in_turn(parts, x: torch.Tensor, **given) -> torch.Tensor:
    proj_in, act, sgu, proj_out = parts
    return proj_out(sgu(act(proj_in(x)), x, **given))


def assert_same_output_and_gradients(parts, x: torch.Tensor, **given) -> None:
    leaves = [x, *(p for part in parts for p in part.parameters())]
    results = []
    for out in (gated_feed_forward(*parts, x, **given), called_in_turn(parts, x, **given)):
        results.append([out, *torch.autograd.grad(out.square().sum(), [p for p in leaves if p.requires_grad])])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("given", ["whole", "padded", "masked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_feed_forward_is_its_layers_in_turn(options, given) -> None:
    parts, x = network(**options), torch.randn(2, TOKENS, BLOCK, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()
    mask = torch.rand(2, TOKENS, TOKENS) < 0.6
    extra = {"whole": {}, "padded": {"padding": padding}, "masked": {"mask": mask}}[given]
    assert_same_output_and_gradients(parts, x, **extra)
    with torch.no_grad():
        assert_close(gated_feed_forward(*parts, x, **extra), called_in_turn(parts, x, **extra))


@pytest.mark.parametrize("many", [2 * TOKENS, 2 * TOKENS + 1], ids=["halves", "whole"])
def test_feed_forward_without_gradients_is_of_two_products_from_many_tokens_on(many, monkeypatch) -> None:
    monkeypatch.setattr(spatial_gating, "_MANY_ROWS", many)
    parts, x = network(), torch.randn(2, TOKENS, BLOCK, dtype=torch.float64)
    shapes: list[torch.Size] = []
    monkeypatch.setattr(F, "linear", lambda *given, called=F.linear: shapes.append(given[1].shape) or called(*given))
    with torch.no_grad():
        y = gated_feed_forward(*parts, x)
        expansion = shapes[:-1]
        assert_close(y, called_in_turn(parts, x))
    assert expansion == (2 * [(CHANNELS // 2, BLOCK)] if many == 2 * TOKENS else [(CHANNELS, BLOCK)])


def test_feed_forward_of_a_plain_unit_and_the_papers_gate() -> None:
    parts, x = network(), torch.randn(2, TOKENS, BLOCK, dtype=torch.float64)
    parts[2].gate_act = None
    assert_same_output_and_gradients(parts, x)
    parts[0].bias = None
    assert_same_output_and_gradients(parts, x)
    for parameter in (*parts[0].parameters(), *parts[2].parameters()):
        parameter.requires_grad_(False)
    assert_same_output_and_gradients(parts, x.requires_grad_())


class _Adapter(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class _Gate(SpatialGatingUnit):
    def forward(self, x: torch.Tensor, *given, **options) -> torch.Tensor:
        return super().forward(x, *given, **options) + 1


@pytest.mark.parametrize("place", [0, 3], ids=["in", "out"])
def test_feed_forward_calls_an_adapter(place: int) -> None:
    parts = list(network())
    parts[place] = _Adapter(parts[place].in_features, parts[place].out_features).double()
    assert_same_output_and_gradients(parts, torch.randn(2, TOKENS, BLOCK, dtype=torch.float64))


def test_feed_forward_calls_a_unit_of_another_kind() -> None:
    parts = list(network())
    parts[2] = _Gate(CHANNELS, TOKENS).double()
    assert_same_output_and_gradients(parts, torch.randn(2, TOKENS, BLOCK, dtype=torch.float64))


@pytest.mark.parametrize("place", range(4), ids=["in", "activation", "unit", "out"])
def test_feed_forward_calls_what_a_hook_watches(place: int) -> None:
    parts, x = network(), torch.randn(2, TOKENS, BLOCK, dtype=torch.float64)
    shapes: list[torch.Size] = []
    parts[place].register_forward_hook(lambda module, given, out: shapes.append(out.shape))
    gated_feed_forward(*parts, x)
    assert shapes == [(2, TOKENS, [CHANNELS, CHANNELS, CHANNELS // 2, BLOCK][place])]


def test_feed_forward_keeps_both_halves_and_the_gate() -> None:
    parts, x = network(), torch.randn(2, TOKENS, BLOCK, dtype=torch.float64)
    parts[2].gate_act = None
    own = {p.untyped_storage().data_ptr() for part in parts for p in part.parameters()}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        gated_feed_forward(*parts, x)
    shapes = [tuple(t.shape) for t in kept.values() if t.untyped_storage().data_ptr() not in {*own, x.data_ptr()}]
    assert shapes == 5 * [(2, TOKENS, CHANNELS // 2)]


def test_feed_forward_compiled_for_inference(unchecked: None) -> None:
    need_to_know_the_compiler()
    parts, x = tuple(part.float() for part in network()), torch.randn(2, TOKENS, BLOCK)
    products: list[tuple[int, ...]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        for node in graph.graph.nodes:
            if node.target is torch.nn.functional.linear:
                products.append(tuple(node.meta["example_value"].shape))
        return graph.forward

    with torch.no_grad():
        out = torch.compile(gated_feed_forward, backend=look, fullgraph=True)(*parts, x)
        assert_close(out, gated_feed_forward(*parts, x).double())
    assert products[:2] == 2 * [(2, TOKENS, CHANNELS // 2)]


def test_a_new_unit_passes_its_input_on() -> None:
    layer = SpatialGatingUnit(CHANNELS, TOKENS, heads=2)
    x = torch.randn(2, TOKENS, CHANNELS)
    assert layer.weight.abs().max() <= 1e-3 / TOKENS
    torch.testing.assert_close(layer(x), x[..., : CHANNELS // 2], rtol=1e-2, atol=0)


def test_tiny_attention_masks_take_the_place_of_causality() -> None:
    attention = randomised(TinyAttention(BLOCK, 7, 4, causal=True))
    x = torch.randn(2, TOKENS, BLOCK)
    everything = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    assert_close(attention(x, everything.tril()), attention(x).double())
    attention.causal = False
    assert_close(attention(x, everything), attention(x).double())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((7, 4), {}, "channels must be even to be split in halves, got 7"),
        ((12, 0), {}, "channels, tokens and heads must be positive, got 12, 0 and 1"),
        ((12, 4), {"heads": 0}, "channels, tokens and heads must be positive, got 12, 4 and 0"),
        ((12, 4), {"heads": 4}, "heads must divide the gate's 6 channels, got 4"),
        ((12, 4), {"attention_size": 4}, "attention_channels .* is needed with attention_size"),
    ],
)
def test_bad_sizes_are_refused(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SpatialGatingUnit(*arguments, **options)


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="the input has 7 tokens, the spatial gating unit takes at most 6"):
        unit()(torch.randn(1, 7, CHANNELS))
    with pytest.raises(ValueError, match="needs block_input"):
        unit(attention_size=4)(torch.randn(1, TOKENS, CHANNELS))


def test_what_a_hook_keeps_of_the_gates_activation_stays() -> None:
    unit, kept = SpatialGatingUnit(16, 4, gate_act=nn.Tanh()), []
    unit.gate_act.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    with torch.no_grad():
        unit(torch.randn(2, 4, 16))
    assert torch.equal(*kept[0])


@pytest.mark.parametrize("grad", [False, True])
def test_attention_with_a_weight_for_each_of_a_vmap(grad: bool) -> None:
    unit = SpatialGatingUnit(16, 4, attention_size=4, attention_channels=8)
    x, block_input = torch.randn(2, 4, 16), torch.randn(2, 4, 8)
    weights = torch.randn(3, 8, 4)

    def of(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(unit, {"attention.proj.weight": weight}, (x, block_input))

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.func.vmap(of)(weights), torch.stack([of(weight) for weight in weights]))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"attention_size": 4, "attention_channels": 6}])
def test_a_norm_that_is_watched_is_called(options: dict, grad: bool) -> None:
    unit, seen = SpatialGatingUnit(8, 5, **options), []
    unit.norm.register_forward_hook(lambda *_: seen.append(1))
    with torch.set_grad_enabled(grad):
        unit(torch.randn(2, 5, 8), torch.randn(2, 5, 6) if options else None)
    assert seen == [1]
