"""MLP-Mixer: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision" (arXiv 2105.01601)."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from allmlp.layers import ChannelMLP, PatchEmbedding, TokenMixingMLP
from allmlp.layers.recomputing import residual
from allmlp.vision.base import VisionMLP, column_levels, depth_decayed
from allmlp.vision.registry import register_family

_SMALL = {"num_blocks": 8, "embed_dim": 512, "token_hidden": 256, "channel_hidden": 2048}
_BASE = {"num_blocks": 12, "embed_dim": 768, "token_hidden": 384, "channel_hidden": 3072}
_LARGE = {"num_blocks": 24, "embed_dim": 1024, "token_hidden": 512, "channel_hidden": 4096}
_HUGE = {"num_blocks": 32, "embed_dim": 1280, "token_hidden": 640, "channel_hidden": 5120}
# token_hidden and channel_hidden are the paper's D_S and D_C (table 1).
VARIANTS = {
    "mixer_small_patch16_224": {"patch_size": 16, **_SMALL},
    "mixer_small_patch32_224": {"patch_size": 32, **_SMALL},
    "mixer_base_patch16_224": {"patch_size": 16, **_BASE},
    "mixer_base_patch32_224": {"patch_size": 32, **_BASE},
    "mixer_large_patch16_224": {"patch_size": 16, **_LARGE},
    "mixer_large_patch32_224": {"patch_size": 32, **_LARGE},
    "mixer_huge_patch14_224": {"patch_size": 14, **_HUGE},
    "mixer_nano_patch4_32": {
        "patch_size": 4,
        "num_blocks": 8,
        "embed_dim": 128,
        "token_hidden": 64,
        "channel_hidden": 256,
    },
}

# The authors' JAX code computes the approximation; ports to PyTorch compute the exact function.
Activation = Literal["gelu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh")}


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, both pre-norm residual: `u = x + TM(LN(x))`, `y = u + CM(LN(u))` (eq. 1).

    Args:
        channels: width of the block, C.
        tokens: number of tokens, S.
        token_hidden: hidden width of token mixing, D_S.
        channel_hidden: hidden width of channel mixing, D_C.
        act_layer: makes the activation of both.
        norm_eps: epsilon of the norms.
        drop: dropout rate inside both.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        channels: int,
        tokens: int,
        token_hidden: int,
        channel_hidden: int,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_eps: float = 1e-6,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp_tokens = TokenMixingMLP(tokens, token_hidden, drop, act_layer)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp_channels = ChannelMLP(channels, channel_hidden, act_layer=act_layer, drop=drop)  # type: ignore[arg-type]  (timm calls it)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path(self.mlp_tokens(self.norm1(tokens)))
        return residual(tokens, self.mlp_channels, self.norm2(tokens), self.drop_path).view_as(x)


class Mixer(VisionMLP):
    """MLP-Mixer.

    Args:
        num_classes: outputs of the head; 0 for none.
        img_size: image size in pixels, one number or (height, width).
        in_chans: channels of the image.
        patch_size: patch size in pixels, one number or (height, width).
        patch_kernel: pixels that a patch sees, `patch_size` by default; larger ones overlap.
        num_blocks: number of blocks.
        embed_dim: width, C.
        token_hidden: hidden width of token mixing, D_S.
        channel_hidden: hidden width of channel mixing, D_C.
        act_layer: `"gelu"`, or `"gelu_tanh"` for its tanh approximation.
        norm_eps: epsilon of the norms.
        drop_rate: dropout rate in front of the head.
        proj_drop_rate: dropout rate inside the blocks.
        drop_path_rate: stochastic depth rate of the last block.
        global_pool: `"avg"` or `""`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 16,
        patch_kernel: int | tuple[int, int] | None = None,
        num_blocks: int = 8,
        embed_dim: int = 512,
        token_hidden: int = 256,
        channel_hidden: int = 2048,
        act_layer: Activation = "gelu",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        if act_layer not in _ACTIVATIONS:
            raise ValueError(f"act_layer must be one of {', '.join(_ACTIVATIONS)}, got {act_layer!r}")
        stem = PatchEmbedding(img_size, patch_size, in_chans, embed_dim, kernel_size=patch_kernel, fixed_size=True)
        block = partial(
            MixerBlock,
            embed_dim,
            stem.num_patches,
            token_hidden,
            channel_hidden,
            act_layer=_ACTIVATIONS[act_layer],
            norm_eps=norm_eps,
            drop=proj_drop_rate,
        )
        super().__init__(
            stem=stem,
            blocks=[block(drop_path=rate) for rate in depth_decayed(drop_path_rate, num_blocks)],
            levels=column_levels(num_blocks, embed_dim, stem.patch_size),
            norm=nn.LayerNorm(embed_dim, eps=norm_eps),
            num_classes=num_classes,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


register_family(Mixer, VARIANTS, fixed_input_size=True, default_levels=3)
