"""Image files as strangers send them: unusual ones with the pixels they show, and ones that are to be refused."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.pictures import picture

PIXELS = np.asarray(picture("red"))
GREY = np.repeat(PIXELS[..., :1], 3, axis=2)
PALETTE = np.array([[200, 50, 40], [50, 180, 60], [40, 60, 200]], dtype=np.uint8)
INDICES = (np.arange(PIXELS[..., 0].size) % 3).reshape(PIXELS.shape[:2]).astype(np.uint8)
# What a reader makes of the stored pixels, by EXIF's number of the orientation.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write; `rows` each begin with a filter byte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def black(width: int, height: int) -> bytes:
    """A valid PNG of one bit a pixel, a thousandth of its pixels large."""
    return png(width, height, depth=1, colour=0, rows=bytes((1 + -(-width // 8)) * height))


def legal(root: Path) -> dict[str, np.ndarray]:
    """Write unusual images and give the RGB pixels that each shows."""
    image, deep = Image.fromarray(PIXELS), PIXELS.astype(">u2") * 257
    grey = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    palette = Image.fromarray(INDICES)
    palette.putpalette(PALETTE.tobytes())
    second = Image.fromarray(255 - PIXELS)
    height, width = PIXELS.shape[:2]

    image.convert("CMYK").save(root / "cmyk.tif")
    Image.new("CMYK", (16, 12), (0, 200, 200, 40)).save(root / "cmyk.jpg", quality=100)
    grey.save(root / "grey16.png")
    grey.save(root / "grey16.tif")
    (root / "grey16.pgm").write_bytes(b"P5 %d %d 65535\n" % (width, height) + deep[..., 0].tobytes())
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (root / "rgb16.png").write_bytes(png(width, height, depth=16, colour=2, rows=rows))
    palette.save(root / "palette.gif")
    palette.save(root / "palette.png", bits=2)
    palette.save(root / "palette_with_holes.png", transparency=b"\0\x7f\xff")
    image.convert("RGBA").save(root / "alpha.png")
    image.convert("L").convert("1").save(root / "bilevel.png")
    for name, settings in (("png", {}), ("webp", {"lossless": True})):
        image.save(root / f"animated.{name}", save_all=True, append_images=[second, image], **settings)
    palette.save(root / "animated.gif", save_all=True, append_images=[second.convert("P")])
    image.save(root / "named_otherwise.jpg", "PNG")
    Image.fromarray(np.repeat(PIXELS[:1, :1], 100, axis=1)).save(root / "a_line.png")
    for orientation in UPRIGHT:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(root / f"turned_{orientation}.png", exif=exif)
    ink = (255 - np.array([0, 200, 200])) * (255 - 40) / 255
    return {
        "cmyk.tif": PIXELS,
        "cmyk.jpg": np.broadcast_to(ink.round().astype(np.uint8), PIXELS.shape),
        "grey16.png": GREY,
        "grey16.tif": GREY,
        "grey16.pgm": GREY,
        "rgb16.png": PIXELS,
        "palette.gif": PALETTE[INDICES],
        "palette.png": PALETTE[INDICES],
        "palette_with_holes.png": PALETTE[INDICES],
        "alpha.png": PIXELS,
        "bilevel.png": np.asarray(image.convert("L").convert("1").convert("RGB")),
        "animated.png": PIXELS,
        "animated.webp": PIXELS,
        "animated.gif": PALETTE[INDICES],
        "named_otherwise.jpg": PIXELS,
        "a_line.png": np.repeat(PIXELS[:1, :1], 100, axis=1),
        **{f"turned_{orientation}.png": turn(PIXELS) for orientation, turn in UPRIGHT.items()},
    }


def refused(root: Path, mark: Path) -> dict[str, str]:
    """Write files that are to be refused and give the reason of each; one would create `mark` if it were run."""
    whole = (root / "whole.png", root / "whole.jpg")
    for path in whole:
        Image.fromarray(PIXELS).resize((64, 64)).save(path)
    contents = {
        "empty.png": (b"", "not an image"),
        "text.png": (b"no image", "not an image"),
        "cut.png": (whole[0].read_bytes()[:200], "truncated"),
        "cut.jpg": (whole[1].read_bytes()[:-300], "truncated"),
        "bomb.png": (black(8193, 8192), "more than 67,108,864 pixels"),
        "larger_bomb.png": (black(10_000, 10_000), "more than 67,108,864 pixels"),
        "bomb_of_bombs.png": (png(100_000, 100_000, depth=1, colour=0, rows=b""), "more than 67,108,864 pixels"),
        "widest.png": (png(2**31 - 1, 2**31 - 1, depth=8, colour=2, rows=b""), "more than 67,108,864 pixels"),
        "tile.tif": (_tile(2**14), "more than 67,108,864 pixels"),
        "wide.png": (black(1_000_000, 1), "one side may be 100 times as long as the other at most"),
        "tall.png": (black(1, 101), "one side may be 100 times as long as the other at most"),
        "no_pixels.png": (png(0, 0, depth=8, colour=2, rows=b""), ""),
        "no_pixels.gif": (b"GIF89a" + bytes(7) + b",\0\0\0\0\0\0\0\0\0\x02\0;", ""),
        "program.png": (_postscript(mark), "not an image"),
        "program.eps": (_postscript(mark), "not an image"),
    }
    for name, (content, _) in contents.items():
        (root / name).write_bytes(content)
    for path in whole:
        path.unlink()
    Image.fromarray(PIXELS[..., 0].astype(np.float32) / 255).save(root / "float.tif")
    Image.fromarray(PIXELS[..., 0].astype(np.int32)).save(root / "integers.tif")
    os.mkfifo(root / "pipe.png")
    reasons = {name: reason for name, (_, reason) in contents.items()}
    return {**reasons, "float.tif": "32 bits", "integers.tif": "32 bits", "pipe.png": "not a file"}


def _tile(side: int) -> bytes:
    """A TIFF of 16 × 16 grey pixels in one compressed tile of `side` × `side`."""
    data = zlib.compress(bytes(1000))
    long, short = 4, 3
    entries = [(256, long, 16), (257, long, 16), (258, short, 8), (259, short, 8), (262, short, 1), (277, short, 1)]
    entries += [(322, long, side), (323, long, side), (324, long, 0), (325, long, len(data))]
    place = 8 + 2 + 12 * len(entries) + 4
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value or place) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + data


def _postscript(mark: Path) -> bytes:
    program = f"({mark}) (w) file closefile showpage"
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\n{program}\n%%EOF\n".encode()
