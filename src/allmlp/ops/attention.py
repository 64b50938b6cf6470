"""Single-head attention of tokens that see no further than a reach: aMLP's (arXiv 2105.08050), with Toeplitz weights.

Shape suffixes: B batch, N tokens, M blocks of queries, R tokens of a block, W tokens that a block sees, A channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def visible_tokens(
    tokens: int, *, causal: bool, reach: int | None = None, device: torch.device | None = None
) -> Bool[Tensor, "tokens tokens"]:
    """Which token reads which: `[i, j]` is true where `|i − j| < reach` (None: no limit) and, if causal, `j ≤ i`."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    if causal:
        mask = mask.tril()
    if reach is not None:
        mask = mask.triu(1 - reach).tril(reach - 1)
    return mask


def attention_reference(
    q: Float[Tensor, "batch tokens channels"],
    k: Float[Tensor, "batch read channels"],
    v: Float[Tensor, "batch read channels"],
    mask: Bool[Tensor, "*rows #tokens read"] | None = None,
    padding: Bool[Tensor, "batch read"] | None = None,
    *,
    causal: bool = False,
    reach: int | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """`attention` with one mask over all pairs of tokens."""
    seen = q.new_ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if reach is not None or causal:
        seen = visible_tokens(q.shape[1], causal=causal and mask is None, reach=reach, device=q.device)
    for given in (mask, None if padding is None else padding.unsqueeze(1)):
        seen = seen if given is None else seen & given
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    shares = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return shares.masked_fill(~seen, 0) @ v


def attention(
    q: Float[Tensor, "batch tokens channels"],
    k: Float[Tensor, "batch read channels"],
    v: Float[Tensor, "batch read channels"],
    mask: Bool[Tensor, "*rows #tokens read"] | None = None,
    padding: Bool[Tensor, "batch read"] | None = None,
    *,
    causal: bool = False,
    reach: int | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    r"""`y_i = Σ_j softmax_j(q_i · k_j / √channels) v_j` over the tokens `j` that token `i` sees; 0 where it sees none.

    Of more than `2·reach` tokens each block of `reach` attends to itself and its neighbours: time and memory grow with
    N·reach and not with N². With a mask, which has N² numbers, and while exported, where blocks would fix the length,
    there is one mask over all pairs.

    Args:
        q: queries, any floating dtype.
        k: keys; as many as queries, where causality or a reach says who sees whom.
        v: values.
        mask: `mask[…, i, j]` true where token `i` sees token `j`; it takes the place of causality.
        padding: false where there is no token: nobody sees it.
        causal: token `i` sees tokens `j ≤ i` only.
        reach: token `i` sees tokens `|i − j| < reach` only; None: no limit.

    Returns:
        What each token gathers, shaped and typed like `v`.
    """
    tokens = q.shape[1]
    if reach is not None and tokens <= reach:
        reach = None
    if reach is not None and mask is None and tokens > 2 * reach and not torch.compiler.is_exporting():
        return _in_blocks(q, k, v, padding, causal, reach)
    if reach is not None or (causal and mask is None and padding is not None):
        seen = visible_tokens(tokens, causal=causal and mask is None, reach=reach, device=q.device)
        mask = seen if mask is None else mask & seen
    if padding is not None:
        mask = padding.unsqueeze(1) if mask is None else mask & padding.unsqueeze(1)
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None).squeeze(1)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, causal: bool, reach: int) -> Tensor:
    """Blocks of `reach` queries, as so many heads, over themselves, the block before and, unless causal, behind."""
    tokens, width = q.shape[1], (2 if causal else 3) * reach
    missing = -tokens % reach
    around = reach, missing + width - 2 * reach
    q_BMRA = F.pad(q, (0, 0, 0, missing)).unflatten(1, (-1, reach))
    k_BMWA, v_BMWA = (F.pad(x, (0, 0, *around)).unfold(1, width, reach).transpose(2, 3) for x in (k, v))
    lag_RW = torch.arange(reach, 2 * reach, device=q.device).unsqueeze(-1) - torch.arange(width, device=q.device)
    near_RW = (lag_RW < reach) & (lag_RW > (-1 if causal else -reach))
    real_BN = q.new_ones(1, tokens, dtype=torch.bool) if padding is None else padding
    seen_BMRW = near_RW & F.pad(real_BN, around).unfold(1, width, reach).unsqueeze(2)
    y_BMRA = F.scaled_dot_product_attention(q_BMRA, k_BMWA, v_BMWA, seen_BMRW)
    return y_BMRA.flatten(1, 2)[:, :tokens]
