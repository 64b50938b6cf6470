"""MLP-Mixer as its authors save it, NumPy archives of JAX parameters (google-research/vision_transformer, big_vision).

Their GELU is the tanh approximation, which `flax.linen.gelu` computes by default.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from allmlp.checkpoints.architecture import VisionArchitecture, vision_architecture
from allmlp.checkpoints.layout import (
    SQUARE_IMG_SIZE,
    Facts,
    Layout,
    Tensors,
    count,
    numbered,
    rename,
    shape,
    square_image,
)
from allmlp.errors import UserError
from allmlp.vision import Mixer, mixer

_BLOCK = {
    "LayerNorm_0": "norm1",
    "token_mixing.Dense_0": "mlp_tokens.fc1",
    "token_mixing.Dense_1": "mlp_tokens.fc2",
    "LayerNorm_1": "norm2",
    "channel_mixing.Dense_0": "mlp_channels.fc1",
    "channel_mixing.Dense_1": "mlp_channels.fc2",
}
# What a release puts in front of a block's number.
_BLOCK_NAME = re.compile(r"^(MixerBlock|encoderblock)_(\d+)\.")


def _mixer(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    tensors = _dotted(tensors)
    *patch, in_chans, embed_dim = shape(tensors, "stem.kernel", 4)
    patch_size = (patch[0], patch[1])
    tokens, token_hidden = shape(tensors, "block.0.token_mixing.Dense_0.kernel", 2)
    blocks = count(tensors, "block.")
    architecture = vision_architecture(
        Mixer,
        mixer.VARIANTS,
        num_classes=shape(tensors, "head.kernel", 2)[1] if "head.kernel" in tensors else 0,
        img_size=square_image(tokens, patch_size, facts),
        in_chans=in_chans,
        patch_size=patch_size,
        num_blocks=blocks,
        embed_dim=embed_dim,
        token_hidden=token_hidden,
        channel_hidden=shape(tensors, "block.0.channel_mixing.Dense_0.kernel", 2)[1],
        act_layer="gelu_tanh",
        preparation={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    )
    modules = {"stem": "stem.proj", "pre_head_layer_norm": "norm"}
    if "head.kernel" in tensors:
        modules["head"] = "head"
    for index in range(blocks):
        modules |= numbered(_BLOCK, f"block.{index}", f"blocks.{index}")
    renamed = {}
    for name, tensor in rename(tensors, modules).items():
        module, _, parameter = name.rpartition(".")
        if parameter == "kernel":
            # Flax writes [in, out] and [height, width, in, out].
            order = {2: (1, 0), 4: (3, 2, 0, 1)}.get(tensor.dim())
            if order is None:
                raise UserError(f"The kernel of '{module}' has {tensor.dim()} dimensions; it should have 2 or 4.")
            tensor = tensor.permute(order)
        renamed[f"{module}.{'bias' if parameter == 'bias' else 'weight'}"] = tensor
    return architecture, renamed


def _dotted(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors by dotted names, blocks named `block.0` and on."""
    dotted = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    return {_BLOCK_NAME.sub(r"block.\2.", name): tensor for name, tensor in dotted.items()}


LAYOUTS = (
    Layout(
        source="google-mixer",
        family="MLP-Mixer",
        recognises=lambda tensors: "stem/kernel" in tensors and "pre_head_layer_norm/scale" in tensors,
        convert=_mixer,
        inferred="widths, depth, patch size, square image size, classes",
        facts=(SQUARE_IMG_SIZE,),
    ),
)
