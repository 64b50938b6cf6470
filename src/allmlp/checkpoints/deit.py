"""ResMLP as its authors save it (facebookresearch/deit, resmlp_models.py)."""

from allmlp.checkpoints.architecture import VisionArchitecture, ratio, vision_architecture
from allmlp.checkpoints.layout import (
    SQUARE_IMG_SIZE,
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
from allmlp.vision import ResMLP, resmlp

_BLOCK = {
    "norm1": "norm1",
    "attn": "linear_tokens",
    "norm2": "norm2",
    "mlp.fc1": "mlp_channels.fc1",
    "mlp.fc2": "mlp_channels.fc2",
}


def _resmlp(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    embed_dim, in_chans, *patch = shape(tensors, "patch_embed.proj.weight", 4)
    patch_size = (patch[0], patch[1])
    blocks = count(tensors, "blocks.")
    num_classes, head = find_head(tensors)
    architecture = vision_architecture(
        ResMLP,
        resmlp.VARIANTS,
        num_classes=num_classes,
        img_size=square_image(shape(tensors, "blocks.0.attn.weight", 2)[0], patch_size, facts),
        in_chans=in_chans,
        patch_size=patch_size,
        num_blocks=blocks,
        embed_dim=embed_dim,
        mlp_ratio=ratio(shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0], embed_dim),
    )
    modules = {"patch_embed.proj": "stem.proj", "norm": "norm", **head}
    for index in range(blocks):
        modules |= numbered({**_BLOCK, "": ""}, f"blocks.{index}", f"blocks.{index}")
    renamed = rename(tensors, modules)
    return architecture, {name.replace(".gamma_", ".ls"): tensor for name, tensor in renamed.items()}


LAYOUTS = (
    Layout(
        source="deit",
        family="ResMLP",
        recognises=lambda tensors: "patch_embed.proj.weight" in tensors and "blocks.0.gamma_1" in tensors,
        convert=_resmlp,
        inferred="widths, depth, patch size, square image size, classes",
        facts=(SQUARE_IMG_SIZE,),
    ),
)
