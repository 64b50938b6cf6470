"""Labelled images as batches for a model: transformed one by one, normalised and mixed as a whole.

Legend of the shapes: B images, C channels, H × W pixels.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from allmlp.data import NAMES
from allmlp.data.images import image_mode
from allmlp.data.labelled_images import PIXEL_LIMIT, LabelledImages, Source, UnreadableImage, decode
from allmlp.data.sampling import IGNORED
from allmlp.errors import UserError

ImageTransform = Any
"""A torchvision `Compose` from a PIL image to uint8 pixels `[C, H, W]`."""


class BatchMaker:
    """Makes batches of labelled images: `{"pixel_values": Float[B, C, H, W], "labels": Int[B], "names": list[str]}`.

    Where images are mixed, the labels are `Float[B, classes]`. What is random about an image depends on the seed, the
    epoch and its number alone, and what is mixed and erased on the batch's first number: not on how many processes
    there are, and not on what happened before, so that a resumed training sees the same pixels as one never stopped.

    Training (with a seed) goes on without an image that cannot be read; evaluation, whose processes must have batches
    of one size, keeps its place with pixels of 0 and a label that does not count.

    Args:
        transform: from a PIL image to uint8 pixels of the model's size.
        count: how many images there are.
        mean: subtracted from the pixels (after scaling them to 0…1), per channel.
        std: divides them then, per channel.
        mix: mixup and cutmix, drawn once per batch; a batch of odd length stays as it is.
        erase: erases rectangles of the normalised images.
        seed: seed of the augmentation; None leaves the random state alone, for a transform without chance.
        strict: raise at an image found broken, instead of making its batch without it.
    """

    def __init__(
        self,
        transform: ImageTransform,
        *,
        count: int,
        mean: Sequence[float],
        std: Sequence[float],
        mix: Mixup | None = None,
        erase: RandomErasing | None = None,
        seed: int | None = None,
        strict: bool = False,
    ):
        self.transform, self.mix, self.erase, self.seed, self.strict = transform, mix, erase, seed, strict
        self.mode = image_mode(len(mean))
        self.shift = 255 * torch.tensor(mean).view(-1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))
        self.epoch = 0
        # Shared with the worker processes, which are the ones to find out.
        self.broken = torch.zeros(count, dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from here on."""
        self.epoch = epoch

    def make_batch(self, images: Sequence[tuple[int, Source, int, str]]) -> dict[str, Any]:
        """A batch of images; those that cannot be read are `broken` from then on.

        Args:
            images: each as its number, itself, its class and its name. Where there are none, or none to train on that
                can be read, the batch is one blank image whose label does not count.

        Raises:
            UserError: `strict`, and an image cannot be read; or none of all the images to train on can be.
        """
        pixels: list[UInt8[Tensor, "c h w"]] = []
        labels: list[int] = []
        names: list[str] = []
        with contextlib.nullcontext() if self.seed is None else _random_state_kept():
            for number, source, label, name in images:
                self._reseed(number, 0)
                try:
                    pixels.append(self.transform(decode(source, self.mode)))
                except UnreadableImage as error:
                    if self.strict:
                        raise UserError(f"{name} cannot be read as an image: {error}") from error
                    self.broken[number] = True
                    if self.seed is not None:
                        continue
                    pixels.append(self._blank())
                    label = IGNORED
                labels.append(label)
                names.append(name)
            if not pixels:
                if images and self.broken.all():
                    raise UserError(f"None of the images to train on can be read, such as {images[0][3]}.")
                pixels, labels = [self._blank()], [IGNORED]
            x_BCHW, targets = self.normalised(torch.stack(pixels)), torch.tensor(labels)
            if images:
                self._reseed(images[0][0], 1)
            if self.mix is not None and len(labels) % 2 == 0:
                x_BCHW, targets = self.mix(x_BCHW, targets)
            if self.erase is not None:
                x_BCHW = self.erase(x_BCHW)
        return {"pixel_values": x_BCHW, "labels": targets, NAMES: names}

    def normalised(self, pixels: UInt8[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
        """(pixels / 255 - mean) / std."""
        return pixels.float().sub_(self.shift).mul_(self.scale)

    def _blank(self) -> UInt8[Tensor, "c h w"]:
        return torch.zeros_like(self.transform(Image.new(self.mode, (32, 32))))

    def _reseed(self, number: int, purpose: int) -> None:
        if self.seed is not None:
            key = hash((self.seed, self.epoch, int(number), purpose)) % 2**63
            random.seed(key)
            np.random.seed(key % 2**32)  # noqa: NPY002 timm's mixup draws from it
            # Not torch.manual_seed, which would also set the accelerator's, where dropout draws.
            torch.default_generator.manual_seed(key)


class ImageBatches(BatchMaker, Dataset):
    """A data set whose batch is made in one go: `__getitems__(indices)` gives it as `BatchMaker` says.

    Args:
        images: the images and their classes.
        transform: from a PIL image to uint8 pixels of the model's size.
        settings: further arguments of `BatchMaker`.
    """

    def __init__(self, images: LabelledImages, transform: ImageTransform, **settings: Any):
        super().__init__(transform, count=len(images), **settings)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def unreadable(self) -> list[str]:
        """Names of the images found broken while they were decoded."""
        return [self.images.names[index] for index in self.broken.nonzero().flatten().tolist()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        images = self.images
        chosen = [(int(i), images.sources[i], int(images.labels[i]), images.names[i]) for i in indices]
        return self.make_batch(chosen)


def evaluation_transform(cfg: Mapping[str, Any]) -> ImageTransform:
    """timm's resize and centre crop for a model's `pretrained_cfg`."""
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    transform: ImageTransform = create_transform(
        **{key: cfg[key] for key in keys if cfg.get(key)}, is_training=False, use_prefetcher=True
    )
    transform.transforms.insert(0, _Bounded(max(cfg["input_size"][-2:]) / (cfg.get("crop_pct") or DEFAULT_CROP_PCT)))
    return transform


def training_transform(
    cfg: Mapping[str, Any],
    *,
    crop: str = "resized",
    crop_scale: float = 0.08,
    hflip: float = 0.5,
    color_jitter: float = 0.0,
    auto_augment: str | None = None,
) -> ImageTransform:
    """timm's augmentation for a model's `pretrained_cfg`.

    Args:
        cfg: gives `input_size` (C, H, W), `interpolation` and `mean`.
        crop: `resized` crops a random area and aspect ratio and resizes it; `padded` resizes the image, pads it with an
            eighth of its size and crops at random, which is a random shift.
        crop_scale: smallest share of the area that a resized crop keeps.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation jitter.
        auto_augment: timm's policy string.

    Raises:
        UserError: if timm does not know the policy.
    """
    settings: dict[str, Any] = {
        "input_size": cfg["input_size"],
        "mean": cfg["mean"],
        "interpolation": cfg.get("interpolation", "bilinear"),
        "scale": (crop_scale, 1.0),
        "hflip": hflip,
        "color_jitter": None,
        "auto_augment": auto_augment,
    }
    try:
        transform: ImageTransform = create_transform(**settings, is_training=True, use_prefetcher=True)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"auto_augment is '{auto_augment}', which is no policy of timm's: {error}") from error
    if crop == "padded":
        height, width = cfg["input_size"][-2:]
        resize = evaluation_transform({**cfg, "crop_pct": 1.0}).transforms[:-1]
        shift = transforms.RandomCrop((height, width), padding=(width // 8, height // 8))
        transform.transforms[:1] = [*resize, shift]
    # In front of the last step, which makes a tensor; timm itself would leave it out beside most policies.
    if color_jitter:
        transform.transforms.insert(-1, transforms.ColorJitter(*[color_jitter] * 3))
    _keep_a_bit(transform)
    return transform


class _Bounded:
    """Refuses an image that would be too large with its shorter side resized to `side` pixels."""

    def __init__(self, side: float):
        self.side = side

    def __call__(self, image: Any) -> Any:
        pixels = self.side**2 * max(image.size) / min(image.size)
        if pixels > PIXEL_LIMIT:
            width, height = image.size
            raise UnreadableImage(
                f"{width:,} × {height:,} pixels would become {pixels:,.0f} with the shorter side at {self.side:,.0f}"
            )
        return image


def _keep_a_bit(transform: ImageTransform) -> None:
    # timm's posterize goes down to 0 bits, which Pillow 13 refuses.
    for step in transform.transforms:
        policies = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in (operation for policy in policies for operation in policy):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterized(operation.aug_fn)


class _posterized:
    def __init__(self, posterize: Any):
        self.posterize = posterize

    def __call__(self, image: Any, bits: int, **settings: Any) -> Any:
        return self.posterize(image, max(bits, 1), **settings)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put all three random states that transforms draw from back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 timm's mixup draws from it
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
