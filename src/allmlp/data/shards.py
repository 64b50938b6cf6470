"""Shards of examples, read one after another and never as a whole: parquet files and WebDataset's tar files.

Files are opened through fsspec, so that a shard may be a path, `hf://…`, `s3://…` or whatever else fsspec has.
"""

import contextlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from allmlp.data import is_hidden
from allmlp.data.labelled_images import SUFFIXES
from allmlp.errors import UserError, shown

KINDS = (".parquet", ".tar")
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test", "eval")
INFO, CLASS_NAMES = "_info.json", "classnames.txt"
_ROWS = 64
_BUFFER = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """An example of a shard.

    Attributes:
        number: its place among all examples, shard after shard.
        name: where it lies, for messages.
        values: its columns; of a tar file its members by their endings, in bytes.
    """

    number: int
    name: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Shards of one kind and how many examples each holds.

    Attributes:
        files: paths or addresses.
        sizes: examples of each.
        columns: what is read of an example; of a tar file all of it is.
    """

    files: tuple[str, ...]
    sizes: tuple[int, ...]
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    @cached_property
    def starts(self) -> list[int]:
        """The number of each shard's first example."""
        return [0, *np.cumsum(self.sizes[:-1]).tolist()]

    def rows(self, part: range, order: Sequence[int] | None = None) -> Iterator[Row]:
        """A part of the examples, the shards following each other in this order (by default their own)."""
        first = 0
        for shard in range(len(self.files)) if order is None else order:
            start, stop = (min(max(end - first, 0), self.sizes[shard]) for end in (part.start, part.stop))
            if start < stop:
                file = self.files[shard]
                rows = _tar_rows(file) if file.endswith(".tar") else _parquet_rows(file, self.columns, start)
                begin = 0 if file.endswith(".tar") else start
                place = begin
                for values in itertools.islice(rows, stop - begin):
                    if place >= start:
                        yield Row(number=self.starts[shard] + place, name=f"{file} row {place}", values=values())
                    place += 1
                if place < stop:
                    raise UserError(f"{file} ends after {place:,} of its {self.sizes[shard]:,} examples.")
            first += self.sizes[shard]


