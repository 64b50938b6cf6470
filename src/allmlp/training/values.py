"""From YAML, the command line or Python to the value that a recipe's field holds."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from allmlp.errors import UserError, shown


def coerce(field: dataclasses.Field[Any], value: Any, hint: Any) -> Any:
    """The value as a recipe's field holds it.

    Args:
        field: the field; of its metadata the `choices` count.
        value: what was given: of YAML, text of the command line, or Python's.
        hint: the field's type, or a union of types, of which the first that fits is taken.

    Raises:
        UserError: if it is of no such type, or none of the choices.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if field.metadata["choices"] and value not in field.metadata["choices"]:
        raise UserError(f"{field.name} is {shown(value)}; it must be one of {', '.join(field.metadata['choices'])}.")
    for wanted in options:
        try:
            return _CONVERSIONS[typing.get_origin(wanted) or wanted](value)
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    wanted = " or ".join(_NAMES.get(typing.get_origin(option) or option, "nothing") for option in options)
    raise UserError(f"{field.name} is {shown(value)}; it must be {wanted}.")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-5 is a number, as it is in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads back: text that looks like its numbers stands in quotes."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Plain data written in YAML, every value in its place: values that refer to others may mean any amount of them.

    Raises:
        ValueError: if it is no YAML, or holds an alias; the message says where.
    """
    try:
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1  # pyrefly: ignore[missing-attribute] (events that are parsed have marks)
                raise ValueError(f"'*{event.anchor}' in line {line} refers to another value")
        return _Loader(text).get_single_data()
    # yaml's own constructors of numbers and dates raise whatever they run into.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def to_yaml(content: Any) -> str:
    """Plain data as YAML that `parse_yaml` gives back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    number = int(value)
    # Nothing counts further.
    if abs(number) >= 2**63:
        raise ValueError
    return number


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError


def _to_str(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    raise ValueError


def _to_pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, (str, list, tuple)):
        raise ValueError
    first, second = value.lower().split("x") if isinstance(value, str) else value
    return _to_int(first), _to_int(second)


def _to_mapping(value: Any) -> dict[str, Any]:
    parsed = parse_yaml(value) if isinstance(value, str) else value
    if not isinstance(parsed, Mapping):
        raise ValueError
    return dict(parsed)


_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_str,
    tuple: _to_pair,
    dict: _to_mapping,
}
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "HEIGHTxWIDTH",
    dict: "a YAML mapping such as '{patch_size: 2}'",
}
