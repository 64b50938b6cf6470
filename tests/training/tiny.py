"""The smallest training there is: a gMLP of one block on noisy pictures of three colours."""

from pathlib import Path

from allmlp.training.recipe import VisionRecipe, make_recipe
from tests.pictures import write_classes

SETTINGS = {
    "model": "gmlp_nano_patch4_32",
    "model_args": {"patch_size": 4, "num_blocks": 2, "embed_dim": 16, "mlp_ratio": 2},
    "img_size": 8,
    "epochs": 2,
    "batch_size": 8,
    "lr": 5e-3,
    "log_every": 1,
    "crop": "padded",
    "precision": "fp32",
    "workers": 0,
}


def tiny_recipe(folder: Path, **settings: object) -> VisionRecipe:
    """The recipe, on pictures written into `folder` where there are none yet."""
    data = folder / "pictures"
    if not data.exists():
        write_classes(data, each=10)
    return make_recipe({**SETTINGS, "data": str(data), **settings}, VisionRecipe)
