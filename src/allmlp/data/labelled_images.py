"""Labelled images, and the reading of one image."""

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from allmlp.errors import UserError

Source = str | Path | dict[str, Any] | np.ndarray
"""An image as it lies there: a file, `{"bytes": …, "path": …}` from a table, or uint8 pixels `[height, width(, 3)]`."""

PIXEL_LIMIT = 2**26
"""An image of more pixels, 8192 × 8192, is refused before they are decoded."""
RATIO_LIMIT = 100
"""An image with one side more times as long as the other is refused: sized by the shorter it would grow without end."""
DECODING_BYTES = 2**31
"""What decoding one image of `PIXEL_LIMIT` pixels takes at most beyond the file: 32 bytes a pixel, for all copies."""

Image.init()
# Formats with readers of their own in Pillow and pixels inside the file: EPS would be run, by Ghostscript.
FORMATS = tuple(name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


class UnreadableImage(UserError):
    """A file or record that is not an image, or a broken one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images, their classes and where they came from, in one order.

    Attributes:
        sources: the images as they lie there; `decode` reads one.
        labels: index of each image's class.
        names: a name for each image: its file, or its row.
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
    """The image, upright (its EXIF orientation applied) and in the mode asked for; of an animation the first frame.

    Of 16 bits a channel the upper eight are taken; transparency is left out.

    Args:
        source: a file, an encoded image as parquet files hold it, or pixels.
        mode: `RGB` or `L` (grey).

    Raises:
        UnreadableImage: if it is no image of `FORMATS`, a broken one, or one beyond `PIXEL_LIMIT` or `RATIO_LIMIT`; the
            message gives the reason.
    """
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
        return image if image.mode == mode else image.convert(mode)
    with _opened(source) as image:
        ImageOps.exif_transpose(image, in_place=True)
        plain = _eight_bits(image)
        if plain.mode == "P" and "transparency" in plain.info:
            plain = plain.convert("RGBA")
        return plain if plain.mode == mode else plain.convert(mode)


def read_header(source: Source) -> None:
    """Check that this begins like an image, without reading its pixels.

    Raises:
        UnreadableImage: if it does not, or it is beyond `PIXEL_LIMIT` or `RATIO_LIMIT`.
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
    # A pipe or a device would be waited for.
    if isinstance(file, (str, Path)) and not Path(file).is_file():
        raise UnreadableImage("not a file" if Path(file).exists() else "there is no such file")
    try:
        with _open(file) as image:
            yield image
    except UnreadableImage:
        raise
    # The readers of the many formats raise whatever their parsing runs into.
    except Exception as error:
        raise _unreadable(error) from error


def _open(file: Any) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large() from error
    width, height = image.size
    # A tile of TIFF is unpacked as a whole, however small the image.
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(TiffImagePlugin.TILEWIDTH, 0) * tags.get(TiffImagePlugin.TILELENGTH, 0)
    if max(width * height, tile) > PIXEL_LIMIT:
        image.close()
        raise _too_large()
    if width * height == 0 or max(width, height) > RATIO_LIMIT * min(width, height):
        image.close()
        raise UnreadableImage(
            f"it is {width:,} × {height:,} pixels; one side may be {RATIO_LIMIT} times as long as the other at most"
        )
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow reads 16 bits of PNG and PPM into 32 where it has no mode for them.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImage("it has 32 bits a pixel, which do not say what is white; save it with 8 or 16")
    return image


def _too_large() -> UnreadableImage:
    return UnreadableImage(f"it has more than {PIXEL_LIMIT:,} pixels")


def _unreadable(error: Exception) -> UnreadableImage:
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImage("not an image")
    return UnreadableImage(str(error) or type(error).__name__)
