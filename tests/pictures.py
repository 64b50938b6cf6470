"""Small labelled pictures as files: each class has its colour, with noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


def picture(name: str, seed: int = 0, size: tuple[int, int] = (16, 12)) -> Image.Image:
    """A noisy picture of one colour, `size` = (width, height)."""
    noise = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))


def write_classes(root: Path, each: int = 6, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """A folder of class folders with `each` pictures in every class."""
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(each):
            picture(name, index).save(root / name / f"{index:02}.png")
    return root
