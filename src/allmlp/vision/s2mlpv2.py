"""S²-MLPv2: Yu et al., "S²-MLPv2: Improved Spatial-Shift MLP Architecture for Vision" (arXiv 2108.01072)."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from allmlp.layers import ChannelMLP, PatchDownsampling, PatchEmbedding, SpatialShift, SplitAttention
from allmlp.layers.recomputing import adds_onto, is_watched, linear_after, mapped, mapped_onto, residual
from allmlp.ops import split_attention
from allmlp.ops.execution import is_plain_training
from allmlp.vision.base import VisionMLP, depth_decayed
from allmlp.vision.registry import register_family

VARIANTS = {
    "s2mlpv2_small_patch7_224": {"patch_size": 7, "depths": (4, 14), "embed_dims": (192, 384), "drop_path_rate": 0.1},
    "s2mlpv2_medium_patch7_224": {"patch_size": 7, "depths": (7, 17), "embed_dims": (256, 512), "drop_path_rate": 0.1},
    "s2mlpv2_nano_patch2_32": {"patch_size": 2, "depths": (2, 5), "embed_dims": (48, 96)},
}


def _merge(x1: Tensor, x2: Tensor, x3: Tensor, logits: Tensor) -> Tensor:
    return split_attention((x1, x2, x3), logits)


@adds_onto
class S2Attention(nn.Module):
    """Expand to three branches, shift two of them in opposite orders, merge by split attention (eq. 1 to 6).

    Args:
        channels: width of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 3 * channels)
        self.shift1 = SpatialShift("height_first")
        self.shift2 = SpatialShift("width_first")
        self.split_attention = SplitAttention(channels, 3)
        self.proj = nn.Linear(channels, channels)

    def forward(
        self,
        x: Float[Tensor, "batch height width channels"],
        onto: Float[Tensor, "batch height width channels"] | None = None,
    ) -> Float[Tensor, "batch height width channels"]:
        """Mix `x`; the result is added to `onto` where that is given."""
        x1, x2, x3 = mapped(self.expand, x).chunk(3, dim=-1)
        branches = (self.shift1(x1), self.shift2(x2), x3)
        merging = self.split_attention
        if not is_plain_training(x3) or type(merging) is not SplitAttention or is_watched(merging):
            return mapped_onto(onto, self.proj, self.split_attention(branches))
        # A branch of its own, so that backward does not keep what the other two were made of.
        branches = (*branches[:2], x3.contiguous())
        y = linear_after(self.proj, _merge, *branches, self.split_attention.logits(branches))
        return y if onto is None else onto + y


class S2MLPv2Block(nn.Module):
    """Pre-norm residual: `u = x + S2Attention(LN(x))`, `y = u + MLP(LN(u))`.

    Args:
        channels: width of the block.
        mlp_ratio: hidden width of the channel MLP over `channels`, the paper's r.
        norm_eps: epsilon of the norms.
        drop: dropout rate inside the channel MLP.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        channels: int,
        *,
        mlp_ratio: float = 3,
        norm_eps: float = 1e-5,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.attn = S2Attention(channels)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp_channels = ChannelMLP(channels, int(channels * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        x = residual(x, self.attn, self.norm1(x), self.drop_path)
        tokens = x.flatten(1, 2)
        return residual(tokens, self.mlp_channels, self.norm2(tokens), self.drop_path).view_as(x)


class S2MLPv2(VisionMLP):
    """S²-MLPv2: stages of equal blocks, each further stage behind a 2×2 patch embedding. Any image size is taken.

    Every block is a feature level; `features_only=True` gives the last of each stage.

    Args:
        num_classes: outputs of the head; 0 for none.
        img_size: image size in pixels; kept for timm's interface.
        in_chans: channels of the image.
        patch_size: patch size of the first stage in pixels, one number or (height, width).
        patch_kernel: pixels that a patch sees, `patch_size` by default; larger ones overlap.
        depths: blocks of each stage.
        embed_dims: width of each stage.
        mlp_ratio: hidden width of the channel MLPs over the width, the paper's r.
        norm_eps: epsilon of the norms.
        drop_rate: dropout rate in front of the head.
        proj_drop_rate: dropout rate inside the channel MLPs.
        drop_path_rate: stochastic depth rate of the last block.
        global_pool: `"avg"` or `""`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = 224,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 7,
        patch_kernel: int | tuple[int, int] | None = None,
        depths: tuple[int, ...] = (4, 14),
        embed_dims: tuple[int, ...] = (192, 384),
        mlp_ratio: float = 3,
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        if len(depths) != len(embed_dims):
            raise ValueError(f"depths and embed_dims must name as many stages, got {depths} and {embed_dims}")
        stem = PatchEmbedding(img_size, patch_size, in_chans, embed_dims[0], kernel_size=patch_kernel, fixed_size=False)
        rates = iter(depth_decayed(drop_path_rate, sum(depths)))
        blocks: list[nn.Module] = []
        levels = []
        for stage, (depth, channels) in enumerate(zip(depths, embed_dims, strict=True)):
            if stage:
                blocks.append(PatchDownsampling(embed_dims[stage - 1], channels))
            for _ in range(depth):
                levels.append((len(blocks), channels, max(stem.patch_size) * 2**stage))
                blocks.append(
                    S2MLPv2Block(
                        channels, mlp_ratio=mlp_ratio, norm_eps=norm_eps, drop=proj_drop_rate, drop_path=next(rates)
                    )
                )
        super().__init__(
            stem=stem,
            blocks=blocks,
            levels=levels,
            norm=nn.LayerNorm(embed_dims[-1], eps=norm_eps),
            num_classes=num_classes,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


def _stage_ends(variant: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(end - 1 for end in accumulate(variant["depths"]))


register_family(
    S2MLPv2,
    VARIANTS,
    fixed_input_size=False,
    default_levels=_stage_ends,
    halvings=lambda variant: len(variant["depths"]) - 1,
)
