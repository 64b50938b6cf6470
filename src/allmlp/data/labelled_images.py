"""Labelled images, and the reading of one image."""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageOps, UnidentifiedImageError

from allmlp.errors import UserError

Source = str | Path | dict[str, Any] | np.ndarray
"""An image as it lies there: a file, `{"bytes": …, "path": …}` from a table, or uint8 pixels `[height, width(, 3)]`."""


class UnreadableImage(UserError):
    """A file or record that is not an image, or a broken one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images, their classes and where they came from, in one order.

    Attributes:
        sources: The images as they lie there; `decode` reads one.
        labels: Index of each image's class.
        names: A name for each image: its file, or its row.
    """

    sources: Sequence[Any] | np.ndarray
    labels: Int[np.ndarray, " images"]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | Int[np.ndarray, " chosen"]) -> "LabelledImages":
        """The images at these places, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        sources = self.sources[chosen] if isinstance(self.sources, np.ndarray) else _Chosen(self.sources, chosen)
        return LabelledImages(
            sources=sources, labels=self.labels[chosen], names=[self.names[index] for index in chosen.tolist()]
        )


class _Chosen(Sequence):
    """A selection that leaves an image in its memory-mapped table until it is asked for."""

    def __init__(self, sources: Sequence[Any], indices: Iterable[int]):
        self.sources, self.indices = sources, [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        return self.sources[self.indices[place]]


def decode(source: Source, mode: str = "RGB") -> Image.Image:
    """The image, upright (its EXIF orientation applied) and in the mode asked for.

    Args:
        source: A file, an encoded image as parquet files hold it, or pixels.
        mode: `RGB` or `L` (grey).

    Raises:
        UnreadableImage: It is no image, or a broken one; the message gives the reason.
    """
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
        return image if image.mode == mode else image.convert(mode)
    with _opened(source) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return upright if upright.mode == mode else upright.convert(mode)


def read_header(source: Source) -> None:
    """Looks whether this begins like an image, without reading its pixels.

    Raises:
        UnreadableImage: It does not.
    """
    if not isinstance(source, np.ndarray):
        with _opened(source):
            pass


@contextlib.contextmanager
def _opened(source: str | Path | dict[str, Any] | None) -> Iterator[Image.Image]:
    file: Any = source
    if isinstance(source, dict):
        file = io.BytesIO(source["bytes"]) if source.get("bytes") else source.get("path")
    if file is None:
        raise UnreadableImage("the record is empty")
    try:
        with Image.open(file) as image:
            yield image
    # the readers of the many formats raise whatever their parsing runs into
    except Exception as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UnreadableImage:
    if isinstance(error, FileNotFoundError):
        return UnreadableImage("there is no such file")
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImage("not an image")
    return UnreadableImage(str(error) or type(error).__name__)
