"""gMLP by Jake Tae (jaketae/g-mlp, g_mlp/core.py): image classifier and language model, both without a final norm.

Its `d_ffn` is the width after the split.
"""

from allmlp.checkpoints.architecture import LanguageArchitecture, VisionArchitecture, ratio, vision_architecture
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
from allmlp.vision import GMLP, gmlp

_BLOCK = {
    "norm": "norm",
    "channel_proj1": "proj_in",
    "sgu.norm": "sgu.norm",
    "sgu.spatial_proj": "sgu",
    "channel_proj2": "proj_out",
}


def _image(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    embed_dim, in_chans, *patch = shape(tensors, "patcher.weight", 4)
    blocks = count(tensors, "model.")
    patch_size = (patch[0], patch[1])
    architecture = vision_architecture(
        GMLP,
        gmlp.VARIANTS,
        num_classes=shape(tensors, "classifier.weight", 2)[0],
        img_size=square_image(shape(tensors, "model.0.sgu.spatial_proj.weight", 3)[0], patch_size, facts),
        in_chans=in_chans,
        patch_size=patch_size,
        num_blocks=blocks,
        embed_dim=embed_dim,
        mlp_ratio=ratio(shape(tensors, "model.0.channel_proj1.weight", 2)[0], embed_dim),
        norm_eps=1e-5,
        final_norm=False,
    )
    modules = {"patcher": "stem.proj", "classifier": "head"}
    for index in range(blocks):
        modules |= numbered(_BLOCK, f"model.{index}", f"blocks.{index}")
    return architecture, rename(tensors, modules)


def _language(tensors: Tensors, facts: Facts) -> tuple[LanguageArchitecture, Tensors]:
    vocab_size, hidden_size = shape(tensors, "embed.weight", 2)
    blocks = count(tensors, "model.")
    architecture = LanguageArchitecture(
        name="GMLPModel",
        config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": shape(tensors, "model.0.channel_proj1.weight", 2)[0],
            "num_hidden_layers": blocks,
            "max_position_embeddings": shape(tensors, "model.0.sgu.spatial_proj.weight", 3)[0],
            "final_layer_norm": False,
        },
    )
    modules = {"embed": "embed_tokens"}
    for index in range(blocks):
        modules |= numbered(_BLOCK, f"model.{index}", f"layers.{index}")
    return architecture, rename(tensors, modules)


LAYOUTS = (
    Layout(
        source="jaketae",
        family="gMLP for images",
        recognises=lambda tensors: "patcher.weight" in tensors and "model.0.sgu.spatial_proj.weight" in tensors,
        convert=_image,
        inferred="widths, depth, patch size, square image size, classes",
        facts=(SQUARE_IMG_SIZE,),
    ),
    Layout(
        source="jaketae",
        family="gMLP language model (hidden states)",
        recognises=lambda tensors: "embed.weight" in tensors and "model.0.sgu.spatial_proj.weight" in tensors,
        convert=_language,
        inferred="vocabulary, widths, depth, length",
    ),
)
