"""Every all-MLP architecture: vision models are timm models, language models are transformers models.

Importing this package registers them with timm when that is imported, with transformers when its Auto classes are.
"""

from importlib import import_module
from typing import Any

from allmlp._version import __version__
from allmlp.deferred import import_after

# What is not needed to build a model is imported when it is first asked for.
_LAZY = {
    "convert": "allmlp.checkpoints",
    "load": "allmlp.checkpoints",
    "optimize": "allmlp.deploy",
    "GMLPConfig": "allmlp.language",
    "GMLPModel": "allmlp.language",
    "GMLPForCausalLM": "allmlp.language",
    "GMLPForMaskedLM": "allmlp.language",
    "GMLPForSequenceClassification": "allmlp.language",
    "GMLPForTokenClassification": "allmlp.language",
    "GMLPForQuestionAnswering": "allmlp.language",
}
# Likewise, as attributes: `allmlp.ops.set_fused`.
_ROOMS = ("benchmark", "checkpoints", "data", "deploy", "language", "layers", "ops", "training", "vision")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Neither library is loaded before somebody needs it: `allmlp --help` answers at once, and those who only see need not
# wait a second for what the language models are made of.
import_after("timm.models", "allmlp.vision")
import_after("transformers.models.auto.configuration_auto", "allmlp.language")

__all__ = ["__version__", *_LAZY]
