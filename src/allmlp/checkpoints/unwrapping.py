"""What trainers wrap around weights, taken off: the state dict and whatever lies beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from allmlp.errors import UserError, shown

# Where trainers put weights, best first: an average of the weights is what the trainer evaluated.
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_HOLDERS = (*_AVERAGED, "state_dict", "model", "module", "net")
# What wrapping modules put in front of every name: DataParallel, g-mlp-pytorch's autoregressive wrapper, torch.compile.
_PREFIXES = ("module.", "net.", "_orig_mod.", "model.")
# mmdetection's and mmsegmentation's models, of which the backbone is a part.
_BACKBONE = "backbone."


@dataclass(frozen=True, kw_only=True)
class Unwrapped:
    """Weights without their wrapping.

    Attributes:
        tensors: The state dict.
        beside: What the file holds beside it, such as the trainer's configuration.
        notes: What was chosen and what was left out, a sentence each.
    """

    tensors: dict[str, Tensor]
    beside: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def unwrap(contents: Mapping[str, Any]) -> Unwrapped:
    """Finds the state dict in what a checkpoint file holds.

    Args:
        contents: As `read_checkpoint` gives them.

    Raises:
        UserError: There are no weights in it.
    """
    beside: dict[str, Any] = {}
    notes = []
    seen: list[Mapping[str, Any]] = []
    while holder := next((name for name in _HOLDERS if _holds_tensors(contents.get(name))), None):
        others = [name for name in _HOLDERS if name != holder and _holds_tensors(contents.get(name))]
        if holder in _AVERAGED and others:
            notes.append(f"The averaged weights ('{holder}') are taken, not '{others[0]}'.")
        beside = {**{name: value for name, value in contents.items() if name not in (holder, *others)}, **beside}
        seen.append(contents)
        contents = contents[holder]
        if any(contents is outer for outer in seen):
            raise UserError(f"It holds itself under {shown(holder)}.")
    tensors = {name: value for name, value in contents.items() if isinstance(value, Tensor)}
    beside.update({name: value for name, value in contents.items() if name not in tensors})
    # the counter of torch.optim.swa_utils.AveragedModel
    if tensors.pop("n_averaged", None) is not None:
        beside["n_averaged"] = None
    if not tensors:
        raise UserError(f"It holds no weights, only {_named(contents)}.")
    backbone = {name: tensor for name, tensor in tensors.items() if str(name).startswith(_BACKBONE)}
    if 0 < len(backbone) < len(tensors):
        others = dict.fromkeys(str(name).split(".")[0] for name in tensors if name not in backbone)
        notes.append(f"The backbone is taken, without {_named(others)}.")
    if backbone:
        tensors = {name.removeprefix(_BACKBONE): tensor for name, tensor in backbone.items()}
    if beside:
        notes.append(f"Left aside, since it is no weights: {_named(beside)}.")
    return Unwrapped(tensors=tensors, beside=beside, notes=notes)


def strip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors without one prefix that a wrapping module gave all of them; None if there is none."""
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return None


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Does nothing where all tensors are plain weights.

    Raises:
        UserError: One is not named, not dense, not floating point, has no numbers or fewer than its shape says.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise UserError(f"A weight is named {name!r}, which is no text.")
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            kind = "no data" if tensor.is_meta else f"{tensor.dtype} in layout {tensor.layout}"
            raise UserError(f"The weight '{name}' has {kind}; weights are dense and floating point.")
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise UserError(f"The weight '{name}' has shape {list(tensor.shape)}, which is none of a weight.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"The weight '{name}' claims shape {list(tensor.shape)}, the file holds less.")


def _named(contents: Mapping[str, Any], most: int = 12) -> str:
    names = [shown(name) for name, _ in zip(contents, range(most), strict=False)]
    return ", ".join(names) + (f" and {len(contents) - most} more" if len(contents) > most else "") or "nothing"


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        _holds_tensors(value.get(name), depth - 1) for name in _HOLDERS
    )
