"""What the converters share: the description of a checkpoint layout, and the tools to take one apart."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from allmlp.checkpoints.architecture import Architecture
from allmlp.errors import UserError

Tensors = dict[str, Tensor]
Facts = Mapping[str, Any]
# The largest size or number that can be given beside the weights, or lie beside them.
_LARGEST = 8192


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something about a model that its checkpoints do not store.

    Attributes:
        name: what users call it.
        help: what it says, and the values it takes.
        parse: the value from what the user gave; raises ValueError for what is not allowed.
        required: whether it has to be given.
        assumed: what holds where nobody gives it, in words, if that has to be said; `{model}` in them is the model.
    """

    name: str
    help: str
    parse: Callable[[Any], Any]
    required: bool = False
    assumed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which one project saves one kind of model.

    Attributes:
        source: the project.
        family: what it saves.
        recognises: whether tensors are of this layout, by their names (and shapes).
        convert: from tensors and facts to the architecture and the tensors under this library's names, which may differ
            from the model's in dimensions of size one.
        inferred: what `convert` infers, for the documentation.
        facts: what it has to be told.
        stored: reads facts from what the trainer saves beside the weights.
    """

    source: str
    family: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[[Tensors, Facts], tuple[Architecture, Tensors]]
    inferred: str
    facts: Sequence[Fact] = ()
    stored: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None


def shape(tensors: Mapping[str, Tensor], name: str, *dims: int) -> tuple[int, ...]:
    """A tensor's shape.

    Raises:
        UserError: if it is missing or has another number of dimensions.
    """
    if name not in tensors:
        raise UserError(f"The weight '{name}' is missing.")
    size = tuple(tensors[name].shape)
    if len(size) not in dims:
        wanted = " or ".join(map(str, dims))
        raise UserError(f"The weight '{name}' has shape {list(size)}; it should have {wanted} dimensions.")
    return size


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are under a prefix: `"blocks."` counts `blocks.0.…`, `blocks.1.…`.

    Raises:
        UserError: if some number is left out.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = {match[1] for name in tensors if (match := pattern.match(name))}
    for number in range(len(found)):
        if str(number) not in found:
            raise UserError(f"The weights of '{prefix}{number}' are missing.")
    return len(found)


def rename(tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> Tensors:
    """Every tensor under the new name of its module.

    Args:
        tensors: the tensors, `module.parameter`.
        modules: new names of modules by their old ones; every one of them has to hold tensors.

    Raises:
        UserError: if a tensor belongs to none of the modules, or a module has no tensor.
    """
    renamed, leftover = {}, []
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module in modules:
            renamed[f"{modules[module]}.{parameter}"] = tensor
        else:
            leftover.append(name)
    present = {name.rpartition(".")[0] for name in tensors}
    missing = [module for module in modules if module not in present]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for kind, names in (("not used by the architecture", leftover), ("missing", missing))
        if names
    ]
    if problems:
        raise UserError(f"The weights do not add up. {'; '.join(problems)}.")
    return renamed


def find_head(tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, str]]:
    """The number of classes, and the head's name for `rename`; 0 and no name for a checkpoint without a head."""
    if "head.weight" not in tensors:
        return 0, {}
    return shape(tensors, "head.weight", 2)[0], {"head": "head"}


def numbered(pairs: Mapping[str, str], old: str, new: str) -> dict[str, str]:
    """`pairs` of module names inside a block, with the block's old and new name in front; "" is the block itself."""
    return {f"{old}.{theirs}".rstrip("."): f"{new}.{ours}".rstrip(".") for theirs, ours in pairs.items()}


def square_image(tokens: int, patch_size: tuple[int, int], facts: Facts) -> tuple[int, int]:
    """The image size of a model with so many tokens: what the fact `img_size` says, else a square grid of patches.

    Raises:
        UserError: if the two do not agree, or no square grid has so many tokens.
    """
    size = facts.get("img_size")
    if size is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(
                f"{tokens} tokens are no square grid of patches: give the image size, img_size=[height, width]."
            )
        return side * patch_size[0], side * patch_size[1]
    grid = size[0] // patch_size[0], size[1] // patch_size[1]
    if grid[0] * grid[1] != tokens or (grid[0] * patch_size[0], grid[1] * patch_size[1]) != size:
        raise UserError(
            f"img_size={size} does not fit: the model has {tokens} tokens of {patch_size[0]}×{patch_size[1]} pixels."
        )
    return size


def patch_of(pixels: int, facts: Facts) -> tuple[int, tuple[int, int]]:
    """Channels and patch size of a patch embedding that reads so many numbers a patch."""
    in_chans = facts.get("in_chans", 3)
    side = math.isqrt(pixels // in_chans)
    patch_size = facts.get("patch_size", (side, side))
    if in_chans * patch_size[0] * patch_size[1] != pixels:
        raise UserError(
            f"A patch has {pixels} numbers, not {patch_size[0]}×{patch_size[1]} pixels of {in_chans} channels: "
            "give in_chans=… or patch_size=[height, width]."
        )
    return in_chans, patch_size


def parse_flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def parse_size(value: Any) -> tuple[int, int]:
    """A size in pixels: one number, or height and width, which may be written 192x256."""
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() and len(part) < 9 else 0 for part in value.split("x")]
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if len(numbers) not in (1, 2) or any(type(number) is not int or not 1 <= number <= _LARGEST for number in numbers):
        raise ValueError(f"one number of pixels from 1 to {_LARGEST}, or [height, width]")
    return numbers[0], numbers[-1]


def parse_count(value: Any) -> int:
    """A number of something, at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise ValueError(f"a whole number from 0 to {_LARGEST}")
    return value


def parse_channels(value: Any) -> int:
    """A number of channels, at least 1."""
    if parse_count(value) < 1:
        raise ValueError(f"a whole number from 1 to {_LARGEST}")
    return value


CAUSAL = Fact(name="causal", help="whether a token reads earlier tokens only, true or false", parse=parse_flag)
SQUARE_IMG_SIZE = Fact(
    name="img_size",
    help="image size in pixels, [height, width], where it is not square",
    parse=parse_size,
    assumed="{model.stem.img_size[0]}×{model.stem.img_size[1]} pixels",
)
IMAGE_FACTS = (
    SQUARE_IMG_SIZE,
    Fact(
        name="patch_size",
        help="patch size in pixels, [height, width], where it is not square",
        parse=parse_size,
        assumed="{model.stem.patch_size[0]}×{model.stem.patch_size[1]} pixels",
    ),
    Fact(
        name="in_chans",
        help="channels of the image, where they are not 3",
        parse=parse_channels,
        assumed="3",
    ),
)
