"""What a converter finds out about a model: enough to build it anew."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import nn

from allmlp.checkpoints.timm_models import create_model
from allmlp.vision.base import VisionMLP

# The fields of timm's `pretrained_cfg` that say how images are prepared.
PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
# Arguments that no weight's shape or place depends on, and those every variant is asked for.
_UNRELATED = {"drop_rate", "proj_drop_rate", "drop_path_rate", "init_scale", "global_pool"}
_SIZES = {"num_classes", "img_size", "in_chans"}


@dataclass(frozen=True, kw_only=True)
class VisionArchitecture:
    """An image model: `timm.create_model(name, num_classes=num_classes, **model_args)`.

    Attributes:
        name: the registered model.
        num_classes: outputs of the head, 0 for none.
        model_args: further arguments.
        preparation: fields of timm's `pretrained_cfg` that say how images are prepared, where the source knows better
            than the family's default.
        notes: what was left out of the checkpoint and why, a sentence each.
    """

    name: str
    num_classes: int
    model_args: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The model with fresh weights."""
        return create_model(
            self.name, self.model_args, num_classes=self.num_classes, pretrained_cfg_overlay=dict(self.preparation)
        )


@dataclass(frozen=True, kw_only=True)
class LanguageArchitecture:
    """A language model.

    Attributes:
        name: a class of `allmlp.language`.
        config: fields of `GMLPConfig`.
        notes: what was left out of the checkpoint and why, a sentence each.
    """

    name: str
    config: dict[str, Any]
    notes: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The model with fresh weights."""
        from allmlp import language

        return getattr(language, self.name)(language.GMLPConfig(**self.config))


Architecture = VisionArchitecture | LanguageArchitecture


def vision_architecture(
    model_class: type[VisionMLP],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    num_classes: int,
    img_size: int | tuple[int, int],
    in_chans: int,
    preparation: Mapping[str, Any] | None = None,
    **structure: Any,
) -> VisionArchitecture:
    """The registered model that an image model's arguments name.

    A variant of exactly this structure is taken with the sizes that differ from its own; where there is none, the
    variant that has most in common, with every argument spelt out.

    Args:
        model_class: the family.
        variants: its named sizes.
        num_classes: outputs of the head.
        img_size: image size in pixels.
        in_chans: channels of the image.
        preparation: as in `VisionArchitecture`.
        structure: every other argument of `model_class` that is not its default.
    """
    preparation = dict(preparation or {})
    if in_chans != 3:
        preparation |= {"input_size": (in_chans, *pair(img_size)), "mean": (0.5,) * in_chans, "std": (0.5,) * in_chans}
    parameters = inspect.signature(model_class).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.name not in _UNRELATED | _SIZES}
    wanted = _plain({**defaults, **structure})
    sizes = _plain({"img_size": img_size, "in_chans": in_chans})

    def shared(name: str) -> int:
        variant = _plain({**defaults, **variants[name]})
        return sum(variant[argument] == value for argument, value in wanted.items())

    name = max(variants, key=shared)
    if shared(name) == len(wanted):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        own = _plain({"img_size": cfg.input_size[1:], "in_chans": cfg.input_size[0]})
        model_args = {argument: size for argument, size in sizes.items() if size != own[argument]}
    else:
        model_args = {**wanted, **sizes}
    return VisionArchitecture(name=name, num_classes=num_classes, model_args=model_args, preparation=preparation)


def for_channels(preparation: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """`mean` and `std` of images with this many channels: where they are of another number, the average for each."""
    statistics = {name: tuple(preparation[name]) for name in ("mean", "std")}
    return {
        name: values if len(values) == channels else (sum(values) / len(values),) * channels
        for name, values in statistics.items()
    }


def ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` that gives a width this hidden width: `int(width · ratio) == hidden`."""
    quotient = hidden / width
    # A quotient rounded down would lose the last unit.
    return quotient if int(width * quotient) == hidden else (hidden + 0.5) / width


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as both."""
    height, width = to_2tuple(value)
    return int(height), int(width)


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back, and square sizes as one number."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    for name in ("patch_size", "img_size"):
        if name in plain and len(set(pair(plain[name]))) == 1:
            plain[name] = pair(plain[name])[0]
    return plain
