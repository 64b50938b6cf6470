"""Vision Permutator as its authors save it (houqb/VisionPermutator, models/vip.py)."""

import math
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
    parse_size,
    rename,
    shape,
)
from allmlp.errors import UserError
from allmlp.vision import VisionPermutator, vip

_BLOCK = ("norm1", "attn.mlp_c", "attn.mlp_h", "attn.mlp_w", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_REWEIGHT = ("attn.reweight.fc1", "attn.reweight.fc2")


def _vip(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    width, in_chans, *patch = shape(tensors, "patch_embed.proj.weight", 4)
    img_size = facts.get("img_size", (224, 224))
    if img_size[0] % patch[0] or img_size[1] % patch[1]:
        raise UserError(f"img_size={img_size} cannot be cut into this model's patches of {patch[0]}×{patch[1]} pixels.")
    grid = (img_size[0] // patch[0], img_size[1] // patch[1])
    weighted = "network.0.0.attn.reweight.fc1.weight" in tensors
    block_modules = {name: name for name in (*_BLOCK, *(_REWEIGHT if weighted else ()))}

    num_classes, head = find_head(tensors)
    modules = {"patch_embed.proj": "stem.proj", "norm": "norm", **head}
    depths, embed_dims, segments, downsample_after = [], [], [], []
    index = 0
    for entry in range(count(tensors, "network.")):
        if f"network.{entry}.proj.weight" in tensors:
            kernel = shape(tensors, f"network.{entry}.proj.weight", 4)[2:]
            if kernel != (2, 2):
                raise UserError(f"'network.{entry}.proj' changes the width without halving the map; ViP here cannot.")
            modules[f"network.{entry}.proj"] = f"blocks.{index}.proj"
            downsample_after.append(len(depths))
            if grid[0] % 2 or grid[1] % 2:
                raise UserError(
                    f"'network.{entry}.proj' halves a map of {grid[0]}×{grid[1]}: upstream leaves the last row or "
                    "column out, where ViP here pads it. An odd map cannot be converted."
                )
            grid = (grid[0] // 2, grid[1] // 2)
            index += 1
            continue
        depths.append(count(tensors, f"network.{entry}."))
        embed_dims.append(shape(tensors, f"network.{entry}.0.attn.mlp_c.weight", 2)[0])
        segments.append(_segments(tensors, f"network.{entry}.0.attn", embed_dims[-1], grid))
        for block in range(depths[-1]):
            modules |= numbered(block_modules, f"network.{entry}.{block}", f"blocks.{index}")
            index += 1
    architecture = vision_architecture(
        VisionPermutator,
        vip.VARIANTS,
        num_classes=num_classes,
        img_size=img_size,
        in_chans=in_chans,
        patch_size=(patch[0], patch[1]),
        depths=tuple(depths),
        embed_dims=tuple(embed_dims),
        segments=tuple(segments),
        downsample_after=tuple(downsample_after),
        mixing="weighted" if weighted else "sum",
        mlp_ratio=ratio(shape(tensors, "network.0.0.mlp.fc1.weight", 2)[0], width),
    )
    return architecture, _unscaled(rename(tensors, modules), facts.get("skip_lam", 1.0))


def _unscaled(tensors: Tensors, skip_lam: float) -> Tensors:
    """The weights of a model without `skip_lam`, by which upstream divides what each branch adds."""
    last = (".attn.proj.weight", ".attn.proj.bias", ".mlp.fc2.weight", ".mlp.fc2.bias")
    return {name: tensor / skip_lam if name.endswith(last) else tensor for name, tensor in tensors.items()}


def _parse_skip_lam(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError("a number above 0")
    return float(value)


def _segments(tensors: Tensors, attn: str, channels: int, grid: tuple[int, int]) -> int:
    """The number N of segments that gives `mlp_h` and `mlp_w` their sizes, `size · channels / N`, on this map."""
    found = set()
    for name, size in (("mlp_h", grid[0]), ("mlp_w", grid[1])):
        found.add(divmod(size * channels, shape(tensors, f"{attn}.{name}.weight", 2)[0]))
    segments, rest = found.pop()
    if found or rest or segments == 0 or channels % segments:
        raise UserError(
            f"The weights of '{attn}' do not fit a map of {grid[0]}×{grid[1]}. No checkpoint of ViP stores the image "
            "size: give it, img_size=[height, width] in pixels."
        )
    return segments


LAYOUTS = (
    Layout(
        source="vip",
        family="Vision Permutator",
        recognises=lambda tensors: "network.0.0.attn.mlp_h.weight" in tensors,
        convert=_vip,
        inferred="widths, depths and segments of the stages, where the map is halved, patch size, classes",
        facts=(
            Fact(
                name="img_size",
                help="image size in pixels, one number or [height, width]",
                parse=parse_size,
                assumed="224×224 pixels",
            ),
            Fact(
                name="skip_lam",
                help="what the branches are divided by (`skip_lam` in the authors' code, 1 in their models)",
                parse=_parse_skip_lam,
                assumed="1",
            ),
        ),
    ),
)
