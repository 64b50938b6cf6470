"""Mixer's token mixing (MLP-Mixer, arXiv 2105.01601)."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from allmlp.layers.recomputing import activated, is_idle, is_repeatable, is_watched, linear_after, mapped
from allmlp.layers.resampling import GridBound
from allmlp.layers.token_linear import TokenLinear
from allmlp.ops.resampling import Grid, resample_read, resample_written


class TokenMixingMLP(GridBound):
    """Mixer's token mixing, `W2 GELU(W1 X + b1) + b2` across tokens (MLP-Mixer, eq. 1).

    Args:
        tokens: number of tokens.
        hidden: width of the hidden layer, the paper's D_S.
        drop: dropout rate after each layer.
        act_layer: makes the activation, a function of single numbers.
    """

    grid_parameters = ("fc1.weight", "fc2.weight", "fc2.bias")

    def __init__(
        self, tokens: int, hidden: int, drop: float = 0.0, act_layer: Callable[[], nn.Module] = nn.GELU
    ) -> None:
        super().__init__()
        self.fc1 = TokenLinear(tokens, hidden)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = TokenLinear(hidden, tokens)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        if not is_idle(self.drop1):
            return self.drop2(self.fc2(self.drop1(activated(self.act, self.fc1(x)))))
        if torch.compiler.is_exporting() and all(
            type(fc) is TokenLinear and not is_watched(fc) for fc in (self.fc1, self.fc2)
        ):
            # Transposed once for both maps, so that engines apply bias and activation as they store the first.
            hidden = F.linear(x.transpose(1, 2), self.fc1.weight, self.fc1.bias)
            return F.linear(self.act(hidden), self.fc2.weight, self.fc2.bias).transpose(1, 2)
        if not torch.is_grad_enabled():
            return self.drop2(mapped(self.fc2, mapped(self.fc1, x, self.act)))
        hidden = self.fc1(x)
        # Products of 16 bits are so fast that an activation computed twice shows in the step.
        narrow = isinstance(hidden, Tensor) and hidden.dtype in (torch.bfloat16, torch.float16)
        keeps = narrow or not is_repeatable(self.act)
        act = partial(activated, self.act)
        return self.drop2(self.fc2(act(hidden)) if keeps else linear_after(self.fc2, act, hidden))

    def trained_grid(self, own: Mapping[str, Tensor]) -> Grid:
        return (own["fc2.bias"].shape[0],)

    def resampled(self, own: Mapping[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
        return {
            "fc1.weight": resample_read(own["fc1.weight"], grid, new_grid),
            "fc2.weight": resample_written(own["fc2.weight"], grid, new_grid),
            "fc2.bias": resample_written(own["fc2.bias"], grid, new_grid),
        }
