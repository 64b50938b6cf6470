"""Split attention: how ViP and S²-MLPv2 weigh their branches."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from allmlp.ops import pool_branches, split_attention


class SplitAttention(nn.Module):
    """Weigh branches by a small network of their pooled sum (S²-MLPv2, arXiv 2108.01072, eq. 3 to 5).

    `a = mean over positions of Σ_k x_k`, `logits = W2 GELU(W1 a)` with hidden width `channels / 4`,
    `y = Σ_k softmax_k(logits) ⊙ x_k`, the softmax across branches for every channel. The mean (S²-MLPv2 prints a sum)
    keeps the result independent of the map's size.

    Args:
        channels: width of every branch.
        branches: number of branches.
        bias: give both linear maps a bias (ViP does, S²-MLPv2 does not).
        layout: how the `branches · channels` outputs of `W2` are ordered: all branches of a channel together
            (`"channel_major"`, ViP's checkpoints) or all channels of a branch (`"branch_major"`, S²-MLPv2).

    Raises:
        ValueError: for fewer than four channels, which leave no hidden one; for inputs of another number of branches.
    """

    def __init__(
        self,
        channels: int,
        branches: int = 3,
        *,
        bias: bool = False,
        layout: Literal["channel_major", "branch_major"] = "branch_major",
    ) -> None:
        super().__init__()
        if layout not in ("channel_major", "branch_major"):
            raise ValueError(f"layout must be channel_major or branch_major, got {layout!r}")
        if channels < 4 or branches < 1:
            raise ValueError(f"needs at least 4 channels and one branch, got {channels} and {branches}")
        self.branches = branches
        self.layout = layout
        self.fc1 = nn.Linear(channels, channels // 4, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(channels // 4, branches * channels, bias=bias)

    def logits(
        self, branches: Sequence[Float[Tensor, "batch height width channels"]]
    ) -> Float[Tensor, "batch branches channels"]:
        """What the softmax across branches is taken of."""
        if len(branches) != self.branches:
            raise ValueError(f"made for {self.branches} branches, got {len(branches)}")
        logits = self.fc2(self.act(self.fc1(pool_branches(branches))))
        if self.layout == "channel_major":
            return logits.unflatten(1, (-1, self.branches)).transpose(1, 2)
        return logits.unflatten(1, (self.branches, -1))

    def forward(
        self, branches: Sequence[Float[Tensor, "batch height width channels"]]
    ) -> Float[Tensor, "batch height width channels"]:
        return split_attention(branches, self.logits(branches))

    def extra_repr(self) -> str:
        return f"branches={self.branches}, layout={self.layout!r}"
