"""Models of timm by their names."""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import timm

from allmlp.checkpoints import description
from allmlp.errors import UserError, nearest

TimmModel = Any
"""An `nn.Module` with timm's interface: `pretrained_cfg`, `num_classes`, `no_weight_decay()` and so on."""


def create_model(architecture: str, model_args: Mapping[str, Any], **settings: Any) -> TimmModel:
    """`timm.create_model` with a clear message.

    Args:
        architecture: the model's name.
        model_args: arguments of the architecture; they may come from strangers.
        settings: further arguments of `timm.create_model`.

    Raises:
        UserError: if timm knows no such model (the nearest names are offered), or the model no such argument.
    """
    require_architecture(architecture)
    description.check_model_args(model_args)
    try:
        return timm.create_model(architecture, **settings, **model_args)
    # The arguments drive the constructors of any architecture.
    except Exception as error:
        reason = str(error)
        twice = re.search(r"multiple values for keyword argument '(\w+)'", reason)
        if twice:
            reason = f"{twice[1]} is what its name stands for"
        unknown = re.search(r"(?:(\w+)\.__init__\(\) got an )?unexpected keyword argument '(\w+)'", reason)
        if unknown:
            model_class = vars(sys.modules[timm.model_entrypoint(architecture).__module__]).get(unknown[1])
            known = inspect.signature(model_class).parameters if model_class else ()
            meant = nearest(unknown[2], known)
            reason = f"it has no argument '{unknown[2]}'{'.' if meant else ''}{meant}"
        raise UserError(f"{architecture} cannot be made with these arguments: {reason}") from error


def require_architecture(name: str, also: Iterable[str] = ()) -> None:
    """Check that timm knows a model of this name.

    Args:
        name: what has been asked for.
        also: names to offer beside timm's.

    Raises:
        UserError: if it does not; the nearest names are offered.
    """
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"There is no model '{name}'.{nearest(name, [*also, *timm.list_models()])}")
