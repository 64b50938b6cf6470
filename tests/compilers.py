"""What the installed torch's compiler can tell of itself."""

from functools import cache

import pytest
import torch


@cache
def _takes_itself_for_an_exporter() -> bool:
    asked = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")
    return bool(asked(torch.zeros(())))


def need_to_know_the_compiler() -> None:
    """Skip where a compiler gets the forms made for exporters, as torch 2.9's does: the same numbers, more slowly."""
    if _takes_itself_for_an_exporter():
        pytest.skip("this torch's compiler takes itself for an exporter")
