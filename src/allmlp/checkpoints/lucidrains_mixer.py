"""MLP-Mixer by Phil Wang (lucidrains/mlp-mixer-pytorch).

Its `expansion_factor` is that of token mixing and its `expansion_factor_token` that of channel mixing; shapes tell.
"""

from allmlp.checkpoints.architecture import VisionArchitecture, vision_architecture
from allmlp.checkpoints.layout import (
    IMAGE_FACTS,
    Facts,
    Layout,
    Tensors,
    numbered,
    patch_of,
    rename,
    shape,
    square_image,
)
from allmlp.vision import Mixer, mixer

_BLOCK = {
    "0.norm": "norm1",
    "0.fn.0": "mlp_tokens.fc1",
    "0.fn.3": "mlp_tokens.fc2",
    "1.norm": "norm2",
    "1.fn.0": "mlp_channels.fc1",
    "1.fn.3": "mlp_channels.fc2",
}


def _mixer(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    embed_dim, pixels = shape(tensors, "1.weight", 2)
    in_chans, patch_size = patch_of(pixels, facts)
    # Rearrangement and patch embedding in front of the blocks; norm, mean and head behind them.
    blocks = len({name.split(".")[0] for name in tensors}) - 3
    token_hidden, tokens, _ = shape(tensors, "2.0.fn.0.weight", 3)
    architecture = vision_architecture(
        Mixer,
        mixer.VARIANTS,
        num_classes=shape(tensors, f"{blocks + 4}.weight", 2)[0],
        img_size=square_image(tokens, patch_size, facts),
        in_chans=in_chans,
        patch_size=patch_size,
        num_blocks=blocks,
        embed_dim=embed_dim,
        token_hidden=token_hidden,
        channel_hidden=shape(tensors, "2.1.fn.0.weight", 2)[0],
        norm_eps=1e-5,
    )
    modules = {"1": "stem.proj", f"{blocks + 2}": "norm", f"{blocks + 4}": "head"}
    for index in range(blocks):
        modules |= numbered(_BLOCK, f"{index + 2}", f"blocks.{index}")
    renamed = rename(tensors, modules)
    # Patches are flattened as (row, column, channel).
    weight = renamed["stem.proj.weight"].reshape(embed_dim, *patch_size, in_chans)
    renamed["stem.proj.weight"] = weight.permute(0, 3, 1, 2)
    return architecture, renamed


LAYOUTS = (
    Layout(
        source="lucidrains",
        family="MLP-Mixer",
        recognises=lambda tensors: "1.weight" in tensors and "2.0.fn.0.weight" in tensors,
        convert=_mixer,
        inferred="widths, depth, square patch and image size, classes",
        facts=IMAGE_FACTS,
    ),
)
