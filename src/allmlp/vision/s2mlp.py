"""S²-MLP: Yu et al., "S²-MLP: Spatial-Shift MLP Architecture for Vision" (arXiv 2106.07477)."""

from functools import partial
from typing import Literal

from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from allmlp.layers import Affine, ChannelMLP, PatchEmbedding, SpatialShift
from allmlp.layers.recomputing import is_plain_linear, is_watched, mapped
from allmlp.ops import spatial_shift_linear
from allmlp.vision.base import VisionMLP, column_levels, depth_decayed
from allmlp.vision.registry import register_family

# The deep model has ResMLP's Affine in place of layer norm (paper, section 4.1).
VARIANTS = {
    "s2mlp_wide_patch16_224": {"patch_size": 16, "num_blocks": 12, "embed_dim": 768, "mlp_ratio": 4},
    "s2mlp_deep_patch16_224": {"patch_size": 16, "num_blocks": 36, "embed_dim": 384, "mlp_ratio": 4, "norm": "affine"},
    "s2mlp_nano_patch4_32": {"patch_size": 4, "num_blocks": 8, "embed_dim": 96, "mlp_ratio": 3},
}

Norm = Literal["layer", "affine"]


def _norm_layer(norm: Norm, eps: float) -> partial[nn.Module]:
    layers = {"layer": partial(nn.LayerNorm, eps=eps), "affine": partial(Affine)}
    if norm not in layers:
        raise ValueError(f"norm must be one of {', '.join(layers)}, got {norm!r}")
    return layers[norm]


class S2MLPBlock(nn.Module):
    """Two residual branches with their norm on the branch's output (paper, figure 1).

    `u = x + Norm(fc2(shift(GELU(fc1 x))))`, `y = u + Norm(fc4(GELU(fc3 u)))`.

    Args:
        channels: width of the block.
        mlp_ratio: hidden width of the second branch over `channels`, the paper's r.
        norm_layer: makes a norm of the given width.
        drop: dropout rate inside the second branch.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        channels: int,
        *,
        mlp_ratio: float,
        norm_layer: partial[nn.Module],
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels)
        self.act = nn.GELU()
        self.shift = SpatialShift("width_first")
        self.fc2 = nn.Linear(channels, channels)
        self.norm1 = norm_layer(channels)
        self.mlp_channels = ChannelMLP(channels, int(channels * mlp_ratio), drop=drop)
        self.norm2 = norm_layer(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        x = x + self.drop_path(self.norm1(self._shifted(mapped(self.fc1, x, self.act))))
        return x + self.drop_path(self.norm2(self.mlp_channels(x)))

    def _shifted(self, x: Tensor) -> Tensor:
        plain_shift = type(self.shift) is SpatialShift and not is_watched(self.shift)
        if plain_shift and is_plain_linear(self.fc2, x):
            return spatial_shift_linear(x, self.fc2.weight, self.fc2.bias, self.shift.order)
        return self.fc2(self.shift(x))


class S2MLP(VisionMLP):
    """S²-MLP. It has no weight tied to positions: every image size is taken, whatever `img_size` names.

    Args:
        num_classes: outputs of the head; 0 for none.
        img_size: image size in pixels; kept for timm's interface.
        in_chans: channels of the image.
        patch_size: patch size in pixels, one number or (height, width).
        patch_kernel: pixels that a patch sees, `patch_size` by default; larger ones overlap.
        num_blocks: number of blocks, the paper's N.
        embed_dim: width, the paper's c.
        mlp_ratio: hidden width of the channel MLPs over `embed_dim`, the paper's r.
        norm: `"layer"` or `"affine"`.
        norm_eps: epsilon of layer norms.
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
        patch_size: int | tuple[int, int] = 16,
        patch_kernel: int | tuple[int, int] | None = None,
        num_blocks: int = 12,
        embed_dim: int = 768,
        mlp_ratio: float = 4,
        norm: Norm = "layer",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        norm_layer = _norm_layer(norm, norm_eps)
        stem = PatchEmbedding(
            img_size, patch_size, in_chans, embed_dim, norm_layer, kernel_size=patch_kernel, fixed_size=False
        )
        block = partial(S2MLPBlock, embed_dim, mlp_ratio=mlp_ratio, norm_layer=norm_layer, drop=proj_drop_rate)
        super().__init__(
            stem=stem,
            blocks=[block(drop_path=rate) for rate in depth_decayed(drop_path_rate, num_blocks)],
            levels=column_levels(num_blocks, embed_dim, stem.patch_size),
            norm=norm_layer(embed_dim),
            num_classes=num_classes,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


register_family(S2MLP, VARIANTS, fixed_input_size=False, default_levels=3)
