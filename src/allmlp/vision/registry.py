"""Registration of a family's variants as timm models."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any, get_type_hints

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module

from allmlp.errors import shown
from allmlp.layers import (
    AxialShift,
    PatchDownsampling,
    PatchEmbedding,
    PatchMerging,
    PermuteMLP,
    SpatialGatingUnit,
    SpatialShift,
    SplitAttention,
    TokenLinear,
    WeightedPermuteMLP,
)
from allmlp.layers.patch_embedding import is_whole, pair
from allmlp.vision.base import VisionMLP
from allmlp.vision.features import LEVELS, NormalisedFeatureNet, SimpleFeaturePyramidNet

# These decide by shapes or run a custom gradient, which symbolic tracing (torch.fx) cannot follow: it calls them whole.
for _module in (
    AxialShift,
    PatchDownsampling,
    PatchEmbedding,
    PatchMerging,
    PermuteMLP,
    SpatialGatingUnit,
    SpatialShift,
    SplitAttention,
    TokenLinear,
    WeightedPermuteMLP,
):
    register_notrace_module(_module)

Variants = Mapping[str, Mapping[str, Any]]


def register_family(
    model_class: type[VisionMLP],
    variants: Variants,
    *,
    fixed_input_size: bool,
    default_levels: int | Callable[[Mapping[str, Any]], tuple[int, ...]],
    halvings: Callable[[Mapping[str, Any]], int] = lambda arguments: 0,
    crop_pct: Mapping[str, float] | None = None,
) -> None:
    """Make every variant of a family a timm model.

    A variant's name ends in its image size in pixels: 32 stands for CIFAR-10 with ten classes, others for ImageNet-1k.

    Args:
        model_class: the family's model; its module becomes timm's module of these models.
        variants: arguments of `model_class` by model name.
        fixed_input_size: whether weights are tied to one image size.
        default_levels: the feature levels of `features_only=True`: the last n, or a function of a variant's arguments.
        halvings: how often a variant halves its map behind the patch embedding.
        crop_pct: share of the resized image that evaluation crops, where it is not 0.875.
    """
    module = sys.modules[model_class.__module__]
    cfgs: dict[str, Any] = {}
    for name, arguments in variants.items():
        size = int(name.rsplit("_", 1)[1])
        reduction = arguments["patch_size"] * 2 ** halvings(arguments)
        cfgs[name] = {
            "url": "",
            "num_classes": 10 if size == 32 else 1000,
            "input_size": (3, size, size),
            "pool_size": (-(-size // reduction), -(-size // reduction)),
            "fixed_input_size": fixed_input_size,
            "crop_pct": 1.0 if size == 32 else (crop_pct or {}).get(name, 0.875),
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.proj",
            "classifier": "head",
        }
    vars(module)["default_cfgs"] = generate_default_cfgs(cfgs)
    for name, arguments in variants.items():
        register_model(_entry_point(model_class, name, arguments, default_levels))


def _entry_point(
    model_class: type[VisionMLP],
    name: str,
    variant: Mapping[str, Any],
    default_levels: int | Callable[[Mapping[str, Any]], tuple[int, ...]],
) -> Callable[..., VisionMLP]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> VisionMLP:
        _check_arguments(model_class, kwargs)
        # Of timm's own models these two are the constructor's; made on the device, a large one is nowhere else first.
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        if kwargs.get("img_size") is not None:
            kwargs["img_size"] = pair(kwargs["img_size"], "img_size")
            # What prepares images for the model reads their size here.
            overlay = {
                "input_size": (3, *kwargs["img_size"]),
                **(kwargs.pop("pretrained_cfg_overlay", None) or {}),
            }
            kwargs["pretrained_cfg_overlay"] = overlay
        levels = default_levels if isinstance(default_levels, int) else default_levels({**variant, **kwargs})
        features = _features(levels, kwargs)
        with nullcontext() if device is None else torch.device(device):
            model = build_model_with_cfg(model_class, name, pretrained, feature_cfg=features, **{**variant, **kwargs})
        model.to(dtype=dtype)
        if kwargs.get("img_size") is not None:
            # Only a finished model knows by how much it divides an image, and which is too small.
            next(m for m in model.modules() if isinstance(m, PatchEmbedding)).set_input_size(kwargs["img_size"])
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = model_class.__module__
    entry_point.__doc__ = (
        f"{model_class.__name__} with {', '.join(f'{key}={value}' for key, value in variant.items())}."
    )
    return entry_point


def _check_arguments(model_class: type[VisionMLP], given: Mapping[str, Any]) -> None:
    """Names an argument that torch would stumble over somewhere in the model, and what it may be."""
    hints = get_type_hints(model_class.__init__)
    for name, value in given.items():
        allowed = _allowed(name, hints.get(name), value)
        if allowed:
            raise ValueError(f"{name} must be {allowed}, got {shown(value)}")


def _allowed(name: str, hint: Any, value: Any) -> str | None:
    """What an argument may be, where the value is not that."""
    if hint is int:
        least = 0 if name in ("num_classes", "attention_size") else 1
        return None if is_whole(value, least) else f"a whole number from {least} on"
    if hint is float:
        if name.endswith("_rate"):
            return None if _is_number(value) and 0 <= value <= 1 else "a number from 0 to 1"
        return None if _is_number(value) and value >= 0 else "a number from 0 on"
    if hint == tuple[int, ...]:
        fits = _are_whole(value, 1) and (value or name == "downsample_after")
        return None if fits else "whole numbers from 1 on, such as (2, 2, 6, 2)"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_whole(value: Any, least: int) -> bool:
    return isinstance(value, Sequence) and all(is_whole(number, least) for number in value)


def _features(levels: int | tuple[int, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `features_only=True` returns, in timm's terms; takes the arguments that say so out of `kwargs`."""
    given = {name: kwargs.pop(name) for name in ("feature_norms", "pyramid_channels") if name in kwargs}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if len(given) > bool(kwargs.get("features_only")):
        raise ValueError(f"{' and '.join(given)}: one of them at a time, and with features_only=True")
    if "feature_norms" in given:
        return {"out_indices": levels, "feature_cls": NormalisedFeatureNet, "output_fmt": "NCHW"}
    if "pyramid_channels" in given:
        return {"out_indices": LEVELS, "feature_cls": SimpleFeaturePyramidNet, "output_fmt": "NCHW", **given}
    return {"out_indices": levels, "feature_cls": "getter"}
