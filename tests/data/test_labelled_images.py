"""Reading one image."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allmlp.data.labelled_images import LabelledImages, UnreadableImage, decode, read_header
from tests.pictures import picture


def _encoded(image: Image.Image, format: str = "PNG", **settings: object) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def test_files_bytes_and_pixels_decode_to_the_same_image(tmp_path: Path) -> None:
    image = picture("red")
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), _encoded(image), pixels):
        np.testing.assert_array_equal(np.asarray(decode(source)), pixels)
    in_table = {"bytes": None, "path": str(tmp_path / "a.png")}
    np.testing.assert_array_equal(np.asarray(decode(in_table)), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_the_one_asked_for(mode: str) -> None:
    format = "TIFF" if mode == "CMYK" else "PNG"
    source = _encoded(picture("green").convert(mode), format)
    assert decode(source, "RGB").mode == "RGB"
    assert decode(source, "L").mode == "L"
    assert decode(np.asarray(picture("green")), "L").mode == "L"


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    deep = np.array([[0, 256, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode(_encoded(Image.fromarray(deep)), "L"))
    np.testing.assert_array_equal(decoded, [[0, 1, 255]])


def test_a_palette_with_transparency_decodes_without_a_warning() -> None:
    assert decode(_encoded(picture("blue").convert("P"), transparency=b"\0\xff"), "RGB").mode == "RGB"


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(_encoded(picture("red", size=(16, 12)), "JPEG", exif=exif)).size == (12, 16)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"this is no image", "not an image"),
        (_encoded(picture("red"))["bytes"][:60], "truncated"),
        (_encoded(picture("red", size=(64, 64)), "JPEG")["bytes"][:-300], "truncated"),
    ],
    ids=["text", "cut png", "cut jpeg"],
)
def test_broken_images_are_named_as_such(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode({"bytes": content, "path": None})


def test_missing_files_and_empty_records_are_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="no such file"):
        decode(tmp_path / "none.png")
    with pytest.raises(UnreadableImage, match="empty"):
        decode({"bytes": None, "path": None})


def test_a_header_tells_an_image_from_other_files(tmp_path: Path) -> None:
    read_header(_encoded(picture("red")))
    read_header(np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(UnreadableImage):
        read_header({"bytes": b"text", "path": None})


def test_a_subset_keeps_images_labels_and_names_together() -> None:
    sources = [np.full((1, 1, 3), value, dtype=np.uint8) for value in range(5)]
    for held in (sources, np.stack(sources)):
        images = LabelledImages(sources=held, labels=np.arange(5), names=[str(i) for i in range(5)])
        chosen = images.subset([3, 1]).subset([1])
        assert (len(chosen), chosen.labels.tolist(), chosen.names) == (1, [1], ["1"])
        assert chosen.sources[0][0, 0, 0] == 1
