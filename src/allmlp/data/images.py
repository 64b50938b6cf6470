"""Labelled images from wherever they lie: embedded digits, class folders, parquet files, the Hub."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from allmlp.data import image_sources
from allmlp.data.labelled_images import LabelledImages, UnreadableImage, decode, read_header
from allmlp.data.sampling import hold_out
from allmlp.data.shards import ImageShards
from allmlp.errors import UserError, listed

_log = logging.getLogger(__name__)

MEMORY_LIMIT = 2**30
"""Decoded images are kept in memory while they take no more bytes than this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set cut into what is learnt from and what is held out.

    Attributes:
        classes: the classes' names; a label is an index into them.
        train: what is learnt from; where it streams, its shards.
        validation: what is held out.
        unreadable: names of the images left out because they could not be read, each with the reason.
    """

    classes: tuple[str, ...]
    train: LabelledImages | ImageShards
    validation: LabelledImages
    unreadable: tuple[str, ...]


def image_mode(channels: int) -> str:
    """How Pillow names images of so many channels.

    Raises:
        UserError: if it has no such images.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise UserError(f"The model takes {channels} channels; images have 1 (grey) or 3 (colour).")
    return modes[channels]


def load_images(
    data: str,
    *,
    holdout: float = 0.2,
    seed: int = 0,
    channels: int = 3,
    strict: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> ImageData:
    """Find the data to train on, with something held out, and read it once, leaving out what cannot be read.

    Images that fit into `MEMORY_LIMIT` bytes are decoded now and kept; of larger data only each image's header is read.

    Args:
        data: `digits` (scikit-learn's handwritten digits), a folder of class folders (or one with such folders under
            `train` and `val`), parquet or tar files, a folder of them or their address, or a Hub dataset's name,
            `owner/name` or `owner/name:configuration`.
        holdout: share of each class held out where the data has no validation split of its own.
        seed: seed of that cut.
        channels: 3 for colour, 1 for grey.
        strict: raise at the first unreadable image instead of leaving it out with a warning.
        image_column: column of the images in a table; found by its type where not given.
        label_column: column of the classes in a table; found by its type or name where not given.
        streaming: read what is learnt from shard by shard as it is needed; tar files always are.

    Raises:
        UserError: if there is no such data, or it has no images or no classes; if there are fewer than two classes, a
            class has too few images, or a stream has no validation split.
        UnreadableImage: `strict`, and an image cannot be read.
    """
    mode = image_mode(channels)
    classes, found = image_sources.find(data, image_column, label_column, streaming)
    if len(classes) < 2:
        raise UserError(f"{data} has one class only ({classes[0]}); telling images apart takes at least two.")
    train, unreadable = found["train"], ()
    if not isinstance(train, ImageShards):
        train, unreadable = _readable(train, data, mode, strict)
        counts = np.bincount(train.labels, minlength=len(classes))
        if not counts.all():
            raise UserError(f"Class '{classes[int(counts.argmin())]}' of {data} has no image that can be read.")
        if "validation" not in found:
            train, validation = _cut(train, classes, data, holdout, seed)
            return ImageData(classes=classes, train=train, validation=validation, unreadable=unreadable)
    elif "validation" not in found:
        raise UserError(
            f"{data} streams, so that nothing is held out of it: give shards for validation, such as val-0000.tar."
        )
    validation, broken = _readable(found["validation"], data, mode, strict)
    return ImageData(classes=classes, train=train, validation=validation, unreadable=unreadable + broken)


def _cut(
    images: LabelledImages, classes: Sequence[str], data: str, holdout: float, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """What is learnt from and what is held out.

    Raises:
        UserError: if a class has a single image.
    """
    present, counts = np.unique(images.labels, return_counts=True)
    if counts.min() < 2:
        raise UserError(
            f"Class '{classes[present[counts.argmin()]]}' of {data} has a single image, so none can be held out; "
            "add images or give a validation split."
        )
    kept, out = hold_out(images.labels, holdout, seed)
    return images.subset(kept), images.subset(out)


def load_validation(
    data: str,
    *,
    cut: tuple[float, int] | None = None,
    channels: int = 3,
    strict: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> tuple[tuple[str, ...], LabelledImages, str]:
    """What a classifier is measured on: nothing else of the data is read where it has a validation split.

    Args:
        data: as for `load_images`, likewise the other arguments and the errors.
        cut: share and seed by which a training has held a part out, where the data has no such split.

    Returns:
        The classes, the images, and what these are of the data: its `validation`, what is `held out` by the cut, or
        `all` of it.
    """
    mode = image_mode(channels)
    classes, found = image_sources.find(data, image_column, label_column, streaming)
    if "validation" in found:
        return classes, _readable(found["validation"], data, mode, strict)[0], "validation"
    images = _readable(found["train"], data, mode, strict)[0]
    if cut is None:
        return classes, images, "all"
    return classes, _cut(images, classes, data, *cut)[1], "held out"


def _readable(
    images: LabelledImages | ImageShards, data: str, mode: str, strict: bool
) -> tuple[LabelledImages, tuple[str, ...]]:
    """What `read_all` can read of a split; what it cannot, each with the reason, which is also said.

    Raises:
        UserError: if none of it can be read.
        UnreadableImage: `strict`, and an image cannot be read.
    """
    images = image_sources.stored(images) if isinstance(images, ImageShards) else images
    readable, reasons = read_all(images, mode, strict)
    unreadable = tuple(f"{name} ({reason})" for name, reason in reasons.items())
    tell_left_out(data, unreadable, len(readable))
    return readable, unreadable


def tell_left_out(data: str | None, unreadable: Sequence[str], left: int) -> None:
    """Say what is left out of some data because it cannot be read.

    Raises:
        UserError: if no images are left.
    """
    if not left:
        raise UserError(f"No image of {data} can be read: {listed(unreadable, 3) or 'a split of it is empty'}.")
    if unreadable:
        _log.warning("left out %d of %s that cannot be read: %s", len(unreadable), data, listed(unreadable, 5))


def read_all(images: LabelledImages, mode: str, strict: bool = False) -> tuple[LabelledImages, dict[str, str]]:
    """Read every image once.

    Args:
        images: the images as they lie there.
        mode: `RGB` or `L`.
        strict: raise at the first unreadable image.

    Returns:
        The readable images, decoded where they fit into `MEMORY_LIMIT` bytes together; and the names of the others,
        each with the reason.

    Raises:
        UnreadableImage: `strict`, and an image cannot be read.
    """
    pixels: list[np.ndarray] | None = []
    readable: list[int] = []
    unreadable: dict[str, str] = {}
    size = 0
    for index in tqdm(range(len(images)), desc="reading images", unit=" images", leave=False, disable=None, delay=1):
        try:
            if pixels is None:
                read_header(images.sources[index])
            else:
                pixels.append(np.asarray(decode(images.sources[index], mode)))
                size += pixels[-1].nbytes
                pixels = pixels if size <= MEMORY_LIMIT else None
        except UnreadableImage as error:
            if strict:
                raise UnreadableImage(f"{images.names[index]} cannot be read as an image: {error}") from error
            unreadable[images.names[index]] = str(error)
        else:
            readable.append(index)
    kept = images.subset(readable) if unreadable else images
    if pixels:
        same_size = len({array.shape for array in pixels}) == 1
        kept = dataclasses.replace(kept, sources=np.stack(pixels) if same_size else pixels)
    return kept, unreadable
