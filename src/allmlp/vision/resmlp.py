"""ResMLP: Touvron et al., "ResMLP: Feedforward networks for image classification" (arXiv 2105.03404)."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from allmlp.layers import Affine, ChannelMLP, GridBound, PatchEmbedding, TokenLinear
from allmlp.ops import scaled_add
from allmlp.ops.resampling import Grid, resample_read, resample_written
from allmlp.vision.base import VisionMLP, column_levels, depth_decayed
from allmlp.vision.registry import register_family

# init_scale is LayerScale's initial value, chosen by depth as in the official code.
VARIANTS = {
    "resmlp_12_patch16_224": {"patch_size": 16, "num_blocks": 12, "embed_dim": 384, "init_scale": 0.1},
    "resmlp_24_patch16_224": {"patch_size": 16, "num_blocks": 24, "embed_dim": 384, "init_scale": 1e-5},
    "resmlp_36_patch16_224": {"patch_size": 16, "num_blocks": 36, "embed_dim": 384, "init_scale": 1e-6},
    "resmlp_nano_patch4_32": {"patch_size": 4, "num_blocks": 8, "embed_dim": 96, "init_scale": 0.1},
}


class ResMLPBlock(GridBound):
    """A linear map across tokens, then a channel MLP, each between an Affine and a LayerScale (eq. 2 and 3).

    `u = x + ls1 ⊙ (W·Aff1(x) + b)`, `y = u + ls2 ⊙ MLP(Aff2(u))`.

    Args:
        channels: width of the block.
        tokens: number of tokens.
        mlp_ratio: hidden width of the channel MLP over `channels`.
        init_scale: initial value of both LayerScales.
        drop: dropout rate inside the channel MLP.
        drop_path: stochastic depth rate.
    """

    grid_parameters = ("linear_tokens.weight", "linear_tokens.bias")

    def __init__(
        self,
        channels: int,
        tokens: int,
        *,
        mlp_ratio: float = 4,
        init_scale: float = 0.1,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.norm1 = Affine(channels)
        self.linear_tokens = TokenLinear(tokens, tokens)
        self.ls1 = nn.Parameter(torch.full((channels,), init_scale))
        self.norm2 = Affine(channels)
        self.mlp_channels = ChannelMLP(channels, int(channels * mlp_ratio), drop=drop)
        self.ls2 = nn.Parameter(torch.full((channels,), init_scale))
        self.drop_path = DropPath(drop_path)

    def reset_parameters(self) -> None:
        """Both LayerScales at their initial value."""
        for scale in (self.ls1, self.ls2):
            nn.init.constant_(scale, self.init_scale)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        tokens = x.flatten(1, 2)
        tokens = scaled_add(tokens, self.ls1, self.drop_path(self.linear_tokens(self.norm1(tokens))))
        tokens = scaled_add(tokens, self.ls2, self.drop_path(self.mlp_channels(self.norm2(tokens))))
        return tokens.view_as(x)

    def trained_grid(self, own: Mapping[str, Tensor]) -> Grid:
        return (own["linear_tokens.bias"].shape[0],)

    def resampled(self, own: Mapping[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
        weight = resample_written(own["linear_tokens.weight"], grid, new_grid)
        return {
            "linear_tokens.weight": resample_read(weight, grid, new_grid),
            "linear_tokens.bias": resample_written(own["linear_tokens.bias"], grid, new_grid),
        }


class ResMLP(VisionMLP):
    """ResMLP.

    Args:
        num_classes: outputs of the head; 0 for none.
        img_size: image size in pixels, one number or (height, width).
        in_chans: channels of the image.
        patch_size: patch size in pixels, one number or (height, width).
        patch_kernel: pixels that a patch sees, `patch_size` by default; larger ones overlap.
        num_blocks: number of blocks.
        embed_dim: width.
        mlp_ratio: hidden width of the channel MLPs over `embed_dim`.
        init_scale: initial value of the LayerScales.
        drop_rate: dropout rate in front of the head.
        proj_drop_rate: dropout rate inside the channel MLPs.
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
        num_blocks: int = 12,
        embed_dim: int = 384,
        mlp_ratio: float = 4,
        init_scale: float = 0.1,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        stem = PatchEmbedding(img_size, patch_size, in_chans, embed_dim, kernel_size=patch_kernel, fixed_size=True)
        block = partial(
            ResMLPBlock, embed_dim, stem.num_patches, mlp_ratio=mlp_ratio, init_scale=init_scale, drop=proj_drop_rate
        )
        super().__init__(
            stem=stem,
            blocks=[block(drop_path=rate) for rate in depth_decayed(drop_path_rate, num_blocks)],
            levels=column_levels(num_blocks, embed_dim, stem.patch_size),
            norm=Affine(embed_dim),
            num_classes=num_classes,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


register_family(ResMLP, VARIANTS, fixed_input_size=True, default_levels=3)
