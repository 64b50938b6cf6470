"""AS-MLP: Lian et al., "AS-MLP: An Axial Shifted MLP Architecture for Vision" (arXiv 2107.08391)."""

from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from allmlp.layers import AxialShift, ChannelMLP, PatchEmbedding, PatchMerging, SampleNorm
from allmlp.layers.recomputing import residual
from allmlp.vision.base import VisionMLP, depth_decayed
from allmlp.vision.registry import register_family

VARIANTS = {
    "asmlp_mobile_patch4_224": {"patch_size": 4, "embed_dim": 64, "depths": (2, 2, 2, 2)},
    "asmlp_tiny_patch4_224": {"patch_size": 4, "embed_dim": 96, "depths": (2, 2, 6, 2), "drop_path_rate": 0.2},
    "asmlp_small_patch4_224": {"patch_size": 4, "embed_dim": 96, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3},
    "asmlp_base_patch4_224": {"patch_size": 4, "embed_dim": 128, "depths": (2, 2, 18, 2), "drop_path_rate": 0.5},
    "asmlp_nano_patch2_32": {"patch_size": 2, "embed_dim": 32, "depths": (2, 6, 1), "shift_size": 3},
}


class ASMLPBlock(nn.Module):
    """Pre-norm residual: `u = x + AxialShift(Norm(x))`, `y = u + MLP(Norm(u))` (paper, figure 2).

    Args:
        channels: width of the block.
        shift_size: number of offsets of the axial shift.
        mlp_ratio: hidden width of the channel MLP over `channels`.
        drop: dropout rate of the axial shift's output and inside the channel MLP.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self, channels: int, *, shift_size: int = 5, mlp_ratio: float = 4, drop: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = SampleNorm(channels)
        self.axial_shift = AxialShift(channels, shift_size, drop)
        self.norm2 = SampleNorm(channels)
        self.mlp = ChannelMLP(channels, int(channels * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        x = residual(x, self.axial_shift, self.norm1(x), self.drop_path)
        return residual(x, self.mlp, self.norm2(x), self.drop_path)


class ASMLP(VisionMLP):
    """AS-MLP: stages of blocks, between two stages the map is halved and the width doubled. Any image size is taken.

    Args:
        num_classes: outputs of the head; 0 for none.
        img_size: image size in pixels; kept for timm's interface.
        in_chans: channels of the image.
        patch_size: patch size in pixels, one number or (height, width).
        patch_kernel: pixels that a patch sees, `patch_size` by default; larger ones overlap.
        embed_dim: width of the first stage, the paper's C.
        depths: blocks of each stage.
        shift_size: number of offsets of the axial shifts, odd.
        mlp_ratio: hidden width of the channel MLPs over the width.
        drop_rate: dropout rate in front of the head.
        proj_drop_rate: dropout rate inside the blocks.
        drop_path_rate: stochastic depth rate of the last block.
        global_pool: `"avg"` or `""`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = 224,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 4,
        patch_kernel: int | tuple[int, int] | None = None,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        shift_size: int = 5,
        mlp_ratio: float = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        stem = PatchEmbedding(
            img_size, patch_size, in_chans, embed_dim, SampleNorm, kernel_size=patch_kernel, fixed_size=False
        )
        rates = iter(depth_decayed(drop_path_rate, sum(depths)))
        blocks: list[nn.Module] = []
        levels = []
        for stage, depth in enumerate(depths):
            channels = embed_dim * 2**stage
            if stage:
                blocks.append(PatchMerging(channels // 2, channels, SampleNorm))
            for _ in range(depth):
                blocks.append(
                    ASMLPBlock(
                        channels, shift_size=shift_size, mlp_ratio=mlp_ratio, drop=proj_drop_rate, drop_path=next(rates)
                    )
                )
            levels.append((len(blocks) - 1, channels, max(stem.patch_size) * 2**stage))
        super().__init__(
            stem=stem,
            blocks=blocks,
            levels=levels,
            norm=SampleNorm(levels[-1][1]),
            num_classes=num_classes,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


register_family(
    ASMLP,
    VARIANTS,
    fixed_input_size=False,
    default_levels=lambda variant: tuple(range(len(variant["depths"]))),
    halvings=lambda variant: len(variant["depths"]) - 1,
)
