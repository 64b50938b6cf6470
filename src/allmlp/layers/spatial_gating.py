"""The spatial gating unit of gMLP and aMLP (arXiv 2105.08050), for whole sequences and for the next tokens of one."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from allmlp.layers.recomputing import is_watched, linear_after, mapped, mapped_halves, mapped_onto
from allmlp.layers.resampling import GridBound
from allmlp.ops import attention, normalized_spatial_gating, toeplitz_matrix, toeplitz_product
from allmlp.ops.backends import takes_fused
from allmlp.ops.execution import is_compiled_inference, is_plain_inference, is_plain_training
from allmlp.ops.resampling import Grid, resample_read, resample_written
from allmlp.ops.spatial_gating import apply_gate, finished_gate, normalized_projection, spatial_projection


class Past(Protocol):
    """What earlier tokens left in one layer, and where the new tokens stand: all that incremental decoding needs.

    `start` tokens lie behind the new ones; 0 means that the new tokens are the whole sequence so far. The new token `i`
    of row `b` is at position `positions[b, i]`, or at `start + i` where `positions` is None. `visible[…, i, j]` says
    whether it reads the token at position `first + j`; None: it reads all of them.
    """

    start: int
    first: int
    positions: Int[Tensor, "batch new"] | None
    visible: Bool[Tensor, "*rows new read"] | None

    def append(self, name: str, x: Float[Tensor, "batch new channels"]) -> Float[Tensor, "batch read channels"]:
        """Keep the new tokens' `x` under `name`; returns that of all tokens from position `first` on."""
        ...


class TinyAttention(nn.Module):
    """aMLP's single-head attention on a block's normalised input (gMLP paper, section 4.3 and figure 6).

    `softmax(Q Kᵀ / √size) V` with Q, K and V of width `size` from one bias-free projection, then `out_channels` wide.

    Args:
        channels: width of the block's input.
        out_channels: width of the gate the result is added to.
        size: width of queries, keys and values (64 in the paper's base models, 128 in large).
        causal: a token sees itself and earlier tokens only.
        reach: a token sees those less than so many positions away; None: no limit.
    """

    def __init__(
        self, channels: int, out_channels: int, size: int, *, causal: bool = False, reach: int | None = None
    ) -> None:
        super().__init__()
        self.causal = causal
        self.reach = reach
        self.qkv = nn.Linear(channels, 3 * size, bias=False)
        self.proj = nn.Linear(size, out_channels)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "*rows #tokens tokens"] | None = None,
        padding: Bool[Tensor, "batch tokens"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "batch tokens out"]:
        """Attend.

        Args:
            x: the block's normalised input; with `past` that of the new tokens.
            mask: `mask[…, i, j]` true: token `i` sees token `j`. It takes the place of causality.
            padding: false where there is no token: nobody sees it.
            past: the earlier tokens of sequences that are continued.
        """
        size = self.proj.in_features
        q, kv = mapped(self.qkv, x).split([size, 2 * size], dim=-1)
        if past is not None:
            kept = past.append("attention", kv)
            if past.start:
                k, v = kept.chunk(2, dim=-1)
                return mapped(self.proj, attention(q, k, v, past.visible))
        k, v = kv.chunk(2, dim=-1)
        return mapped(self.proj, attention(q, k, v, mask, padding, causal=self.causal, reach=self.reach))


