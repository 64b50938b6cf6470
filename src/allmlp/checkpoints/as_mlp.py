"""AS-MLP as its authors save it (svip-lab/AS-MLP, models/as_mlp.py)."""

from collections.abc import Mapping
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


def _as_mlp(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    embed_dim, in_chans, *patch_size = shape(tensors, "patch_embed.proj.weight", 4)
    num_classes, head = find_head(tensors)
    modules = {"patch_embed.proj": "stem.proj", "patch_embed.norm": "stem.norm", "norm": "norm", **head}
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
    return architecture, rename(tensors, modules)


def _stored(beside: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in the yacs configuration that the authors' trainer saves."""
    config = beside.get("config")
    found: dict[str, Any] = {}
    for fact, path in (("shift_size", ("MODEL", "ASMLP", "SHIFT_SIZE")), ("img_size", ("DATA", "IMG_SIZE"))):
        value = config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[fact] = value
    return found


def _parse_shift_size(value: Any) -> int:
    if parse_count(value) % 2 == 0:
        raise ValueError("an odd number")
    return value


LAYOUTS = (
    Layout(
        source="as-mlp",
        family="AS-MLP",
        recognises=lambda tensors: "layers.0.blocks.0.axial_shift.conv1.weight" in tensors,
        convert=_as_mlp,
        inferred="widths, depths of the stages, patch size, classes",
        facts=(
            Fact(
                name="shift_size",
                help="number of offsets of the axial shift, odd (5 in the published models)",
                parse=_parse_shift_size,
                required=True,
            ),
            Fact(name="img_size", help="image size that images are prepared to, 224 by default", parse=parse_size),
        ),
        stored=_stored,
    ),
)
