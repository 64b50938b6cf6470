"""timm's gMLP, Mixer and ResMLP, in both directions (timm/models/mlp_mixer.py).

timm computes the exact GELU in all of them, Mixer included.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from allmlp.checkpoints.architecture import VisionArchitecture, ratio, vision_architecture
from allmlp.checkpoints.layout import (
    SQUARE_IMG_SIZE,
    Fact,
    Facts,
    Layout,
    Tensors,
    count,
    find_head,
    numbered,
    rename,
    shape,
    square_image,
)
from allmlp.errors import UserError
from allmlp.vision import GMLP, Mixer, ResMLP, gmlp, mixer, resmlp

# timm's names of the modules in a block, and ours; "" is the block itself, which has ResMLP's LayerScales.
_GMLP_BLOCK = {
    "norm": "norm",
    "mlp_channels.fc1": "proj_in",
    "mlp_channels.gate.norm": "sgu.norm",
    "mlp_channels.gate.proj": "sgu",
    "mlp_channels.fc2": "proj_out",
}
_MIXER_BLOCK = {
    name: name
    for name in ("norm1", "mlp_tokens.fc1", "mlp_tokens.fc2", "norm2", "mlp_channels.fc1", "mlp_channels.fc2")
}
_RESMLP_BLOCK = {name: name for name in ("", "norm1", "linear_tokens", "norm2", "mlp_channels.fc1", "mlp_channels.fc2")}
# timm prepares images for gMLP and Mixer as Google does for Mixer, to [−1, 1].
_TO_UNIT_RANGE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _gmlp(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    sizes = _sizes(tensors, shape(tensors, "blocks.0.mlp_channels.gate.proj.weight", 2)[0], facts)
    hidden = shape(tensors, "blocks.0.mlp_channels.fc1.weight", 2)[0]
    architecture = vision_architecture(
        GMLP, gmlp.VARIANTS, mlp_ratio=ratio(hidden, sizes["embed_dim"]), preparation=_TO_UNIT_RANGE, **sizes
    )
    return architecture, rename(tensors, _modules(tensors, _GMLP_BLOCK))


def _mixer(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    token_hidden, tokens = shape(tensors, "blocks.0.mlp_tokens.fc1.weight", 2)
    if shape(tensors, "blocks.0.mlp_tokens.fc2.weight", 2)[1] != token_hidden:
        raise UserError("This is timm's gmixer, a Mixer with gated linear units of its own; allmlp has no such family.")
    architecture = vision_architecture(
        Mixer,
        mixer.VARIANTS,
        token_hidden=token_hidden,
        channel_hidden=shape(tensors, "blocks.0.mlp_channels.fc1.weight", 2)[0],
        act_layer=facts.get("act_layer", "gelu"),
        preparation=_TO_UNIT_RANGE,
        **_sizes(tensors, tokens, facts),
    )
    return architecture, rename(tensors, _modules(tensors, _MIXER_BLOCK))


def _resmlp(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    sizes = _sizes(tensors, shape(tensors, "blocks.0.linear_tokens.weight", 2)[0], facts)
    hidden = shape(tensors, "blocks.0.mlp_channels.fc1.weight", 2)[0]
    architecture = vision_architecture(ResMLP, resmlp.VARIANTS, mlp_ratio=ratio(hidden, sizes["embed_dim"]), **sizes)
    return architecture, rename(tensors, _modules(tensors, _RESMLP_BLOCK))


def _sizes(tensors: Tensors, tokens: int, facts: Facts) -> dict[str, Any]:
    embed_dim, in_chans, *patch = shape(tensors, "stem.proj.weight", 4)
    patch_size = (patch[0], patch[1])
    return {
        "num_classes": find_head(tensors)[0],
        "img_size": square_image(tokens, patch_size, facts),
        "in_chans": in_chans,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "num_blocks": count(tensors, "blocks."),
    }


def _modules(tensors: Mapping[str, Tensor], block: Mapping[str, str]) -> dict[str, str]:
    """timm's module names and ours; the number of blocks and whether there is a head are the same on both sides."""
    names = {"stem.proj": "stem.proj", "norm": "norm", **find_head(tensors)[1]}
    for index in range(count(tensors, "blocks.")):
        names |= numbered(block, f"blocks.{index}", f"blocks.{index}")
    return names