class SpatialGatingUnit(GridBound):
    r"""Gate each token by a learnt linear map across tokens (gMLP, section 2.1).

    With `u, v` the two halves of the input's channels, `y = u ⊙ act(W·LN(v) + b)`; without the split,
    `y = x ⊙ act(W·LN(x) + b)` (eq. 3). `W` starts near zero (uniform in ±1e-3/tokens) and `b` at one, so that a new
    unit passes `u` on and a new block is an ordinary feed-forward network.

    A Toeplitz unit (appendix C) keeps the 2·tokens − 1 lags of `W[i, j] = w[i − j]` and one bias a head. It is
    shift-invariant and takes inputs of any length: a token reads those less than `tokens` positions away, through its
    tiny attention too.

    Args:
        channels: width of the input, before the split (the papers' d_ffn).
        tokens: the trained length; inputs may be shorter and then use the leading rows and columns of `W`.
        split: halve the channels into `u` and `v` (the paper's better form).
        heads: spatial heads, each with its own `W` and `b` over an equal share of the gate's channels.
        causal: token `i` reads tokens `j ≤ i` only.
        toeplitz: constrain `W` to a Toeplitz matrix and `b` to one number a head.
        gate_act: the gate's activation; the paper has none.
        attention_size: width of aMLP's tiny attention; 0 leaves it out.
        attention_channels: width of the block input that the tiny attention reads; needed when there is one.
        norm_eps: the layer norm's epsilon.

    Raises:
        ValueError: if `channels` cannot be split, `heads` does not divide the gate's channels, or a size is below one.
    """

    grid_parameters = ("weight", "bias")

    def __init__(
        self,
        channels: int,
        tokens: int,
        *,
        split: bool = True,
        heads: int = 1,
        causal: bool = False,
        toeplitz: bool = False,
        gate_act: Callable[[Tensor], Tensor] | None = None,
        attention_size: int = 0,
        attention_channels: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(channels, tokens, heads) < 1:
            raise ValueError(f"channels, tokens and heads must be positive, got {channels}, {tokens} and {heads}")
        if split and channels % 2:
            raise ValueError(f"channels must be even to be split in halves, got {channels}")
        gate_channels = channels // 2 if split else channels
        if gate_channels % heads:
            raise ValueError(f"heads must divide the gate's {gate_channels} channels, got {heads}")
        if attention_size and attention_channels is None:
            raise ValueError("attention_channels (the width of the block's input) is needed with attention_size")
        self.tokens = tokens
        self.split = split
        self.causal = causal
        self.toeplitz = toeplitz
        self.gate_act = gate_act
        self.norm = nn.LayerNorm(gate_channels, eps=norm_eps)
        self.weight = nn.Parameter(
            torch.empty(heads, 2 * tokens - 1) if toeplitz else torch.empty(heads, tokens, tokens)
        )
        self.bias = nn.Parameter(torch.empty(heads, 1 if toeplitz else tokens))
        self.attention = (
            TinyAttention(
                attention_channels, gate_channels, attention_size, causal=causal, reach=tokens if toeplitz else None
            )
            if attention_size and attention_channels is not None
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `W` near zero and set `b` to one."""
        bound = 1e-3 / self.tokens
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.ones_(self.bias)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        block_input: Float[Tensor, "batch tokens block_channels"] | None = None,
        mask: Bool[Tensor, "*rows tokens tokens"] | None = None,
        padding: Bool[Tensor, "batch tokens"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "batch tokens gate_channels"]:
        """Gate `x`.

        Args:
            x: the block's activated expansion; with `past` that of the new tokens.
            block_input: the block's normalised input, read by the tiny attention.
            mask: `mask[…, i, j]` true where token `i` may read token `j`, multiplied onto `W`; it takes the place of
                causality, so that a causal unit is exactly as causal as the mask.
            padding: false where there is no token: such places are read by nobody.
            past: the earlier tokens of sequences that are continued; for causal units.

        Raises:
            ValueError: if the input is longer than the unit, or the tiny attention lacks its input.
        """
        u, v = x.chunk(2, dim=-1) if self.split else (x, x)
        if mask is None and padding is None and past is None and self._is_plain() and self._is_bare():
            return normalized_spatial_gating(u, v, *self._plain_parameters(x.shape[1]), causal=self.causal)
        return self.gated(u, self.gate(v, block_input, mask, padding, past))

    def gate(
        self,
        v: Float[Tensor, "batch tokens gate_channels"],
        block_input: Float[Tensor, "batch tokens block_channels"] | None = None,
        mask: Bool[Tensor, "*rows tokens tokens"] | None = None,
        padding: Bool[Tensor, "batch tokens"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "batch tokens gate_channels"]:
        """What `u` is multiplied by, `act(W·LN(v) + b)` with the tiny attention added; arguments as in `forward`."""
        tokens = v.shape[1]
        self._check_length(tokens)
        residual = None
        if self.attention is not None:
            if block_input is None:
                raise ValueError("a spatial gating unit with tiny attention needs block_input, the normalised input")
            residual = self.attention(block_input, mask, padding, past)
        if mask is None and padding is None and past is None and self._is_plain():
            gate = normalized_projection(v, *self._plain_parameters(tokens), causal=self.causal)
            return finished_gate(gate, residual, self.gate_act)
        v = self.norm(v)
        if padding is not None:
            v = v * padding.unsqueeze(-1)
        if past is not None:
            kept = past.append("gate", v)
            if past.start:
                weight, bias = self._decoding_rows(past, tokens, kept.shape[1])
                return finished_gate(spatial_projection(kept, weight, bias), residual, self.gate_act)
        if self.toeplitz and mask is None:
            gate = toeplitz_product(self.weight, v, self.bias, causal=self.causal)
            return finished_gate(gate, residual, self.gate_act)
        bias = _leading(self.bias, tokens, 1) if not self.toeplitz else self.bias
        causal = self.causal and mask is None
        projection = spatial_projection(v, self._matrix(tokens, mask), bias, causal=causal)
        return finished_gate(projection, residual, self.gate_act)

    def gated(
        self, u: Float[Tensor, "batch tokens gate_channels"], gate: Float[Tensor, "batch tokens gate_channels"]
    ) -> Float[Tensor, "batch tokens gate_channels"]:
        """`u ⊙ gate`, where the gate lies if it can; what an activation returned, others may hold."""
        return apply_gate(u, gate) if self.gate_act is None else u * gate

    def trained_grid(self, own: Mapping[str, Tensor]) -> Grid:
        return (own["bias"].shape[-1],)

    def resampled(self, own: Mapping[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
        if self.toeplitz:
            raise ValueError("a Toeplitz unit belongs to a sequence, not to a grid; it takes any length as it is")
        return {
            "weight": resample_read(resample_written(own["weight"], grid, new_grid, -2), grid, new_grid),
            "bias": resample_written(own["bias"], grid, new_grid, -1),
        }

    def set_grid_size(self, grid: Grid, new_grid: Grid, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        super().set_grid_size(grid, new_grid, parameters)
        self.tokens = math.prod(new_grid)

    def _check_length(self, tokens: int) -> None:
        if not self.toeplitz and tokens > self.tokens:
            raise ValueError(f"the input has {tokens} tokens, the spatial gating unit takes at most {self.tokens}")

    def _plain_parameters(self, tokens: int) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
        """What `normalized_spatial_gating` reads for so many tokens, in its order."""
        self._check_length(tokens)
        norm = self.norm
        return norm.weight, norm.bias, norm.eps, _leading(self.weight, tokens, 1, 2), _leading(self.bias, tokens, 1)

    def _is_plain(self) -> bool:
        """Whether the projection is a dense product of the norm."""
        norm = self.norm
        return type(norm) is nn.LayerNorm and norm.bias is not None and not is_watched(norm) and not self.toeplitz

    def _is_bare(self) -> bool:
        """Whether the gate is the projection and nothing else."""
        return self.attention is None and self.gate_act is None

    def _matrix(self, tokens: int, mask: Tensor | None) -> Tensor:
        """`W` for a whole sequence: [heads, tokens, tokens], or [batch, heads, tokens, tokens] with a mask per row."""
        dense = not self.toeplitz
        weight = _leading(self.weight, tokens, 1, 2) if dense else toeplitz_matrix(self.weight, tokens)
        return weight if mask is None else weight * mask.unsqueeze(-3)

    def _decoding_rows(self, past: Past, new: int, read: int) -> tuple[Tensor, Tensor]:
        """The rows of `W` and `b` that belong to the new tokens, over the tokens they read."""
        last, rows = past.first + read, past.positions
        if self.toeplitz:
            if past.visible is None:
                return self.weight[:, None, self.tokens - 1 : self.tokens - 1 + read].flip(-1), self.bias
            if rows is None:
                rows = torch.arange(past.start, past.start + new, device=self.weight.device)
            lag = rows.unsqueeze(-1) - torch.arange(past.first, last, device=rows.device)
            weight = self.weight[:, lag.clamp(1 - self.tokens, self.tokens - 1) + self.tokens - 1]
            bias = self.bias
        elif rows is None:
            weight = self.weight[:, past.start : past.start + new, past.first : last]
            bias = self.bias[:, past.start : past.start + new]
        else:
            weight, bias = self.weight[:, rows, past.first : last], self.bias[:, rows].transpose(0, 1)
        if weight.dim() == 4:
            weight = weight.transpose(0, 1)
        return weight if past.visible is None else weight * past.visible.unsqueeze(-3), bias

    def extra_repr(self) -> str:
        kind = "toeplitz" if self.toeplitz else "dense"
        heads = self.weight.shape[0]
        return f"tokens={self.tokens}, heads={heads}, split={self.split}, causal={self.causal}, weight={kind}"


def gated_feed_forward(
    proj_in: nn.Module,
    act: nn.Module,
    sgu: nn.Module,
    proj_out: nn.Module,
    x: Float[Tensor, "batch tokens channels"],
    mask: Bool[Tensor, "*rows tokens tokens"] | None = None,
    padding: Bool[Tensor, "batch tokens"] | None = None,
    past: Past | None = None,
    onto: Float[Tensor, "batch tokens channels"] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """What a block adds, `proj_out(sgu(act(proj_in(x))))` (gMLP, section 2), in the form that fits what torch does.

    The halves of the expansion are two products, so that neither has to be read out of the other's rows; for a few
    images without gradients the calls cost more than that. Backward keeps both, before and behind the activation, and
    the gate; it computes the norm and the gated tensor again.

    Args:
        proj_in: the expansion.
        act: the activation, element by element.
        sgu: the spatial gating unit.
        proj_out: the projection back.
        x: the block's normalised input, which the tiny attention reads too.
        mask: as in `SpatialGatingUnit.forward`.
        padding: likewise.
        past: likewise.
        onto: what the result is added to; None for nothing.
    """
    if past is not None or not _takes_halves(sgu, x):
        return mapped_onto(onto, proj_out, sgu(mapped(proj_in, x, act), x, mask, padding, past))
    u, v = mapped_halves(proj_in, x, act)
    gate = sgu.gate(v, x, mask, padding)
    if torch.is_grad_enabled():
        y = linear_after(proj_out, torch.mul, u, gate)
        return y if onto is None else onto + y
    return mapped_onto(onto, proj_out, sgu.gated(u, gate))


def _takes_halves(sgu: nn.Module, x: Tensor) -> TypeGuard[SpatialGatingUnit]:
    """Whether nobody notices, for inputs like `x`, that the unit's `gate` is called in the unit's place."""
    if type(sgu) is not SpatialGatingUnit or not sgu.split or is_watched(sgu) or not isinstance(x, Tensor):
        return False
    if is_plain_inference():
        plain = x.shape[:-1].numel() >= _MANY_ROWS
    else:
        plain = (is_compiled_inference() and x.is_cpu) or is_plain_training(x, sgu.weight)
    return plain and not takes_fused("normalized_spatial_gating", "auto", x, sgu.weight)


def _leading(x: Tensor, tokens: int, *axes: int) -> Tensor:
    """The first `tokens` of `x` along some axes; for all of them `x` itself, unless a compiler would fix the length."""
    if not torch.compiler.is_compiling() and all(x.shape[axis] == tokens for axis in axes):
        return x
    for axis in axes:
        if torch.compiler.is_exporting():
            # A view's memory layout would tie the exported graph to lengths below the trained one.
            x = x.index_select(axis, torch.arange(tokens, device=x.device))
        else:
            x = x.narrow(axis, 0, tokens)
    return x


# Tokens of all samples, from which on two products take less time than one, without gradients (`benchmarks/halves.py`).
_MANY_ROWS = 1024
