"""What trainers wrap around weights, taken off: the state dict of a known layout, and whatever lies beside it.

Weights are found by what they are, not by where they lie: in any dictionary of the file, and under any prefix that a
larger module gave their names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allmlp.checkpoints.layout import Layout, Tensors
from allmlp.errors import UserError, shown

# What wrapping modules put into names, anywhere: torch.compile, activation checkpointing, FSDP, DeepSpeed.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.", re.ASCII
)
# Which of several sets of weights is meant: an average of them, which is what the trainer evaluated, else the first of
# the usual names.
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])|(?<![A-Z])EMA(?![A-Z])|[Aa]verag")
_USUAL = (
    "state_dict",
    "model",
    "module",
    "net",
    "model_state_dict",
    "model_state",
    "params",
    "weights",
)
# Dictionaries lie in dictionaries, modules in modules; deeper ones are made up.
_DEEPEST = 8


@dataclass(frozen=True, kw_only=True)
class Unwrapped:
    """Weights without their wrapping.

    Attributes:
        layout: whose they are.
        tensors: the state dict.
        beside: what the file holds beside it, such as the trainer's configuration.
        notes: what was chosen and what was left out, a sentence each.
    """

    layout: Layout
    tensors: Tensors
    beside: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Weights of a known layout: the keys of the dictionaries around them, and the prefix of their names."""

    keys: tuple[Any, ...]
    prefix: str
    layout: Layout
    tensors: Tensors

    @property
    def place(self) -> tuple[str, ...]:
        return (*map(str, self.keys), *_modules(self.prefix))

    @property
    def name(self) -> str:
        return shown(".".join(self.place))

    @property
    def averaged(self) -> bool:
        return any(map(_AVERAGED.search, self.place))

    @property
    def order(self) -> tuple[Any, ...]:
        return not self.averaged, *(_USUAL.index(name) if name in _USUAL else len(_USUAL) for name in self.place)


def unwrap(contents: Mapping[str, Any], layouts: Sequence[Layout]) -> Unwrapped:
    """Find the weights in what a checkpoint file holds.

    Args:
        contents: as `read_checkpoint` gives them.
        layouts: those that are known.

    Raises:
        UserError: if there are no weights of these layouts in it, or several sets of them, none by a usual name.
    """
    found: list[_Found] = []
    most: Tensors = {}
    for keys, tensors in _state_dicts(contents):
        found += [
            _Found(keys=keys, prefix=prefix, layout=layout, tensors=part)
            for prefix, layout, part in _parts(tensors, layouts)
        ]
        most = max(most, tensors, key=len)
    if not most:
        raise UserError(f"It holds no weights, only {_named(contents)}.")
    if not found:
        sources = ", ".join(dict.fromkeys(layout.source for layout in layouts))
        raise UserError(f"No known project saves weights of these names: {_named(most)}. Known are {sources}.")
    best, *others = sorted(found, key=lambda each: each.order)
    if others and others[0].order == best.order:
        names = ", ".join(each.name for each in found)
        raise UserError(f"It holds several sets of weights: {names}. Save the one that you mean alone.")
    beside, around = _around(contents, best)
    notes = []
    if others:
        kind = "averaged weights" if best.averaged else "weights"
        notes.append(f"The {kind} under {best.name} are taken, not {', '.join(each.name for each in others)}.")
    elsewhere = {str(key) for each in others for key in each.keys}
    without = [name for name in around if name not in {".".join(_modules(each.prefix)) for each in others}]
    if without:
        notes.append(f"The part {best.name} is taken, without {_named(without)}.")
    rest = [name for name in beside if name not in elsewhere]
    if rest:
        notes.append(f"Left aside: {_named(rest)}.")
    return Unwrapped(layout=best.layout, tensors=best.tensors, beside=beside, notes=tuple(notes))


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors are plain weights.

    Raises:
        UserError: if one is not dense, not floating point, has no numbers or fewer than its shape says.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            kind = "no data" if tensor.is_meta else f"{tensor.dtype} in layout {tensor.layout}"
            raise UserError(f"The weight '{name}' has {kind}; weights are dense and floating point.")
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise UserError(f"The weight '{name}' has shape {list(tensor.shape)}, which is none of a weight.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"The weight '{name}' claims shape {list(tensor.shape)}, the file holds less.")


def _state_dicts(contents: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Tensors]]:
    """The tensors that may be weights of every dictionary in the file, each once, by the keys that lead to it."""
    left: list[tuple[tuple[Any, ...], Mapping[Any, Any]]] = [((), contents)]
    seen: set[int] = set()
    for keys, mapping in left:
        if id(mapping) in seen or len(keys) > _DEEPEST:
            continue
        seen.add(id(mapping))
        left += [((*keys, key), value) for key, value in mapping.items() if isinstance(value, Mapping)]
        tensors: Tensors = {}
        for name, value in mapping.items():
            if _may_be_weight(name, value):
                plain = _WRAPPERS.sub("", name)
                if plain in tensors:
                    raise UserError(f"The weight '{plain}' is there twice, by the names of different wrapping modules.")
                tensors[plain] = value
        if tensors:
            yield keys, tensors


def _may_be_weight(name: Any, value: Any) -> bool:
    # Single numbers are counters and the like.
    return isinstance(name, str) and isinstance(value, Tensor) and value.dim() > 0


def _parts(tensors: Tensors, layouts: Sequence[Layout]) -> Iterator[tuple[str, Layout, Tensors]]:
    """The outermost modules that are models of a known layout: prefix, layout, tensors without the prefix."""
    left = [("", tensors)]
    for depth in range(_DEEPEST):
        inner: dict[str, Tensors] = {}
        for prefix, part in left:
            layout = next((layout for layout in layouts if layout.recognises(part)), None)
            if layout:
                yield prefix, layout, part
            elif depth < _DEEPEST - 1:
                for name, tensor in part.items():
                    module = re.match(r"[^./]*[./]", name)
                    if module:
                        inner.setdefault(prefix + module[0], {})[name[module.end() :]] = tensor
        left = list(inner.items())


def _around(contents: Mapping[str, Any], found: _Found) -> tuple[dict[str, Any], list[str]]:
    """What the dictionaries around weights hold beside them; and the modules beside them in their own."""
    beside: dict[str, Any] = {}
    for key in found.keys:
        beside = {**{name: value for name, value in contents.items() if name != key}, **beside}
        contents = contents[key]
    modules: dict[str, None] = {}
    for name, value in contents.items():
        if not _may_be_weight(name, value):
            beside[name] = value
        elif not _WRAPPERS.sub("", name).startswith(found.prefix):
            inside = _modules(_WRAPPERS.sub("", name)) or [name]
            modules[".".join(inside[: len(_modules(found.prefix))])] = None
    return beside, list(modules)


def _modules(name: str) -> list[str]:
    """The modules, from the outermost on, that a weight's name says it lies in."""
    return re.split(r"[./]", name)[:-1]


def _named(names: Any, most: int = 12) -> str:
    some = [shown(name) for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(some) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
