"""`ops.normalized_spatial_gating` as one product: the norm is applied where `v` is read, the gate where it is made.

With `z = LN(v)` and `g = ∂L/∂y ⊙ u`, the gradients are `∂u = ∂L/∂y ⊙ (W z + b)`, `∂z = Wᵀ g`, `∂W = g zᵀ` and
`∂b = Σ g`. Neither `z` nor `g` is ever written. Nor is the gate kept: `∂u` is the forward kernel with `∂L/∂y` in the
place of `u`. With as few tokens as images have, it moves no more memory than a kept gate; with many it costs a product,
and the memory that is saved counts more. Backward needs `u`, `v` and two numbers a token.

Shape suffixes: B batch, M tokens written, N tokens read, H spatial heads, E gate channels, P = E / H of one head.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allmlp.ops.kernels.precision import factor_dtype, input_precision


class Blocks(NamedTuple):
    """The tile of the result that one program computes, and how much of the sum it takes at a time."""

    rows: int
    columns: int
    depth: int
    warps: int


def choose_blocks(rows: int, columns: int, dtype: torch.dtype) -> Blocks:
    """Tiles of tokens × channels, for the products that write activations."""
    largest = 64 if dtype == torch.float32 else 128
    tile_rows, tile_columns = (min(largest, max(16, triton.next_power_of_2(size))) for size in (rows, columns))
    return Blocks(tile_rows, tile_columns, 32, warps=8 if tile_rows * tile_columns > 64 * 64 else 4)


def choose_weight_blocks(dtype: torch.dtype) -> Blocks:
    """Tiles of tokens × tokens, for the weight's gradient."""
    return Blocks(64, 64, 32 if dtype == torch.float32 else 64, warps=4)


