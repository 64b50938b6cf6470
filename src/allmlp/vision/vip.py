"""Vision Permutator: Hou et al., "Vision Permutator: A Permutable MLP-Like Architecture" (arXiv 2106.12368)."""

from typing import Literal

from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from allmlp.layers import ChannelMLP, PatchDownsampling, PatchEmbedding, PermuteMLP, WeightedPermuteMLP
from allmlp.layers.recomputing import laid_out, residual
from allmlp.vision.base import VisionMLP, depth_decayed
from allmlp.vision.registry import register_family

# `segments` is a stage's number of segments, equal to the side of its map; behind `downsample_after` the map is halved.
VARIANTS = {
    "vip_small_patch14_224": {
        "patch_size": 14, "depths": (4, 3, 8, 3), "embed_dims": (384, 384, 384, 384), "segments": (16, 16, 16, 16),
        "downsample_after": (), "drop_path_rate": 0.1,
    },
    "vip_small_patch7_224": {
        "patch_size": 7, "depths": (4, 3, 8, 3), "embed_dims": (192, 384, 384, 384), "segments": (32, 16, 16, 16),
        "downsample_after": (1,), "drop_path_rate": 0.1,
    },
    "vip_medium_patch7_224": {
        "patch_size": 7, "depths": (4, 3, 14, 3), "embed_dims": (256, 256, 512, 512), "segments": (32, 32, 16, 16),
        "downsample_after": (2,), "drop_path_rate": 0.2,
    },
    "vip_large_patch7_224": {
        "patch_size": 7, "depths": (8, 8, 16, 4), "embed_dims": (256, 512, 512, 512), "segments": (32, 16, 16, 16),
        "downsample_after": (1,), "drop_path_rate": 0.3,
    },
    "vip_nano_patch4_32": {
        "patch_size": 4, "depths": (1, 1, 3, 1), "embed_dims": (96, 96, 96, 96), "segments": (8, 8, 8, 8),
        "downsample_after": (),
    },
}  # fmt: skip

Mixing = Literal["weighted", "sum"]
_MIXERS: dict[str, type[PermuteMLP]] = {"weighted": WeightedPermuteMLP, "sum": PermuteMLP}


class PermutatorBlock(nn.Module):
    """Pre-norm residual: `u = x + PermuteMLP(LN(x))`, `y = u + MLP(LN(u))` (paper, eq. 1 and 2).

    Args:
        channels: width of the block.
        grid_size: (height, width) of the map.
        segments: number of channel segments of Permute-MLP.
        mixing: `"weighted"` (split attention) or `"sum"`.
        mlp_ratio: hidden width of the channel MLP over `channels`.
        norm_eps: epsilon of the norms.
        drop: dropout rate inside the channel MLP.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        channels: int,
        grid_size: tuple[int, int],
        segments: int,
        *,
        mixing: Mixing = "weighted",
        mlp_ratio: float = 3,
        norm_eps: float = 1e-5,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.attn = _MIXERS[mixing](channels, grid_size, segments)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp = ChannelMLP(channels, int(channels * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        x = laid_out(residual(x, self.attn, self.norm1(x), self.drop_path))
        tokens = x.flatten(1, 2)
        return laid_out(residual(tokens, self.mlp, self.norm2(tokens), self.drop_path)).view_as(x)


class VisionPermutator(VisionMLP):
    """Vision Permutator; the ends of its stages are its feature levels.

    Args:
        num_classes: outputs of the head; 0 for none.
        img_size: image size in pixels, one number or (height, width).
        in_chans: channels of the image.
        patch_size: patch size in pixels, one number or (height, width).
        patch_kernel: pixels that a patch sees, `patch_size` by default; larger ones overlap.
        depths: blocks of each stage.
        embed_dims: width of each stage.
        segments: number of channel segments of each stage, divisors of its width.
        downsample_after: stages, counted from 1, behind which a 2×2 patch embedding halves the map; a stage whose
            width differs from the one before must follow such a one.
        mixing: `"weighted"` (split attention, the paper's default) or `"sum"` (its ablation).
        mlp_ratio: hidden width of the channel MLPs over the width.
        norm_eps: epsilon of the norms.
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
        patch_size: int | tuple[int, int] = 7,
        patch_kernel: int | tuple[int, int] | None = None,
        depths: tuple[int, ...] = (4, 3, 8, 3),
        embed_dims: tuple[int, ...] = (192, 384, 384, 384),
        segments: tuple[int, ...] = (32, 16, 16, 16),
        downsample_after: tuple[int, ...] = (1,),
        mixing: Mixing = "weighted",
        mlp_ratio: float = 3,
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        if not len(depths) == len(embed_dims) == len(segments):
            raise ValueError(
                f"depths, embed_dims and segments must name as many stages, got {depths}, {embed_dims} and {segments}"
            )
        if strange := sorted(set(downsample_after).difference(range(1, len(depths)))):
            raise ValueError(
                f"downsample_after must name stages that another follows, got {strange[0]} of {len(depths)}"
            )
        if mixing not in _MIXERS:
            raise ValueError(f"mixing must be one of {', '.join(_MIXERS)}, got {mixing!r}")
        stem = PatchEmbedding(img_size, patch_size, in_chans, embed_dims[0], kernel_size=patch_kernel, fixed_size=True)
        rates = iter(depth_decayed(drop_path_rate, sum(depths)))
        grid, reduction = stem.grid_size, max(stem.patch_size)
        blocks: list[nn.Module] = []
        levels = []
        for stage, (depth, channels) in enumerate(zip(depths, embed_dims, strict=True)):
            if stage in downsample_after:
                blocks.append(PatchDownsampling(embed_dims[stage - 1], channels))
                grid, reduction = ((grid[0] + 1) // 2, (grid[1] + 1) // 2), 2 * reduction
            elif stage and channels != embed_dims[stage - 1]:
                raise ValueError(f"stage {stage + 1} changes the width without a downsampling in front: {embed_dims}")
            for _ in range(depth):
                blocks.append(
                    PermutatorBlock(
                        channels,
                        grid,
                        segments[stage],
                        mixing=mixing,
                        mlp_ratio=mlp_ratio,
                        norm_eps=norm_eps,
                        drop=proj_drop_rate,
                        drop_path=next(rates),
                    )
                )
            levels.append((len(blocks) - 1, channels, reduction))
        super().__init__(
            stem=stem,
            blocks=blocks,
            levels=levels,
            norm=nn.LayerNorm(embed_dims[-1], eps=norm_eps),
            num_classes=num_classes,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


register_family(
    VisionPermutator,
    VARIANTS,
    fixed_input_size=True,
    default_levels=lambda variant: tuple(range(len(variant["depths"]))),
    halvings=lambda variant: len(variant["downsample_after"]),
    crop_pct={"vip_small_patch14_224": 0.9, "vip_small_patch7_224": 0.9, "vip_medium_patch7_224": 0.9},
)
