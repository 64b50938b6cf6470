"""The type checker of the eager tests: beartype on named tensor axes, nothing else.

Other annotations stay unchecked, so that tests can hand over the bad input that the library answers with its own error.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of `function` that are annotated with jaxtyping."""
    annotations = function.__annotations__
    function.__annotations__ = {name: kind if _names_axes(kind) else Any for name, kind in annotations.items()}
    return beartype(function)


def _names_axes(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(_names_axes(argument) for argument in get_args(annotation))
