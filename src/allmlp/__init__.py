"""Every all-MLP architecture: vision models are timm models, language models are transformers models.

Importing this package registers them with both libraries, with transformers when its Auto classes are imported.
"""

import sys
from importlib import import_module
from pathlib import Path
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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_command_line() -> bool:
    """Whether this process is the `allmlp` command or `python -m allmlp`, for which argv[0] is "-m" at this point."""
    return bool(sys.argv) and (sys.argv[0] == "-m" or Path(sys.argv[0]).stem == "allmlp")


# The command line answers --help before it loads torch; its commands import the rooms they need.
if not _is_command_line():
    import_module("allmlp.vision")
    # What the language models are made of takes a second to load, which those who only see need not wait for.
    import_after("transformers.models.auto.configuration_auto", "allmlp.language")

__all__ = ["__version__", *_LAZY]
