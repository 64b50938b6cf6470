"""Token mixers and the other modules the architectures are made of, each usable alone."""

from allmlp.layers.affine import Affine
from allmlp.layers.axial_shift import AxialShift
from allmlp.layers.channel_mlp import ChannelMLP
from allmlp.layers.feature_pyramid import SimpleFeaturePyramid
from allmlp.layers.patch_embedding import PatchDownsampling, PatchEmbedding, PatchMerging
from allmlp.layers.permute_mlp import PermuteMLP, WeightedPermuteMLP
from allmlp.layers.resampling import GridBound
from allmlp.layers.sample_norm import SampleNorm
from allmlp.layers.spatial_gating import SpatialGatingUnit, TinyAttention
from allmlp.layers.spatial_shift import SpatialShift
from allmlp.layers.split_attention import SplitAttention
from allmlp.layers.token_linear import TokenLinear
from allmlp.layers.token_mixing import TokenMixingMLP

__all__ = [
    "Affine",
    "AxialShift",
    "ChannelMLP",
    "GridBound",
    "PatchDownsampling",
    "PatchEmbedding",
    "PatchMerging",
    "PermuteMLP",
    "SampleNorm",
    "SimpleFeaturePyramid",
    "SpatialGatingUnit",
    "SpatialShift",
    "SplitAttention",
    "TinyAttention",
    "TokenLinear",
    "TokenMixingMLP",
    "WeightedPermuteMLP",
]