@torch.library.custom_op("allmlp::token_statistics", mutates_args=())
def token_statistics(v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each token's channels, in float32."""
    v = _with_channels_side_by_side(v)
    mean, rstd = (torch.empty(v.shape[:2], dtype=torch.float32, device=v.device) for _ in range(2))
    batch, tokens, channels = v.shape
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(v):
        _token_statistics[(batch * tokens,)](
            v, v.stride(0), v.stride(1), mean, rstd, tokens, channels, eps, BLOCK=block, num_warps=_warps(block)
        )
    return mean, rstd


@torch.library.custom_op("allmlp::gated_product", mutates_args=())
def gated_product(
    u: Tensor,
    v: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    causal: bool,
) -> Tensor:
    """`u ⊙ (W·LN(v) + b)` with the tokens' statistics given; its gradient for `v` is that through them as well."""
    u, v = _with_channels_side_by_side(u), _with_channels_side_by_side(v)
    heads, written, read = weight.shape
    batch, _, channels = u.shape
    share = channels // heads
    bias = bias.expand(heads, written)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    blocks = choose_blocks(written, share, u.dtype)
    grid = (batch * heads * triton.cdiv(share, blocks.columns) * triton.cdiv(written, blocks.rows),)
    with torch.cuda.device_of(u):
        _gated_product[grid](
            out, u, u.stride(0), u.stride(1), v, v.stride(0), v.stride(1), mean, rstd,
            norm_weight.contiguous(), norm_bias.contiguous(),
            weight, weight.stride(0), weight.stride(1), weight.stride(2), bias, bias.stride(0), bias.stride(1),
            heads, written, read, share,
            CAUSAL=causal, FACTOR=factor_dtype(u.dtype), PRECISION=input_precision(),
            ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, num_warps=blocks.warps, num_stages=3,
        )  # fmt: skip
    return out


@torch.library.custom_op("allmlp::gated_product_backward_read", mutates_args=())
def _backward_read(
    grad: Tensor, u: Tensor, v: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor, weight: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `v` and of the norm's weight and bias."""
    grad, u, v = (_with_channels_side_by_side(x) for x in (grad, u, v))
    heads, written, read = weight.shape
    batch, _, channels = v.shape
    share = channels // heads
    grad_z = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    blocks = choose_blocks(read, share, v.dtype)
    grid = (batch * heads * triton.cdiv(share, blocks.columns) * triton.cdiv(read, blocks.rows),)
    with torch.cuda.device_of(v):
        _transposed_product[grid](
            grad_z, grad, grad.stride(0), grad.stride(1), u, u.stride(0), u.stride(1),
            weight, weight.stride(0), weight.stride(1), weight.stride(2),
            heads, written, read, share,
            CAUSAL=causal, FACTOR=factor_dtype(v.dtype), PRECISION=input_precision(),
            ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, num_warps=blocks.warps, num_stages=3,
        )  # fmt: skip
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows = batch * read
    # Each program sums over rows of its own; the sums of all are added up in a fixed order.
    programs = min(rows, 512)
    per_program = triton.cdiv(rows, max(programs, 1))
    sums = torch.empty((2, programs, channels), dtype=torch.float32, device=v.device)
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(v):
        _norm_backward[(programs,)](
            grad_v, sums[0], sums[1], grad_z, v, v.stride(0), v.stride(1), mean, rstd, norm_weight.contiguous(),
            rows, read, channels, per_program, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return grad_v, sums[0].sum(0).to(norm_weight.dtype), sums[1].sum(0).to(norm_weight.dtype)


@torch.library.custom_op("allmlp::gated_product_backward_weight", mutates_args=())
def _backward_weight(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `W` and of `b`, one number a token."""
    grad, u, v = (_with_channels_side_by_side(x) for x in (grad, u, v))
    heads, written, read = weight.shape
    batch, _, channels = v.shape
    blocks = choose_weight_blocks(v.dtype)
    tiles = heads * triton.cdiv(written, blocks.rows) * triton.cdiv(read, blocks.columns)
    # Short sequences have few tiles and long sums: several programs share a tile's samples, and their parts are added
    # up in a fixed order, which atomic additions would not keep.
    parts = max(1, min(batch, 512 // tiles))
    grad_weight = torch.empty((parts, *weight.shape), dtype=torch.float32, device=v.device)
    grad_bias = torch.empty((parts, heads, written), dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):
        _weight_backward[(tiles, parts)](
            grad_weight, grad_bias, grad, grad.stride(0), grad.stride(1), u, u.stride(0), u.stride(1),
            v, v.stride(0), v.stride(1), mean, rstd, norm_weight.contiguous(), norm_bias.contiguous(),
            batch, heads, written, read, channels // heads,
            CAUSAL=causal, FACTOR=factor_dtype(v.dtype), PRECISION=input_precision(),
            ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, num_warps=blocks.warps, num_stages=2,
        )  # fmt: skip
    return grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(weight.dtype)


@token_statistics.register_fake
def _(v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, rstd = (v.new_empty(v.shape[:2], dtype=torch.float32) for _ in range(2))
    return mean, rstd


@gated_product.register_fake
def _(u: Tensor, *others: Any) -> Tensor:
    return u.new_empty(u.shape)


@_backward_read.register_fake
def _(
    grad: Tensor, u: Tensor, v: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), norm_weight.new_empty(norm_weight.shape), norm_weight.new_empty(norm_weight.shape)


@_backward_weight.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    *_, weight, _ = given
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, v, mean, rstd, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
    needs_u, needs_v, _, _, needs_norm_weight, needs_norm_bias, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_u = grad_v = grad_norm_weight = grad_norm_bias = grad_weight = grad_bias = None
    if needs_u:
        grad_u = gated_product(grad, v, mean, rstd, norm_weight, norm_bias, weight, bias, ctx.causal)
    if needs_v or needs_norm_weight or needs_norm_bias:
        grad_v, grad_norm_weight, grad_norm_bias = _backward_read(
            grad, u, v, mean, rstd, norm_weight, weight, ctx.causal
        )
    if needs_weight or needs_bias:
        grad_weight, grad_bias = _backward_weight(grad, u, v, mean, rstd, norm_weight, norm_bias, weight, ctx.causal)
        grad_bias = grad_bias.sum_to_size(bias.shape)
    return grad_u, grad_v, None, None, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None


gated_product.register_autograd(_backward, setup_context=_setup_context)


def _with_channels_side_by_side(x: Tensor) -> Tensor:
    """`x` itself, halves of a tensor among them, unless its channels lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 8)


@triton.jit
def _token_statistics(v, v_batch, v_token, mean, rstd, tokens, channels, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    v += (row // tokens).to(tl.int64) * v_batch + row % tokens * v_token
    x = tl.load(v + e, mask=e < channels, other=0.0).to(tl.float32)
    centre = tl.sum(x, axis=0) / channels
    deviation = tl.where(e < channels, x - centre, 0.0)
    tl.store(mean + row, centre)
    tl.store(rstd + row, 1 / tl.sqrt(tl.sum(deviation * deviation, axis=0) / channels + eps))


@triton.jit
def _read_normalized(v, v_token, mean, rstd, n, tokens, e, inside_e, norm_weight_E, norm_bias_E):
    """The tile (n, e) of `z`, finite where there is none; `v`, `mean` and `rstd` stand at the sample's beginning."""
    inside_n = n < tokens
    x = tl.load(v + n[:, None] * v_token + e[None, :], mask=inside_n[:, None] & inside_e[None, :], other=0.0)
    centre = tl.load(mean + n, mask=inside_n, other=0.0)
    scale = tl.load(rstd + n, mask=inside_n, other=0.0)
    z = (x.to(tl.float32) - centre[:, None]) * scale[:, None]
    return z * norm_weight_E[None, :] + norm_bias_E[None, :]


@triton.jit
def _read_gated(grad, grad_token, u, u_token, m, tokens, e, inside_e):
    """The tile (m, e) of `g`, zero where there is none; `grad` and `u` stand at the sample's beginning."""
    inside = (m < tokens)[:, None] & inside_e[None, :]
    left = tl.load(grad + m[:, None] * grad_token + e[None, :], mask=inside, other=0.0).to(tl.float32)
    return left * tl.load(u + m[:, None] * u_token + e[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gated_product(
    out, u, u_batch, u_token, v, v_batch, v_token, mean, rstd, norm_weight, norm_bias,
    weight, weight_head, weight_m, weight_n, bias, bias_head, bias_m,
    heads, written, read, share,
    CAUSAL: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share the channels they read; those with the longest sums, where causal, begin first.
    row_tiles, column_tiles = tl.cdiv(written, ROWS), tl.cdiv(share, COLUMNS)
    program = tl.program_id(0)
    row_tile = row_tiles - 1 - program % row_tiles
    column_tile = program // row_tiles % column_tiles
    head = program // (row_tiles * column_tiles) % heads
    batch = (program // (row_tiles * column_tiles * heads)).to(tl.int64)
    m = row_tile * ROWS + tl.arange(0, ROWS)
    p = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    e = head * share + p
    inside_m, inside_e = m < written, p < share
    norm_weight_E = tl.load(norm_weight + e, mask=inside_e, other=0.0).to(tl.float32)
    norm_bias_E = tl.load(norm_bias + e, mask=inside_e, other=0.0).to(tl.float32)
    v += batch * v_batch
    mean += batch * read
    rstd += batch * read
    weight += head.to(tl.int64) * weight_head
    stop = read
    if CAUSAL:
        stop = tl.minimum(read, (row_tile + 1) * ROWS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, stop, DEPTH):
        n = start + tl.arange(0, DEPTH)
        z = _read_normalized(v, v_token, mean, rstd, n, read, e, inside_e, norm_weight_E, norm_bias_E)
        kept = inside_m[:, None] & (n < read)[None, :]
        if CAUSAL:
            kept = kept & (n[None, :] <= m[:, None])
        w = tl.load(weight + m[:, None] * weight_m + n[None, :] * weight_n, mask=kept, other=0.0)
        total = tl.dot(w.to(FACTOR), z.to(FACTOR), total, input_precision=PRECISION)
    total += tl.load(bias + head * bias_head + m * bias_m, mask=inside_m, other=0.0).to(tl.float32)[:, None]
    inside = inside_m[:, None] & inside_e[None, :]
    left = tl.load(u + batch * u_batch + m[:, None] * u_token + e[None, :], mask=inside, other=0.0)
    gated = left.to(tl.float32) * total
    out += batch * written * heads * share
    tl.store(out + m[:, None] * (heads * share) + e[None, :], gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _transposed_product(
    grad_z, grad, grad_batch, grad_token, u, u_batch, u_token,
    weight, weight_head, weight_m, weight_n,
    heads, written, read, share,
    CAUSAL: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(read, ROWS), tl.cdiv(share, COLUMNS)
    program = tl.program_id(0)
    row_tile = program % row_tiles
    column_tile = program // row_tiles % column_tiles
    head = program // (row_tiles * column_tiles) % heads
    batch = (program // (row_tiles * column_tiles * heads)).to(tl.int64)
    n = row_tile * ROWS + tl.arange(0, ROWS)
    p = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    e = head * share + p
    inside_n, inside_e = n < read, p < share
    grad += batch * grad_batch
    u += batch * u_batch
    weight += head.to(tl.int64) * weight_head
    first = 0
    if CAUSAL:
        first = row_tile * ROWS // DEPTH * DEPTH
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, written, DEPTH):
        m = start + tl.arange(0, DEPTH)
        g = _read_gated(grad, grad_token, u, u_token, m, written, e, inside_e)
        kept = inside_n[:, None] & (m < written)[None, :]
        if CAUSAL:
            kept = kept & (n[:, None] <= m[None, :])
        w = tl.load(weight + n[:, None] * weight_n + m[None, :] * weight_m, mask=kept, other=0.0)
        total = tl.dot(w.to(FACTOR), g.to(FACTOR), total, input_precision=PRECISION)
    grad_z += batch * read * heads * share
    inside = inside_n[:, None] & inside_e[None, :]
    tl.store(grad_z + n[:, None] * (heads * share) + e[None, :], total.to(grad_z.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    grad_v, sums_weight, sums_bias, grad_z, v, v_batch, v_token, mean, rstd, norm_weight,
    rows, tokens, channels, per_program, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < channels
    norm_weight_E = tl.load(norm_weight + e, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program * per_program, tl.minimum(program * per_program + per_program, rows)):
        place = tl.cast(row, tl.int64)
        scale = tl.load(rstd + place)
        x = tl.load(v + place // tokens * v_batch + place % tokens * v_token + e, mask=inside, other=0.0)
        x = tl.where(inside, (x.to(tl.float32) - tl.load(mean + place)) * scale, 0.0)
        grad = tl.load(grad_z + place * channels + e, mask=inside, other=0.0).to(tl.float32)
        sum_weight += grad * x
        sum_bias += grad
        grad = grad * norm_weight_E
        along_one = tl.sum(grad, axis=0) / channels
        along_x = tl.sum(grad * x, axis=0) / channels
        grad = (grad - along_one - x * along_x) * scale
        tl.store(grad_v + place * channels + e, grad.to(grad_v.dtype.element_ty), mask=inside)
    tl.store(sums_weight + program * channels + e, sum_weight, mask=inside)
    tl.store(sums_bias + program * channels + e, sum_bias, mask=inside)


@triton.jit
def _weight_backward(
    grad_weight, grad_bias, grad, grad_batch, grad_token, u, u_batch, u_token,
    v, v_batch, v_token, mean, rstd, norm_weight, norm_bias,
    batch, heads, written, read, share,
    CAUSAL: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(written, ROWS), tl.cdiv(read, COLUMNS)
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = program // column_tiles % row_tiles
    head = program // (column_tiles * row_tiles)
    m = row_tile * ROWS + tl.arange(0, ROWS)
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    stop = batch
    if CAUSAL:
        # Nothing is summed up above the diagonal; zeros are stored there.
        stop = tl.where(column_tile * COLUMNS < (row_tile + 1) * ROWS, batch, 0)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total_bias = tl.zeros((ROWS,), dtype=tl.float32)
    for sample in range(tl.program_id(1), stop, tl.num_programs(1)):
        b = tl.cast(sample, tl.int64)
        for start in range(0, share, DEPTH):
            p = start + tl.arange(0, DEPTH)
            inside_e = p < share
            e = head * share + p
            norm_weight_E = tl.load(norm_weight + e, mask=inside_e, other=0.0).to(tl.float32)
            norm_bias_E = tl.load(norm_bias + e, mask=inside_e, other=0.0).to(tl.float32)
            z = _read_normalized(
                v + b * v_batch, v_token, mean + b * read, rstd + b * read, n, read, e, inside_e,
                norm_weight_E, norm_bias_E,
            )  # fmt: skip
            g = _read_gated(grad + b * grad_batch, grad_token, u + b * u_batch, u_token, m, written, e, inside_e)
            total = tl.dot(g.to(FACTOR), tl.trans(z.to(FACTOR)), total, input_precision=PRECISION)
            total_bias += tl.sum(g, axis=1)
    if CAUSAL:
        total = tl.where(n[None, :] <= m[:, None], total, 0.0)
    inside_m = m < written
    part = (tl.program_id(1) * heads + head).to(tl.int64)
    inside = inside_m[:, None] & (n < read)[None, :]
    tl.store(grad_weight + part * written * read + m[:, None] * read + n[None, :], total, mask=inside)
    if column_tile == 0:
        tl.store(grad_bias + part * written + m, total_bias, mask=inside_m)
