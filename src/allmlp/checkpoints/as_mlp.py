"""AS-MLP as its authors save it: classifiers (svip-lab/AS-MLP, models/as_mlp.py), and the backbones of their detectors
(AS-MLP-Object-Detection) and segmentation models (AS-MLP-Semantic-Segmentation, mmseg/models/backbones/asmlp.py)."""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from allmlp.checkpoints.architecture import VisionArchitecture, ratio, vision_architecture
from allmlp.checkpoints.layout import (
    Fact,
    Facts,
    Layout,
    Tensors,
    count,
    find_head,
    numbered,
    parse_count,
    parse_size,
    rename,
    shape,
)
from allmlp.vision import ASMLP, asmlp

_BLOCK = {
    name: name
    for name in (
        "norm1",
        "axial_shift.conv1",
        "axial_shift.norm1",
        "axial_shift.conv2_1",
        "axial_shift.conv2_2",
        "axial_shift.norm2",
        "axial_shift.conv3",
        "norm2",
        "mlp.fc1",
        "mlp.fc2",
    )
}
# An output level's norm.
_LEVEL_NORM = re.compile(r"norm(\d)\.weight")


def _trunk(tensors: Tensors, facts: Facts, num_classes: int) -> tuple[VisionArchitecture, dict[str, str]]:
    """The architecture, and the new names of the modules that classifiers and backbones share."""
    embed_dim, in_chans, *patch_size = shape(tensors, "patch_embed.proj.weight", 4)
    modules = {"patch_embed.proj": "stem.proj", "patch_embed.norm": "stem.norm"}
    depths, index = [], 0
    for stage in range(count(tensors, "layers.")):
        if stage:
            merging = f"layers.{stage - 1}.downsample"
            modules |= numbered({"norm": "norm", "reduction": "reduction"}, merging, f"blocks.{index}")
            index += 1
        depths.append(count(tensors, f"layers.{stage}.blocks."))
        for block in range(depths[-1]):
            modules |= numbered(_BLOCK, f"layers.{stage}.blocks.{block}", f"blocks.{index}")
            index += 1
    hidden = shape(tensors, "layers.0.blocks.0.mlp.fc1.weight", 4)[0]
    architecture = vision_architecture(
        ASMLP,
        asmlp.VARIANTS,
        num_classes=num_classes,
        img_size=facts.get("img_size", (224, 224)),
        in_chans=in_chans,
        patch_size=tuple(patch_size),
        embed_dim=embed_dim,
        depths=tuple(depths),
        shift_size=facts["shift_size"],
        mlp_ratio=ratio(hidden, embed_dim),
    )
    return architecture, modules


def _classifier(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    num_classes, head = find_head(tensors)
    architecture, modules = _trunk(tensors, facts, num_classes)
    return architecture, rename(tensors, {**modules, "norm": "norm", **head})


def _backbone(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    architecture, modules = _trunk(tensors, facts, 0)
    levels = sorted(int(match[1]) for name in tensors if (match := _LEVEL_NORM.fullmatch(name)))
    features = {"features_only": True, "out_indices": levels, "feature_norms": True}
    architecture = dataclasses.replace(architecture, model_args={**architecture.model_args, **features})
    modules = {theirs: f"model.{ours}" for theirs, ours in modules.items()}
    return architecture, rename(
        tensors, {**modules, **{f"norm{level}": f"norms.{i}" for i, level in enumerate(levels)}}
    )


def _recognises(tensors: Mapping[str, Any], *, backbone: bool) -> bool:
    if "layers.0.blocks.0.axial_shift.conv1.weight" not in tensors:
        return False
    return backbone == any(_LEVEL_NORM.fullmatch(name) for name in tensors)


def _stored(beside: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in the yacs configuration that the authors' trainer of classifiers saves."""
    config = beside.get("config")
    found: dict[str, Any] = {}
    for fact, path in (("shift_size", ("MODEL", "ASMLP", "SHIFT_SIZE")), ("img_size", ("DATA", "IMG_SIZE"))):
        value = config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[fact] = value
    return found


def _stored_by_mm(beside: Mapping[str, Any]) -> dict[str, Any]:
    """The shift size in the text of the configuration that mmdetection's and mmsegmentation's runners save.

    The name of the run (`exp_name`) is no source: some configurations named shift5 set another shift size.
    """
    meta = beside.get("meta")
    text = meta.get("config") if isinstance(meta, Mapping) else None
    sizes = set(re.findall(r"\bshift_size\s*=\s*(\d+)", text)) if isinstance(text, str) else set()
    return {"shift_size": int(sizes.pop())} if len(sizes) == 1 else {}


def _parse_shift_size(value: Any) -> int:
    if parse_count(value) % 2 == 0:
        raise ValueError("an odd number")
    return value


_INFERRED = "widths, depths of the stages, patch size"
_IMG_SIZE = Fact(
    name="img_size", help="image size that images are prepared to", parse=parse_size, assumed="224×224 pixels"
)

LAYOUTS = (
    Layout(
        source="as-mlp",
        family="AS-MLP",
        recognises=partial(_recognises, backbone=False),
        convert=_classifier,
        inferred=f"{_INFERRED}, classes",
        facts=(
            Fact(
                name="shift_size",
                help="number of offsets of the axial shift, odd (5 in the published models)",
                parse=_parse_shift_size,
                required=True,
            ),
            _IMG_SIZE,
        ),
        stored=_stored,
    ),
    Layout(
        source="as-mlp",
        family="AS-MLP backbone of a detector or segmentation model",
        recognises=partial(_recognises, backbone=True),
        convert=_backbone,
        inferred=f"{_INFERRED}, levels",
        facts=(
            Fact(
                name="shift_size",
                help="number of offsets of the axial shift, odd: the shift_size of the configuration it was trained "
                "with, 5 or 3 in the published ones, whose names say shift5 either way",
                parse=_parse_shift_size,
                required=True,
            ),
            _IMG_SIZE,
        ),
        stored=_stored_by_mm,
    ),
)
