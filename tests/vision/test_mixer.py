import torch

from allmlp.vision import Mixer
from allmlp.vision.mixer import MixerBlock
from tests.layers.parity import assert_matches, channel_mlp, layer_norm
from tests.layers.test_token_mixing import token_mixing


def test_block_matches_reference() -> None:
    def block(p, x):
        tokens = x.flatten(1, 2)
        tokens = tokens + token_mixing(p, "mlp_tokens.", layer_norm(p, "norm1", tokens, 1e-6))
        return (tokens + channel_mlp(p, "mlp_channels", layer_norm(p, "norm2", tokens, 1e-6))).reshape(x.shape)

    assert_matches(MixerBlock(5, 12, 7, 9), block, torch.randn(2, 3, 4, 5))


def test_hidden_widths() -> None:
    block = Mixer(img_size=32, token_hidden=11, channel_hidden=13, num_blocks=1).blocks[0]
    assert block.mlp_tokens.fc1.weight.shape == (11, 4)
    assert block.mlp_channels.fc1.weight.shape == (13, 512)
