"""What a model is given: token ids, masks in transformers' forms, and the order of tokens that makes padding harmless.

The spatial weight has a row for each absolute position, so a batch is computed as if every row began at its first real
token: its tokens are moved to the front, and the results back to where they belong.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from allmlp.errors import UserError


def left_alignment(
    real: Bool[Tensor, "batch tokens"],
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """The order that puts each row's real tokens in front of its padding, and the order that undoes it."""
    # Counted, not sorted: exporters to ONNX know no stable sort. In numbers: OpenVINO adds booleans up to true.
    counted = real.long().cumsum(1)
    undo = torch.where(real, counted, counted[:, -1:] + (~real).long().cumsum(1)) - 1
    return undo.argsort(dim=1), undo


def reordered(
    x: Float[Tensor, "batch tokens channels"], order: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens channels"]:
    """Each row's tokens in another order; it may lie on another device than they."""
    return x.gather(1, order.to(x.device).unsqueeze(-1).expand_as(x))


def reordered_mask(
    mask: Bool[Tensor, "*rows tokens tokens"], order: Int[Tensor, "batch tokens"]
) -> Bool[Tensor, "batch tokens tokens"]:
    """A visibility mask for tokens in another order."""
    mask = mask.expand(*order.shape, order.shape[1])
    mask = mask.gather(1, order.unsqueeze(-1).expand_as(mask))
    return mask.gather(2, order.unsqueeze(1).expand_as(mask))


def read_masks(
    attention_mask: Tensor | None,
    visibility_mask: Tensor | None,
    x: Float[Tensor, "batch tokens channels"],
    start: int,
) -> tuple[Bool[Tensor, "batch tokens"] | None, Bool[Tensor, "*rows tokens tokens"] | None]:
    """Sort out what the caller masks.

    Args:
        attention_mask: 1 for tokens and 0 for padding, [batch, start + tokens] (the earlier tokens' part is ignored);
            or, as in transformers, a visibility mask of shape [batch, tokens, tokens] or [batch, 1, tokens, tokens].
        visibility_mask: which token reads which, [tokens, tokens] or [batch, tokens, tokens].
        x: the new tokens.
        start: tokens in the cache.

    Returns:
        Where the new tokens are real (None: all), and the visibility mask (None: the model's own), on their device.

    Raises:
        UserError: if a mask has another shape, or is made of floating point numbers where 0 would be ambiguous.
    """
    batch, tokens = x.shape[:2]
    if attention_mask is not None and attention_mask.dim() > 2:
        if visibility_mask is not None:
            raise UserError("give one visibility mask, as visibility_mask or as an attention_mask of 3 or 4 axes")
        visibility_mask = attention_mask.squeeze(1) if attention_mask.dim() == 4 else attention_mask
        attention_mask = None
    if attention_mask is not None:
        if attention_mask.shape != (batch, start + tokens):
            raise UserError(
                f"attention_mask must be of shape [{batch}, {start + tokens}] (cached and new tokens), got "
                f"{list(attention_mask.shape)}; who reads whom, [{tokens}, {tokens}], goes to visibility_mask"
            )
        attention_mask = attention_mask[:, start:].to(x.device, torch.bool)
    if visibility_mask is not None:
        if start:
            raise UserError("a visibility mask belongs to the first tokens: later ones read all that came before")
        if visibility_mask.is_floating_point():
            raise UserError(f"a visibility mask must be boolean (true: reads), got {visibility_mask.dtype}")
        if tuple(visibility_mask.shape) not in ((tokens, tokens), (1, tokens, tokens), (batch, tokens, tokens)):
            raise UserError(
                f"a visibility mask must be of shape [{tokens}, {tokens}] or [{batch}, {tokens}, {tokens}], "
                f"got {list(visibility_mask.shape)}"
            )
        visibility_mask = visibility_mask.to(x.device, torch.bool)
    return attention_mask, visibility_mask


def refuse_packing(position_ids: Int[Tensor, "#batch tokens"] | None, attention_mask: Tensor | None) -> None:
    """Refuse positions that the model, which counts tokens itself, would not give them.

    Compiled and traced models do not look, whose graphs cannot depend on numbers: there packed texts read each other.

    Args:
        position_ids: what the caller counted.
        attention_mask: 0 where there is padding, whose positions say nothing.

    Raises:
        UserError: if they begin anew within a row, as they do where several texts are packed into one.
    """
    if position_ids is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    jumps = position_ids.diff(dim=-1) != 1
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -position_ids.shape[-1] :].bool()
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if bool(jumps.any()):
        raise UserError(
            "position_ids must go up by one: the model counts tokens itself, and the texts of a packed row "
            "(DataCollatorWithFlattening) would read each other; pad a batch of texts instead (DataCollatorWithPadding)"
        )


def check_token_ids(input_ids: Int[Tensor, "batch tokens"], vocab_size: int) -> None:
    """Refuse what the embedding has no row for.

    Raises:
        UserError: if an id lies outside the vocabulary.
    """
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"token ids must lie between 0 and {vocab_size - 1}, got {low if low < 0 else high}; does the tokenizer "
            "belong to this model?"
        )