@dataclass(frozen=True, kw_only=True)
class ImageShards:
    """Shards of labelled images.

    Attributes:
        shards: where they lie.
        image: the column of the images; None: of a tar file's row the first member whose ending is that of an image.
        label: the column of the classes.
        index: from what stands in that column to the class.
    """

    shards: Shards
    image: str | None
    label: str
    index: Mapping[Any, int]

    def __len__(self) -> int:
        return len(self.shards)

    def example(self, row: Row) -> tuple[int, dict[str, Any], int, str]:
        """A row as `BatchMaker.make_batch` takes it: its number, the image, its class, its name.

        Raises:
            UserError: if it has no class, or one that is not in the index; or something else than an image.
        """
        column = self.image or next((ending for ending in row.values if f".{ending}" in SUFFIXES), None)
        image = row.values.get(column) if column else None
        if isinstance(image, bytes):
            image = {"bytes": image}
        elif isinstance(image, str):
            image = {"path": image}
        elif image is None:
            image = {}
        elif not isinstance(image, Mapping):
            raise UserError(f"{row.name} has {shown(image)} in '{column}', which is no image.")
        source = {part: image.get(part) for part in ("bytes", "path")}
        label = label_value(row.values.get(self.label))
        if label not in self.index:
            raise UserError(f"{row.name} has {shown(label)} in '{self.label}', which is no class.")
        return row.number, source, self.index[label], row.name


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of an epoch that one process, or one of its workers, takes of a number of examples.

    Processes take parts whose sizes differ by one at most, and all of them as many batches; a process that lacks an
    example for its last batch is left with an empty one. Its workers take whole batches.

    Attributes:
        examples: in all.
        batch_size: examples of a batch.
        process: this process's number.
        processes: how many there are.
    """

    examples: int
    batch_size: int
    process: int = 0
    processes: int = 1

    @property
    def batches(self) -> int:
        """The batches of every process."""
        return -(-self.examples // (self.processes * self.batch_size))

    def parts(self) -> list[range]:
        """The places, in the epoch's order, of each batch of this worker."""
        first, last = (self.examples * end // self.processes for end in (self.process, self.process + 1))
        starts = (first + batch * self.batch_size for batch in self._batches_of(*_worker()))
        return [range(min(start, last), min(start + self.batch_size, last)) for start in starts]

    def among_first(self, batches: int) -> int:
        """How many of this worker's batches are among the first ones of its process, to which workers give in turn."""
        number, workers = _worker()
        turns = ((turn, worker) for worker in range(workers) for turn in range(len(self._batches_of(worker, workers))))
        return sum(worker == number for _, worker in sorted(turns)[:batches])

    def _batches_of(self, worker: int, workers: int) -> range:
        return range(self.batches * worker // workers, self.batches * (worker + 1) // workers)


def _worker() -> tuple[int, int]:
    """The number of this worker among those that prepare data for the process, and how many they are."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def shuffled(rows: Iterator[Row], buffer: int, random: np.random.Generator) -> Iterator[Row]:
    """The rows, each drawn at random from a buffer of so many."""
    held: list[Row] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        place = int(random.integers(len(held)))
        held[place], row = row, held[place]
        yield row
    random.shuffle(held)  # type: ignore[arg-type]
    yield from held


def find_shards(data: str) -> dict[str, tuple[str, ...]]:
    """The shards that `data` names, by split; none where it names something else.

    A split is told from a word in the files' names or folders, such as `train-0000.tar` or `val/0000.tar`; all files
    are `train` where none says so. What is left out is what `split_names` leaves out.

    Args:
        data: a shard, a folder of them, or a pattern (`s3://bucket/photos/*.tar`).

    Raises:
        UserError: if an address cannot be listed, or holds no shards, or shards of both kinds.
    """
    import fsspec

    remote = "://" in data
    try:
        system, root = fsspec.url_to_fs(data if remote else os.path.expanduser(data))
        if "*" in root:
            found = system.glob(root)
        elif system.isdir(root):
            found = system.find(root)
        else:
            found = [root] if system.exists(root) else []
    # Each file system has errors of its own.
    except Exception as error:
        if not remote:
            return {}
        raise UserError(f"{data} cannot be read: {str(error).strip() or type(error).__name__}") from error
    base = (root.rstrip("/") if system.isdir(root) else root.partition("*")[0].rpartition("/")[0]) + "/"
    names = {file: file.removeprefix(base) for file in found}
    files = sorted(file for file in found if file.endswith(KINDS) and not is_hidden(PurePosixPath(names[file])))
    if not files:
        if remote:
            raise UserError(f"{data} holds no shards, neither .parquet nor .tar files.")
        return {}
    if len({PurePosixPath(file).suffix for file in files}) > 1:
        raise UserError(f"{data} holds both .parquet and .tar files; name those that are meant.")
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", names[file].lower())
        held_out = next((name for name in VALIDATION_NAMES if name in words), None)
        split = "train" if held_out is None or any(word in TRAIN_NAMES for word in words) else held_out
        splits.setdefault(split, []).append(system.unstrip_protocol(file) if remote else file)
    if "train" not in splits:
        splits = {"train": [file for members in splits.values() for file in members]}
    return {split: tuple(splits[name]) for split, name in split_names(splits, data).items()}


def split_names(found: Collection[Any], data: str) -> dict[str, str]:
    """Which of a data set's splits is `train`, and which, if any, is `validation`: the first of `VALIDATION_NAMES`.

    Raises:
        UserError: if it has several, and none of them for training.
    """
    train = next((name for name in TRAIN_NAMES if name in found), None)
    if train is None:
        if len(found) != 1:
            raise UserError(f"{data} has no training split; its splits are {', '.join(map(str, found))}.")
        return {"train": next(iter(found))}
    validation = next((name for name in VALIDATION_NAMES if name in found), None)
    return {"train": train} | ({"validation": validation} if validation else {})


def check_class_column(features: Mapping[str, Any], column: str, data: str) -> None:
    """Check that a table's column, of one of datasets' types, can hold classes.

    Raises:
        UserError: if its values are lists, images or the like.
    """
    import datasets

    if not isinstance(features[column], (datasets.ClassLabel, datasets.Value)):
        kind = type(features[column]).__name__.lower()
        raise UserError(f"Column '{column}' of {data} holds no classes, but values of type {kind}.")


def refuse_columns(data: str, **columns: str | None) -> None:
    """Check that no column of `data`, which is no table, is named.

    Raises:
        UserError: if one is.
    """
    for name, column in columns.items():
        if column is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{data} is no table, so it has no column '{column}'; leave {flag} out.")


def refuse_missing_path(data: str) -> None:
    """Check that `data`, which is no file or folder, may be a dataset's name on the Hub.

    Raises:
        UserError: if it can only be a path.
    """
    if data.startswith((".", "/", "~")) or data.count("/") > 1 or (os.sep != "/" and os.sep in data):
        raise UserError(f"There is no file or folder {data}.")


def measured(files: Sequence[str], column: str | None = None) -> tuple[tuple[int, ...], list[Any]]:
    """How many examples each shard holds; and, where a column is named, its values, each once.

    Of parquet files it takes the footers (and the column); of tar files the names of the members (and those members),
    unless timm's `_info.json` beside them has the lengths and no column is asked for.
    """
    if column is None and files[0].endswith(".tar"):
        known = _read_beside(files[0], INFO)
        if known is not None:
            try:
                lengths = {
                    str(name): int(size)
                    for split in json.loads(known)["splits"].values()
                    for name, size in zip(split["filenames"], split["shard_lengths"], strict=True)
                }
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{INFO} beside {files[0]} is not as timm writes it.") from error
            names = [PurePosixPath(file).name for file in files]
            if all(name in lengths for name in names):
                return tuple(lengths[name] for name in names), []
    sizes, values = [], set()
    for file in files:
        if file.endswith(".tar"):
            count = 0
            for read in _tar_rows(file, only=column):
                count += 1
                if column is not None:
                    values.add(label_value(read().get(column)))
            sizes.append(count)
        else:
            count, found = _parquet_column(file, column)
            sizes.append(count)
            values |= found
    return tuple(sizes), sorted(values - {None}, key=lambda value: (str(type(value)), value))


def label_value(raw: Any) -> Any:
    """A class as a table holds it; a tar file's member is text, or the digits of a number."""
    if isinstance(raw, bytes):
        text = raw.decode("utf-8", "replace").strip()
        return int(text) if text.isdecimal() else text
    return raw


def class_names(file: str) -> tuple[str, ...] | None:
    """The lines of `classnames.txt` beside a shard, if it is there."""
    text = _read_beside(file, CLASS_NAMES)
    return None if text is None else tuple(text.decode("utf-8").strip().splitlines())


def first_columns(file: str) -> Mapping[str, Any]:
    """A parquet file's columns with their types (`datasets.Features`), or the endings of a tar file's first row."""
    if file.endswith(".tar"):
        with contextlib.closing(_tar_rows(file)) as rows:
            row = next(rows, None)
            return {} if row is None else dict.fromkeys(row())
    import datasets
    import pyarrow.parquet as pq

    with _opened(file) as stream, _readable(file):
        return datasets.Features.from_arrow_schema(pq.read_schema(stream))


def _parquet_rows(file: str, columns: Sequence[str], start: int) -> Iterator[Any]:
    """From a row on, each as a function that gives its values."""
    import pyarrow.parquet as pq

    with _opened(file) as stream, _readable(file):
        # Or it would read all of a column that a group of rows has, which may be gigabytes of images.
        table = pq.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if start >= size:
                start -= size
                continue
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=list(columns) or None):
                skipped = min(start, len(batch))
                start -= skipped
                for values in batch.slice(skipped).to_pylist():
                    yield lambda values=values: values


def _parquet_column(file: str, column: str | None) -> tuple[int, set[Any]]:
    import pyarrow.parquet as pq

    with _opened(file) as stream, _readable(file):
        table = pq.ParquetFile(stream)
        values = set() if column is None else set(table.read([column])[column].unique().to_pylist())
        return table.metadata.num_rows, values


def _tar_rows(file: str, only: str | None = None) -> Generator[Any, None, None]:
    """WebDataset's rows: consecutive members whose names are the same up to the first dot.

    Each is a function that gives its members by their endings; what nobody asks for is not read. It must be called
    before the next row is.
    """
    with _opened(file) as stream, _readable(file), tarfile.open(fileobj=stream, mode="r:") as archive:
        key, members = None, {}
        for member in archive:
            # Or it would remember them all.
            archive.members = []  # type: ignore[attr-defined]
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            # Hidden files, such as macOS adds, belong to no row.
            if not member.isfile() or not stem:
                continue
            if members and (folder, stem) != key:
                yield lambda found=members: _read(archive, found, only)
                members = {}
            key = folder, stem
            members[ending.lower()] = member
        if members:
            yield lambda found=members: _read(archive, found, only)


def _read(archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], only: str | None) -> dict[str, bytes]:
    return {
        ending: archive.extractfile(member).read()  # type: ignore[union-attr]
        for ending, member in members.items()
        if only is None or ending == only
    }


def _read_beside(file: str, name: str) -> bytes | None:
    import fsspec

    system, path = fsspec.url_to_fs(f"{file.rpartition('/')[0] or '.'}/{name}")
    return system.cat_file(path) if system.exists(path) else None


def _opened(file: str) -> Any:
    import fsspec

    system, path = fsspec.url_to_fs(file)
    return system.open(path, "rb")


class _readable:
    """Inside the block a shard that is broken is an error that names it."""

    def __init__(self, file: str):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, (tarfile.TarError, pa.ArrowException)):
            raise UserError(f"{self.file} cannot be read: {error}") from error
