"""The spatial gating unit of gMLP and aMLP (arXiv 2105.08050)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from allmlp.ops import spatial_gating


class TinyAttention(nn.Module):
    """aMLP's single-head attention on a block's normalised input (gMLP paper, section 4.3 and figure 6).

    `softmax(Q Kᵀ / √size) V`, with Q, K and V of width `size` from one bias-free projection, projected to `out_channels`.

    Args:
        channels: width of the block's input.
        out_channels: width of the gate the result is added to.
        size: width of queries, keys and values (64 in the paper's base models, 128 in large).
        causal: a token sees itself and earlier tokens only.
    """

    def __init__(self, channels: int, out_channels: int, size: int, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(channels, 3 * size, bias=False)
        self.proj = nn.Linear(size, out_channels)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], mask: Bool[Tensor, "tokens tokens"] | None = None
    ) -> Float[Tensor, "batch tokens out"]:
        """Attend. `mask[i, j]` true: token `i` sees token `j`; it is combined with causality."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if mask is not None and self.causal:
            mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None))


class SpatialGatingUnit(nn.Module):
    r"""Gate each token by a learnt linear map across tokens (gMLP, section 2.1).

    With `u, v` the two halves of the input's channels, `y = u ⊙ act(W·LN(v) + b)`; without the split,
    `y = x ⊙ act(W·LN(x) + b)` (eq. 3). `W` starts near zero (uniform in ±1e-3/tokens) and `b` at one, so that a new
    unit passes `u` on and a new block is an ordinary feed-forward network.

    Args:
        channels: width of the input, before the split (the papers' d_ffn).
        tokens: the trained length; inputs may be shorter and then use the leading rows and columns of `W`.
        split: halve the channels into `u` and `v` (the paper's better form).
        heads: spatial heads, each with its own `W` and `b` over an equal share of the gate's channels.
        causal: token `i` reads tokens `j ≤ i` only.
        gate_act: the gate's activation; the paper has none.
        attention_size: width of aMLP's tiny attention; 0 leaves it out.
        attention_channels: width of the block input that the tiny attention reads; needed when there is one.
        norm_eps: the layer norm's epsilon.

    Raises:
        ValueError: if `channels` cannot be split, or `heads` does not divide the gate's channels.
    """

    def __init__(
        self,
        channels: int,
        tokens: int,
        *,
        split: bool = True,
        heads: int = 1,
        causal: bool = False,
        gate_act: Callable[[Tensor], Tensor] | None = None,
        attention_size: int = 0,
        attention_channels: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
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
        self.gate_act = gate_act
        self.norm = nn.LayerNorm(gate_channels, eps=norm_eps)
        self.weight = nn.Parameter(torch.empty(heads, tokens, tokens))
        self.bias = nn.Parameter(torch.empty(heads, tokens))
        self.attention = (
            TinyAttention(attention_channels, gate_channels, attention_size, causal=causal)
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
        mask: Bool[Tensor, "tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens gate_channels"]:
        """Gate `x`.

        Args:
            x: the block's activated expansion.
            block_input: the block's normalised input, read by the tiny attention.
            mask: `mask[i, j]` true where token `i` may read token `j`; multiplied onto `W`, combined with causality.

        Raises:
            ValueError: if the input is longer than the unit, or the tiny attention lacks its input.
        """
        u, v = x.chunk(2, dim=-1) if self.split else (x, x)
        weight, bias = self.weight, self.bias
        n = x.shape[1]
        if n != self.tokens:
            if n > self.tokens:
                raise ValueError(f"the input has {n} tokens, the spatial gating unit takes at most {self.tokens}")
            weight, bias = weight[:, :n, :n], bias[:, :n]
        if self.causal:
            weight = weight.tril()
        if mask is not None:
            weight = weight * mask
        residual = None
        if self.attention is not None:
            if block_input is None:
                raise ValueError(
                    "a spatial gating unit with tiny attention needs block_input, the block's normalised input"
                )
            residual = self.attention(block_input, mask)
        return spatial_gating(u, self.norm(v), weight, bias, residual, self.gate_act)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, heads={self.weight.shape[0]}, split={self.split}, causal={self.causal}"
