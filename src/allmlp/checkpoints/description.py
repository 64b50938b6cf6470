"""What a run directory's `config.json` may say, checked before anything is built: it may come from strangers."""

import contextlib
import inspect
import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg
from torch.nn.modules.module import register_module_parameter_registration_hook

from allmlp.errors import UserError, shown

CONFIG_BYTES = 2**24
"""A larger `config.json` is refused."""
_LARGEST_SIDE = 8192
_LARGEST_NUMBER = 2**20
# What timm's factory does with a model beside building it: loading other files, downloading.
_OF_THE_FACTORY = {"num_classes", "device", "dtype"}.union(
    *(inspect.signature(function).parameters for function in (timm.create_model, build_model_with_cfg))
)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
_CROP_MODES = ("center", "squash", "border")


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        UserError: if it is too large, no JSON, or does not say what kind of model it describes.
    """
    if path.stat().st_size > CONFIG_BYTES:
        raise UserError(f"{path} is no configuration: it has more than {CONFIG_BYTES:,} bytes.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    # Brackets without end nest too deep for the parser.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} does not say what kind of model it describes (model_type).")
    _require(path, "architectures", config.get("architectures"), _is_none_or(_is_texts), "a list of names")
    return config


def check_model_args(model_args: Mapping[str, Any]) -> None:
    """Check that these are arguments of an architecture alone.

    Raises:
        UserError: if one would have timm do something else, such as load a file; or is larger than any model's.
    """
    for name, value in model_args.items():
        if not isinstance(name, str) or name in _OF_THE_FACTORY:
            raise UserError(f"{shown(name)} is no argument of an architecture that can be set.")
        if not _is_moderate(value):
            raise UserError(f"{name} is {shown(value)}; numbers may be {_LARGEST_NUMBER:,} at most.")


def check_classifier(config: Mapping[str, Any], path: Path) -> None:
    """Check that this describes an image classifier and how images are prepared for it.

    Raises:
        UserError: if it does not; the message names the entry.
    """
    _require(path, "architecture", config.get("architecture"), lambda v: isinstance(v, str), "a model's name")
    classes = config.get("num_classes")
    _require(path, "num_classes", classes, _is_count, f"a whole number from 0 to {_LARGEST_NUMBER}")
    names = config.get("label_names")
    _require(path, "label_names", names or None, _is_none_or(_is_texts), "a list of names")
    if names and len(names) != classes:
        raise UserError(f"{path}: there are {len(names)} label_names for {classes} classes.")
    _require(path, "model_args", config.get("model_args"), _is_none_or(_is_mapping), "arguments by name")
    cfg = config.get("pretrained_cfg")
    _require(path, "pretrained_cfg", cfg, _is_mapping, "settings by name")
    assert isinstance(cfg, Mapping)
    size: Any = cfg.get("input_size")
    _require(path, "input_size", size, _is_input_size, f"[channels, height, width], each from 1 to {_LARGEST_SIDE}")
    for name in ("mean", "std"):
        value: Any = cfg.get(name)
        _require(path, name, value, _is_numbers, "a list of numbers")
        if len(value) != size[0]:
            raise UserError(f"{path}: {name} has {len(value)} numbers for {size[0]} channels.")
    if not all(cfg["std"]):
        raise UserError(f"{path}: std is {shown(cfg['std'])}; it divides the pixels and cannot be 0.")
    _require(path, "crop_pct", cfg.get("crop_pct"), _is_none_or(_is_crop), "a share from 0.1 to 1")
    for name, allowed in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        value = cfg.get(name)
        _require(path, name, value, lambda v, a=allowed: v in (None, *a), f"one of {', '.join(allowed)}")


def check_language(config: Mapping[str, Any], path: Path) -> None:
    """Check that the classes that this names are numbered one by one.

    Raises:
        UserError: if they are not.
    """
    _require(path, "id2label", config.get("id2label"), _is_none_or(_is_numbered), "names by number, from 0 on")


@contextlib.contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Inside, this thread may build modules with so many parameters: a file may ask for any number of layers.

    Raises:
        UserError: if there are more.
    """
    count, thread = 0, threading.get_ident()

    def register(module: Any, name: str, parameter: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > parameters:
            raise UserError(f"it would have more than {parameters:,} weights")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _require(path: Path, name: str, value: Any, holds: Any, what: str) -> None:
    if not holds(value):
        raise UserError(f"{path}: {name} is {shown(value)}; it must be {what}.")


def _is_none_or(holds: Any) -> Any:
    return lambda value: value is None or holds(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_NUMBER


def _is_input_size(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    return all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        type(item) in (int, float) and math.isfinite(item) for item in value
    )


def _is_crop(value: Any) -> bool:
    return type(value) in (int, float) and 0.1 <= value <= 1


def _is_numbered(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value.values()):
        return False
    return {str(key) for key in value} == {str(number) for number in range(len(value))}


def _is_moderate(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_moderate(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_moderate(item) for item in value)
    return not isinstance(value, (int, float)) or abs(value) <= _LARGEST_NUMBER
