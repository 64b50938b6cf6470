"""The type checker of the eager tests: beartype on named tensor axes, nothing else.

Other annotations stay unchecked, so that tests can hand over the bad input that the library answers with its own error.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, config

CHECKS = 1_000
"""How many a test makes. Loops of many steps then go on without: checks take longer than small steps."""
_made = 0


def check_anew() -> None:
    """Begin to count again."""
    global _made
    _made = 0
    config.update("jaxtyping_disable", False)


def check_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of `function` that are annotated with jaxtyping."""
    annotations = function.__annotations__
    checked = {name: kind if _names_axes(kind) else Any for name, kind in annotations.items()}
    if all(kind is Any for kind in checked.values()):
        return function  # beartype takes a millisecond for each
    function.__annotations__ = checked
    checking = beartype(function)

    @functools.wraps(function)
    def counting(*arguments: Any, **settings: Any) -> Any:
        global _made
        _made += 1
        if _made >= CHECKS:
            config.update("jaxtyping_disable", True)
        return checking(*arguments, **settings)

    return counting


def _names_axes(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(_names_axes(argument) for argument in get_args(annotation))
