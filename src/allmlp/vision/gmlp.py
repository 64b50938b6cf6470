"""gMLP and aMLP for images: Liu et al., "Pay Attention to MLPs" (arXiv 2105.08050)."""

from functools import partial

from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from allmlp.layers import PatchEmbedding, SpatialGatingUnit
from allmlp.layers.recomputing import activated, is_idle, pass_unchanged
from allmlp.layers.spatial_gating import gated_feed_forward
from allmlp.vision.base import VisionMLP, column_levels, depth_decayed
from allmlp.vision.registry import register_family

# mlp_ratio is d_ffn / d_model, d_ffn before the split (paper, table 1); drop_path_rate is 1 − survival probability.
_PAPER = {"patch_size": 16, "num_blocks": 30, "mlp_ratio": 6}
VARIANTS = {
    "gmlp_tiny_patch16_224": {**_PAPER, "embed_dim": 128, "drop_path_rate": 0.0},
    "gmlp_small_patch16_224": {**_PAPER, "embed_dim": 256, "drop_path_rate": 0.05},
    "gmlp_base_patch16_224": {**_PAPER, "embed_dim": 512, "drop_path_rate": 0.2},
    "amlp_small_patch16_224": {**_PAPER, "embed_dim": 256, "drop_path_rate": 0.05, "attention_size": 64},
    "gmlp_nano_patch4_32": {"patch_size": 4, "num_blocks": 8, "embed_dim": 96, "mlp_ratio": 5},
}


class GMLPBlock(nn.Module):
    """`x + V·SGU(GELU(U·LN(x)))`; no activation after `V` (paper, figure 1).

    Args:
        channels: width of the block, d_model.
        tokens: number of tokens.
        hidden: width before the split, d_ffn.
        heads: spatial heads.
        attention_size: width of aMLP's tiny attention, 0 for gMLP.
        norm_eps: epsilon of the block's norm.
        gate_norm_eps: epsilon of the norm inside the spatial gating unit.
        drop: dropout rate after each projection.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        channels: int,
        tokens: int,
        hidden: int,
        *,
        heads: int = 1,
        attention_size: int = 0,
        norm_eps: float = 1e-6,
        gate_norm_eps: float = 1e-5,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=norm_eps)
        self.proj_in = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.sgu = SpatialGatingUnit(
            hidden,
            tokens,
            heads=heads,
            attention_size=attention_size,
            attention_channels=channels if attention_size else None,
            norm_eps=gate_norm_eps,
        )
        self.proj_out = nn.Linear(hidden // 2, channels)
        self.drop2 = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        tokens = x.flatten(1, 2)
        normed = self.norm(tokens)
        parts = self.proj_in, self.act, self.sgu, self.proj_out
        if pass_unchanged(tokens, self.drop1, self.drop2, self.drop_path):
            return gated_feed_forward(*parts, normed, onto=tokens).view_as(x)
        if not is_idle(self.drop1):
            y = self.proj_out(self.sgu(self.drop1(activated(self.act, self.proj_in(normed))), normed))
        else:
            y = gated_feed_forward(*parts, normed)
        return (tokens + self.drop_path(self.drop2(y))).view_as(x)


class GMLP(VisionMLP):
    """gMLP for images; with `attention_size` aMLP.

    Args:
        num_classes: outputs of the head; 0 for none.
        img_size: image size in pixels, one number or (height, width).
        in_chans: channels of the image.
        patch_size: patch size in pixels, one number or (height, width).
        patch_kernel: pixels that a patch sees, `patch_size` by default; larger ones overlap.
        num_blocks: number of blocks.
        embed_dim: width, d_model.
        mlp_ratio: `d_ffn / d_model`, d_ffn before the split.
        num_spatial_heads: spatial weights per block, each for an equal share of the gate's channels.
        attention_size: width of the tiny attention.
        norm_eps: epsilon of block and final norms.
        gate_norm_eps: epsilon of the norms inside the spatial gating units.
        final_norm: whether a norm stands before pooling.
        drop_rate: dropout rate in front of the head.
        proj_drop_rate: dropout rate inside the blocks.
        drop_path_rate: stochastic depth rate of the last block, 1 − survival probability.
        global_pool: `"avg"` or `""`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 16,
        patch_kernel: int | tuple[int, int] | None = None,
        num_blocks: int = 30,
        embed_dim: int = 256,
        mlp_ratio: float = 6,
        num_spatial_heads: int = 1,
        attention_size: int = 0,
        norm_eps: float = 1e-6,
        gate_norm_eps: float = 1e-5,
        final_norm: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        stem = PatchEmbedding(img_size, patch_size, in_chans, embed_dim, kernel_size=patch_kernel, fixed_size=True)
        block = partial(
            GMLPBlock,
            embed_dim,
            stem.num_patches,
            int(embed_dim * mlp_ratio),
            heads=num_spatial_heads,
            attention_size=attention_size,
            norm_eps=norm_eps,
            gate_norm_eps=gate_norm_eps,
            drop=proj_drop_rate,
        )
        super().__init__(
            stem=stem,
            blocks=[block(drop_path=rate) for rate in depth_decayed(drop_path_rate, num_blocks)],
            levels=column_levels(num_blocks, embed_dim, stem.patch_size),
            norm=nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity(),
            num_classes=num_classes,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


register_family(GMLP, VARIANTS, fixed_input_size=True, default_levels=3)