def export(model: nn.Module) -> Tensors:
    """A model's weights under timm's names and in its shapes.

    Args:
        model: a `GMLP`, `Mixer` or `ResMLP`.

    Returns:
        What timm's model of the same sizes loads, to compute the same.

    Raises:
        UserError: if timm has no such family, or its form of the family computes something else.
    """
    if isinstance(model, GMLP):
        block, differences = _GMLP_BLOCK, _differences_gmlp(model)
    elif isinstance(model, Mixer):
        block, differences = _MIXER_BLOCK, _differences_mixer(model)
    elif isinstance(model, ResMLP):
        block, differences = _RESMLP_BLOCK, []
    else:
        raise UserError(f"timm has no {type(model).__name__}; it has gMLP, Mixer and ResMLP.")
    if model.stem.kernel_size != model.stem.patch_size:
        differences.append("its patches do not overlap")
    if differences:
        raise UserError(f"timm's {type(model).__name__} does not compute the same: {'; '.join(differences)}.")
    tensors = model.state_dict()
    theirs = {ours: theirs for theirs, ours in _modules(tensors, block).items()}
    return {name: _in_timms_shape(name, tensor) for name, tensor in rename(tensors, theirs).items()}


def _differences_gmlp(model: GMLP) -> list[str]:
    block = model.blocks[0]
    assert isinstance(block, gmlp.GMLPBlock)
    found = []
    if block.sgu.attention is not None:
        found.append("it has no tiny attention")
    if block.sgu.weight.shape[0] > 1:
        found.append("it has one spatial head")
    if not isinstance(model.norm, nn.LayerNorm):
        found.append("it has a final norm")
    if (block.norm.eps, block.sgu.norm.eps) != (1e-6, 1e-5):
        epsilons = f"{block.norm.eps} and {block.sgu.norm.eps}"
        found.append(f"its norms have epsilon 1e-6 and, in the gate, 1e-5, not {epsilons}")
    return found


def _differences_mixer(model: Mixer) -> list[str]:
    block = model.blocks[0]
    assert isinstance(block, mixer.MixerBlock)
    found = []
    if block.norm1.eps != 1e-6:
        found.append(f"its norms have epsilon 1e-6, not {block.norm1.eps}")
    if block.mlp_channels.act.approximate != "none":
        found.append("its GELU is the exact one")
    return found


def _in_timms_shape(name: str, tensor: Tensor) -> Tensor:
    if ".gate.proj." in name:
        return tensor.squeeze(0)
    if name.endswith((".alpha", ".beta")):
        return tensor.reshape(1, 1, -1)
    return tensor


def _activation(*known: str) -> Fact:
    """The activation inside the MLPs, of those that the family has here."""

    def parse(value: Any) -> str:
        if value not in known:
            raise ValueError(f"{' or '.join(known)}, as the models here have no other")
        return value

    return Fact(name="act_layer", help=f"the activation: {' or '.join(known)}", parse=parse, assumed="gelu")


def _recognises(marker: str) -> Callable[[Mapping[str, Tensor]], bool]:
    return lambda tensors: "stem.proj.weight" in tensors and marker in tensors


_INFERRED = "widths, depth, patch size, square image size, classes"
LAYOUTS = tuple(
    Layout(
        source="timm",
        family=family,
        recognises=_recognises(f"blocks.0.{marker}.weight"),
        convert=convert,
        inferred=_INFERRED,
        facts=(SQUARE_IMG_SIZE, activation),
    )
    for family, marker, convert, activation in (
        ("gMLP", "mlp_channels.gate.proj", _gmlp, _activation("gelu")),
        ("MLP-Mixer", "mlp_tokens.fc1", _mixer, _activation("gelu", "gelu_tanh")),
        ("ResMLP", "linear_tokens", _resmlp, _activation("gelu")),
    )
)
