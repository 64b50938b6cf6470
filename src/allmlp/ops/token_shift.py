"""Token shift: parts of the channels come from neighbouring tokens (g-mlp-pytorch's `shift_tokens`)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def token_shift(
    x: Float[Tensor, "batch tokens channels"], reach: int, *, causal: bool
) -> Float[Tensor, "batch tokens channels"]:
    """Give each token parts of its neighbours: `y[:, i, group g] = x[:, i − s_g, group g]`, zero outside the sequence.

    The shifts `s` run from 0 (causal) or `−reach` to `reach`; each owns `channels // len(s)` channels in this order,
    and the channels that are left over stay.

    Raises:
        ValueError: if there are fewer channels than shifts.
    """
    shifts = range(0 if causal else -reach, reach + 1)
    width = x.shape[-1] // len(shifts)
    if width == 0:
        raise ValueError(f"{len(shifts)} shifts need at least as many channels, got {x.shape[-1]}")
    groups = []
    for shift, group in zip(shifts, x.split(width, dim=-1), strict=False):
        past, future = max(shift, 0), max(-shift, 0)
        groups.append(F.pad(group, (0, 0, past, future))[:, future : future + x.shape[1]])
    return torch.cat([*groups, x[..., width * len(shifts) :]], dim=-1)
