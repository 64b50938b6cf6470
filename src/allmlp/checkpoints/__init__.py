"""Weights in and out: run directories, public checkpoints, timm's pretrained models."""

from importlib import import_module
from typing import Any

# Converters import every family; a run directory alone needs none.
_LAZY = {
    "MissingFacts": "allmlp.checkpoints.conversion",
    "convert": "allmlp.checkpoints.conversion",
    "export_state_dict": "allmlp.checkpoints.conversion",
    "from_timm": "allmlp.checkpoints.pretrained",
    "load": "allmlp.checkpoints.run_directory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = list(_LAZY)
