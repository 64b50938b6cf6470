"""Weights to start from, by whatever name they go."""

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.architecture import (
    PREPARATION,
    Architecture,
    LanguageArchitecture,
    VisionArchitecture,
    for_channels,
)
from allmlp.checkpoints.conversion import Conversion, MissingFacts, convert_checkpoint, convert_state_dict
from allmlp.checkpoints.timm_models import require_architecture
from allmlp.errors import UserError

TIMM = "timm:"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with weights, and how to build it anew.

    Attributes:
        architecture: what it takes to build it.
        model: the model, in eval mode; an image model's `pretrained_cfg` says how images are prepared for it.
    """

    architecture: Architecture
    model: Any


def find_pretrained(source: str | Path) -> Pretrained:
    """The model of a run directory, of a public checkpoint, or of timm.

    Args:
        source: a run directory, a checkpoint file that stores all that has to be known, or `timm:` and a name of timm.

    Raises:
        UserError: if there is no such thing, or it cannot be used.
    """
    if str(source).startswith(TIMM):
        found = from_timm(str(source).removeprefix(TIMM))
        return Pretrained(architecture=found.architecture, model=found.model)
    if Path(source).is_file():
        try:
            found = convert_checkpoint(source)
        except MissingFacts as error:
            raise UserError(
                f"{source} does not store {' and '.join(error.names)}. Convert it first, by allmlp convert {source} "
                "--output DIR --set …, and start from DIR."
            ) from error
        for note in found.notes:
            _log.warning("%s: %s", source, note)
        return Pretrained(architecture=found.architecture, model=found.model)
    model = run_directory.load(source)
    config = run_directory.read_config(source)
    if config["model_type"] != run_directory.VISION:
        architecture = LanguageArchitecture(name=type(model).__name__, config=model.config.to_diff_dict())
        return Pretrained(architecture=architecture, model=model)
    return Pretrained(
        architecture=VisionArchitecture(
            name=config["architecture"], num_classes=config["num_classes"], model_args=config.get("model_args") or {}
        ),
        model=model,
    )


def from_timm(name: str, **arguments: Any) -> Conversion:
    """timm's own pretrained weights, downloaded and cached by timm and the Hub's client, as a model of this library.

    Args:
        name: a gMLP, Mixer or ResMLP of timm with its tag, such as `"mixer_b16_224.goog_in21k_ft_in1k"`.
        arguments: for `timm.create_model`, such as `pretrained_cfg_overlay` or `cache_dir`.

    Returns:
        The converted model; its `pretrained_cfg` says how images are prepared for these weights.

    Raises:
        UserError: if timm has no such model or no weights for it, cannot get at them, or it is of another family.
    """
    require_architecture(name)
    if timm.model_entrypoint(name).__module__ != "timm.models.mlp_mixer":
        known = timm.list_models(module="mlp_mixer", pretrained=True)
        raise UserError(f"timm's {name} is none of its all-MLP models: {', '.join(known)}.")
    try:
        original: Any = timm.create_model(name, pretrained=True, **arguments)
    # The Hub's client, the network and the file each have errors of their own.
    except Exception as error:
        raise UserError(f"timm cannot give {name} with its weights: {error}") from error
    cfg = original.pretrained_cfg
    facts = {"img_size": list(cfg["input_size"][1:]), "act_layer": "gelu"}
    conversion = convert_state_dict(original.state_dict(), "timm", facts)
    assert isinstance(conversion.architecture, VisionArchitecture)
    preparation = {
        **conversion.architecture.preparation,
        **{name: cfg[name] for name in PREPARATION},
        **for_channels(cfg, conversion.model.in_chans),
    }
    conversion.model.pretrained_cfg.update(preparation)
    architecture = dataclasses.replace(conversion.architecture, preparation=preparation)
    subset = infer_imagenet_subset(cfg)
    classes = None
    if subset and original.num_classes == cfg["num_classes"]:
        classes = _class_names(ImageNetInfo(subset))
    return dataclasses.replace(conversion, architecture=architecture, classes=classes)


def _class_names(info: ImageNetInfo) -> tuple[str, ...]:
    """The classes' short descriptions; the long ones of those that share one, such as cranes that lift and that fly."""
    short, long = (
        [info.index_to_description(index, detailed=detailed) for index in range(info.num_classes())]
        for detailed in (False, True)
    )
    count = Counter(short)
    return tuple(name if count[name] == 1 else whole for name, whole in zip(short, long, strict=True))
