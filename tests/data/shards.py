"""Small shards of images, written by the tests themselves."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int, size: int = 8) -> bytes:
    """A PNG whose colour tells its number and whose brightness its class (number modulo 3)."""
    pixels = np.random.default_rng(number).integers(0, 40, (size, size, 3)) + 70 * (number % 3)
    encoded = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def write_tars(folder: Path, sizes: tuple[int, ...], split: str = "train", first: int = 0) -> None:
    """WebDataset shards: `NUMBER.png` beside `NUMBER.cls`."""
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{split}-{shard:04}.tar", "w") as archive:
            for _ in range(size):
                for ending, content in (("png", picture(number)), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                number += 1


def write_parquet(folder: Path, sizes: tuple[int, ...], split: str = "train", first: int = 0) -> None:
    """Parquet shards with an image and a label column, five rows a group."""
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for shard, size in enumerate(sizes):
        rows = [
            {"image": {"bytes": picture(each), "path": f"{each}.png"}, "label": each % 3}
            for each in range(number, number + size)
        ]
        schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}-{shard:04}.parquet", row_group_size=5)
        number += size
