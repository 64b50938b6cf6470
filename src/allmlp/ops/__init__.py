"""Functions on tensors: each operator's plain reference and, beside it, the form the layers use."""

from allmlp.ops.attention import attention, attention_reference, visible_tokens
from allmlp.ops.axial_shift import (
    axial_shift,
    axial_shift_linear,
    axial_shift_linear_reference,
    axial_shift_reference,
)
from allmlp.ops.backends import set_fused
from allmlp.ops.gelu import gelu, gelu_reference
from allmlp.ops.linear import linear, linear_onto, linear_onto_reference, linear_reference
from allmlp.ops.permute_linear import permute_linear, permute_linear_reference
from allmlp.ops.recomputing import recomputing_linear, recomputing_linear_reference
from allmlp.ops.scaled_add import scaled_add, scaled_add_reference
from allmlp.ops.spatial_gating import (
    apply_gate,
    normalized_spatial_gating,
    normalized_spatial_gating_reference,
    spatial_gating,
    spatial_gating_reference,
)
from allmlp.ops.spatial_shift import (
    spatial_shift,
    spatial_shift_linear,
    spatial_shift_linear_reference,
    spatial_shift_reference,
)
from allmlp.ops.split_attention import (
    mean_over_positions,
    mean_over_positions_reference,
    pool_branches,
    pool_branches_reference,
    split_attention,
    split_attention_reference,
)
from allmlp.ops.toeplitz import toeplitz_matrix, toeplitz_product, toeplitz_product_reference
from allmlp.ops.token_linear import token_linear, token_linear_reference
from allmlp.ops.token_shift import token_shift

__all__ = [
    "apply_gate",
    "attention",
    "attention_reference",
    "axial_shift",
    "axial_shift_linear",
    "axial_shift_linear_reference",
    "axial_shift_reference",
    "gelu",
    "gelu_reference",
    "linear",
    "linear_onto",
    "linear_onto_reference",
    "linear_reference",
    "mean_over_positions",
    "mean_over_positions_reference",
    "normalized_spatial_gating",
    "normalized_spatial_gating_reference",
    "permute_linear",
    "permute_linear_reference",
    "pool_branches",
    "pool_branches_reference",
    "recomputing_linear",
    "recomputing_linear_reference",
    "scaled_add",
    "scaled_add_reference",
    "set_fused",
    "spatial_gating",
    "spatial_gating_reference",
    "spatial_shift",
    "spatial_shift_linear",
    "spatial_shift_linear_reference",
    "spatial_shift_reference",
    "split_attention",
    "split_attention_reference",
    "toeplitz_matrix",
    "toeplitz_product",
    "toeplitz_product_reference",
    "token_linear",
    "token_linear_reference",
    "token_shift",
    "visible_tokens",
]
