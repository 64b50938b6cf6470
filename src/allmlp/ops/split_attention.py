"""The weighted sum of split attention (ViP, arXiv 2106.12368, and S²-MLPv2, arXiv 2108.01072, eq. 3 to 5)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from allmlp.ops.backends import Backend, takes_fused
from allmlp.ops.execution import is_plain_training
from allmlp.ops.products import multiplies_in_float32


def split_attention_reference(
    branches: Sequence[Float[Tensor, "batch height width channels"]],
    logits: Float[Tensor, "batch branches channels"],
) -> Float[Tensor, "batch height width channels"]:
    """`split_attention` as one contraction over the stacked branches."""
    return torch.einsum("kbhwc,bkc->bhwc", torch.stack(tuple(branches)), logits.softmax(dim=1))


def split_attention(
    branches: Sequence[Float[Tensor, "batch height width channels"]],
    logits: Float[Tensor, "batch branches channels"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "batch height width channels"]:
    """Add branches up with weights that sum to one across the branches, channel by channel.

    `y[b, h, w, c] = Σ_k softmax_k(logits[b, :, c])[k] · branches[k][b, h, w, c]`.

    Args:
        branches: tensors of one shape and dtype; never stacked, so nothing is copied.
        logits: one number for each sample, branch and channel.
        backend: which form runs; see `ops.set_fused`. The fused form reads each branch once, where it lies.

    Raises:
        ValueError: if `backend` is unknown, or `"triton"` and the kernel cannot run here.
    """
    if takes_fused("split_attention", backend, *branches, logits, unfit=_misfit(branches)):
        from allmlp.ops.kernels.split_attention import weigh_branches

        return weigh_branches(*branches, logits)
    weights = logits.softmax(dim=1)
    return (_WeightedSum.apply if is_plain_training(weights, *branches) else _weighted_sum)(weights, *branches)


def _weighted_sum(weights: Tensor, *branches: Tensor) -> Tensor:
    each = _by_branch(weights)
    out = branches[0] * each[0]
    # Nothing is kept of the sum, so it can grow in place, save under vmap, which has no rule for that.
    add = torch.Tensor.addcmul if torch._C._are_functorch_transforms_active() else torch.Tensor.addcmul_
    for branch, weight in zip(branches[1:], each[1:], strict=True):
        out = add(out, branch, weight)
    return out


def _by_branch(weights: Tensor) -> tuple[Tensor, ...]:
    """What each branch of the map is multiplied by."""
    return weights[:, :, None, None, :].unbind(dim=1)


class _WeightedSum(torch.autograd.Function):
    """The backward of torch's `addcmul` multiplies whole maps by one.

    This one consists of differentiable operations, so that gradients of any order exist.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *branches: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *branches)
        return _weighted_sum(weights, *branches)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weights, *branches = ctx.saved_tensors
        needs_weights, *needs = ctx.needs_input_grad
        grad_weights = None
        if needs_weights:
            # A product of one dtype and its conversion take less time than a product of two.
            # Not flatten(): batches of gradients, as vectorised Jacobians take them, have no rule for that.
            rows = grad.shape[0], grad.shape[1] * grad.shape[2], grad.shape[3]
            sums = [(grad * branch.to(grad.dtype)).reshape(rows).sum(1) for branch in branches]
            grad_weights = torch.stack(sums, 1).to(weights.dtype)
        each = zip(branches, _by_branch(weights), needs, strict=True)
        return grad_weights, *((grad * weight).to(branch.dtype) if need else None for branch, weight, need in each)


def pool_branches_reference(
    branches: Sequence[Float[Tensor, "batch height width channels"]],
) -> Float[Tensor, "batch channels"]:
    """`pool_branches` written from its equation."""
    return torch.stack(tuple(branches)).sum(0).mean((1, 2))


def pool_branches(
    branches: Sequence[Float[Tensor, "batch height width channels"]], *, backend: Backend = "auto"
) -> Float[Tensor, "batch channels"]:
    """The mean over the map of the branches' sum, `a[b, c] = mean_hw Σ_k branches[k][b, h, w, c]`.

    Args:
        branches: tensors of one shape and dtype.
        backend: which form runs; see `ops.set_fused`. The fused form reads each branch once, where it lies.

    Raises:
        ValueError: if `backend` is unknown, or `"triton"` and the kernel cannot run here.
    """
    if takes_fused("pool_branches", backend, *branches, unfit=_misfit(branches)):
        from allmlp.ops.kernels import split_attention as kernels

        return kernels.pool_branches(*branches)
    pooled = mean_over_positions(branches[0])
    for branch in branches[1:]:
        pooled = pooled + mean_over_positions(branch)
    return pooled


def _misfit(branches: Sequence[Tensor]) -> str | None:
    """The kernels are written for the number of branches of both papers."""
    return None if len(branches) == 3 else f"it has {len(branches)} branches, the kernels take three"


def mean_over_positions_reference(
    x: Float[Tensor, "batch height width channels"],
) -> Float[Tensor, "batch channels"]:
    """`mean_over_positions` as torch writes it."""
    return x.mean((1, 2))


def mean_over_positions(
    x: Float[Tensor, "batch height width channels"],
) -> Float[Tensor, "batch channels"]:
    """The mean of each channel over the map; for 16-bit maps on a CPU as a product with a row of equal weights.

    The product reads them as they are and accumulates in float32, where torch's reduction first writes them out in
    float32. A compiler's reduction does not, and reads what else it can on the way.
    """
    return _MeanOverPositions.apply(x) if is_plain_training(x) else _mean_over_positions(x)


class _MeanOverPositions(torch.autograd.Function):
    """Its gradient is the same at every position, and is not written out for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return _mean_over_positions(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        _, height, width, _ = ctx.shape
        return (grad / (height * width))[:, None, None, :].expand(ctx.shape)


def _mean_over_positions(x: Tensor) -> Tensor:
    fits = x.device.type == "cpu" and x.dtype.itemsize == 2 and not multiplies_in_float32(x)
    if not fits or torch.compiler.is_compiling():
        return mean_over_positions_reference(x)
    positions = x.shape[1] * x.shape[2]
    weights = x.new_full((1, 1, positions), 1 / positions).expand(x.shape[0], -1, -1)
    return torch.bmm(weights, x.flatten(1, 2)).squeeze(1)
