"""Token mixers and the other modules the architectures are made of, each usable alone."""

from allmlp.layers.spatial_gating import SpatialGatingUnit, TinyAttention

__all__ = ["SpatialGatingUnit", "TinyAttention"]
