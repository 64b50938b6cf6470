"""The small model of each family, which stands for it in the tests."""

from typing import Any

import timm
from torch import nn

import allmlp  # noqa: F401  (registers the models)

NANO = [name for name in timm.list_models("*_nano_patch*_32") if timm.model_entrypoint(name).__module__[:6] == "allmlp"]
# Those that take any image size, and those whose weights are tied to one.
ANY_SIZE = [name for name in NANO if name.startswith(("asmlp", "s2mlp"))]
ONE_SIZE = [name for name in NANO if name not in ANY_SIZE]

_FEWER_BLOCKS = {
    "asmlp": {"depths": (1, 1)},
    "s2mlpv2": {"depths": (1, 1)},
    "vip": {"depths": (1, 1), "embed_dims": (96, 96), "segments": (8, 8)},
}


def shallow_model(name: str, **arguments: Any) -> nn.Module:
    """The model with as few blocks as show each kind of it, in eval mode: for tests whose time grows with depth."""
    blocks = _FEWER_BLOCKS.get(name.split("_")[0], {"num_blocks": 2})
    return timm.create_model(name, **{**blocks, **arguments}).eval()
