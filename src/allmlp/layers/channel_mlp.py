"""The channel MLP that every family's block has."""

from typing import Any

from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn

from allmlp.layers.recomputing import adds_onto, is_idle, linear_act_linear, mapped, mapped_onto, pass_unchanged


@adds_onto
class ChannelMLP(Mlp):
    """timm's `fc2(GELU(fc1 x))`, which keeps the hidden layer once, not before and behind the activation.

    Arguments as for `timm.layers.Mlp`.

    Raises:
        ValueError: if the hidden layer would have no channel, for which timm's would take `in_features`.
    """

    def __init__(self, in_features: int, hidden_features: int | None = None, *arguments: Any, **settings: Any) -> None:
        if hidden_features is not None and hidden_features < 1:
            raise ValueError(f"the channel MLP's hidden layer must have at least one channel, got {hidden_features}")
        super().__init__(in_features, hidden_features, *arguments, **settings)

    def forward(
        self, x: Float[Tensor, "*batch channels"], onto: Float[Tensor, "*batch channels"] | None = None
    ) -> Float[Tensor, "*batch channels"]:
        """Map `x`; the result is added to `onto` where that is given."""
        if not is_idle(self.drop1) or type(self.norm) is not nn.Identity:
            y = super().forward(x)
        elif onto is not None and pass_unchanged(x, self.drop2):
            return mapped_onto(onto, self.fc2, mapped(self.fc1, x, self.act))
        else:
            y = self.drop2(linear_act_linear(self.fc1, self.act, self.fc2, x))
        return y if onto is None else onto + y
