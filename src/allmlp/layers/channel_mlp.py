"""The channel MLP that every family's block has."""

from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn

from allmlp.layers.recomputing import linear_act_linear


class ChannelMLP(Mlp):
    """timm's `fc2(GELU(fc1 x))`, which keeps the hidden layer once, not before and behind the activation.

    Arguments as for `timm.layers.Mlp`.
    """

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        if (self.training and self.drop1.p > 0) or type(self.norm) is not nn.Identity:
            return super().forward(x)
        return self.drop2(linear_act_linear(self.fc1, self.act, self.fc2, x))
