"""Where texts lie: one function per kind of place, each giving the documents of its splits.

Nothing is read as a whole: documents come one after another, from a file in pieces, as often as they are asked for.
"""

import codecs
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from allmlp.data import visible_files
from allmlp.data.image_sources import broken_shard
from allmlp.data.shards import (
    KINDS,
    TRAIN_NAMES,
    Row,
    Shards,
    find_shards,
    first_columns,
    measured,
    refuse_columns,
    refuse_missing_path,
    split_names,
)
from allmlp.errors import UserError, first_line

STDLIB = "python-stdlib"
TEXT_COLUMNS = ("text", "txt", "content", "sentence", "document", "review")
TABLES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
# Bytes of a file at a time, cut behind the last line end in them. Tokenizers share pieces out over threads, and need
# time and memory that grow faster than a piece.
_PIECE = 2**16


class Readable(Protocol):
    """Text in parts, which are `separated` where they have nothing to do with each other."""

    @property
    def separated(self) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A part of a plain text file, one document of any size.

    Attributes:
        path: the file.
        start: its first byte.
        stop: the byte behind its last one.
    """

    path: Path
    start: int
    stop: int
    separated = False

    def raw(self) -> np.ndarray:
        """The bytes, [bytes] uint8, on the disk."""
        size = self.stop - self.start
        if not size:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.start, shape=(size,))

    def __iter__(self) -> Iterator[str]:
        """The text, cut after line ends.

        Raises:
            UserError: if it is not UTF-8; the message says where.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest, place = "", self.start
        with self.path.open("rb") as file:
            file.seek(self.start)
            while place < self.stop:
                block = file.read(min(_PIECE, self.stop - place))
                try:
                    text = rest + decoder.decode(block, final=place + len(block) >= self.stop)
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.path, place + error.start - (len(error.object) - len(block))) from None
                place += len(block)
                cut = text.rfind("\n") + 1 or len(text)
                cut = len(text) if place >= self.stop else cut
                if cut:
                    yield text[:cut]
                rest = text[cut:]

    def cut(self, share: float) -> tuple["TextFile", "TextFile"]:
        """The file without its last `share`, and that share; no character is cut in two."""
        place = self.stop - max(1, round((self.stop - self.start) * share))
        while place > self.start and self.raw()[place - self.start] & 0xC0 == 0x80:
            place -= 1
        return (
            TextFile(path=self.path, start=self.start, stop=place),
            TextFile(path=self.path, start=place, stop=self.stop),
        )


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts that have nothing to do with each other: files, or rows of a table.

    Attributes:
        texts: the texts, or the files they are in.
        name: what the data is called.
        first: the first one's number among the rows of the data.
    """

    texts: Sequence[str | Path]
    name: str
    first: int = 0
    separated = True

    def __iter__(self) -> Iterator[str]:
        """The documents.

        Raises:
            UserError: if a file is not UTF-8; the message says where. Or a row holds no text.
        """
        for number, text in enumerate(self.texts, self.first):
            if isinstance(text, Path):
                yield "".join(TextFile(path=text, start=0, stop=text.stat().st_size)) if text.stat().st_size else ""
            elif isinstance(text, str):
                yield text
            else:
                raise UserError(f"Row {number} of {self.name} holds no text, but {type(text).__name__}.")

    def cut(self, share: float) -> tuple["Documents", "Documents"]:
        """The documents without the last `share` of them, and these."""
        count = max(1, round(len(self.texts) * share))
        if count >= len(self.texts):
            raise UserError(f"{self.name} has a single document: none can be held out. Give a validation split.")
        return (
            Documents(texts=self.texts[:-count], name=self.name, first=self.first),
            Documents(texts=self.texts[-count:], name=self.name, first=self.first + len(self.texts) - count),
        )


@dataclass(frozen=True, kw_only=True)
class TextShards:
    """Shards of documents that have nothing to do with each other, read as they are needed.

    Attributes:
        shards: where they lie.
        column: the column of the texts.
    """

    shards: Shards
    column: str
    separated = True

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[str]:
        """The documents, shard after shard."""
        for row in self.shards.rows(range(len(self))):
            yield self.text(row)

    def text(self, row: Row) -> str:
        """A row's text.

        Raises:
            UserError: if it holds none, or none in UTF-8.
        """
        value = row.values.get(self.column)
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{row.name} is not UTF-8: byte {error.start} is 0x{value[error.start]:02X}; convert the text."
                ) from None
        if not isinstance(value, str):
            raise UserError(f"{row.name} holds no text in column '{self.column}'.")
        return value

    def cut(self, share: float) -> tuple[Any, Any]:
        """Refused: nothing is held out of shards, of which no row is at hand.

        Raises:
            UserError: in any case.
        """
        name = self.shards.files[0]
        raise UserError(f"Nothing is held out of shards such as {name}: give some for validation, such as val-0000.")


Texts = TextFile | Documents | TextShards


def find_texts(data: str, text_column: str | None = None) -> dict[str, Texts]:
    """Recognise what `data` names.

    Args:
        data: `python-stdlib`, a text file, a folder of them (or one with `train` and maybe `val`), a parquet, CSV, JSON
            Lines or tar file, a folder of parquet or tar files, their address (`s3://…`), or a Hub dataset's name.
        text_column: the column of the texts in a table; found by its name where not given.

    Returns:
        The texts of `train` and, where the data has one, of `validation`.

    Raises:
        UserError: if there is no such data, it has no text, or a column is named and it is no table.
    """
    if not is_table(data):
        refuse_columns(data, text_column=text_column)
        return {"train": standard_library()} if data == STDLIB else _plain_texts(Path(data).expanduser(), data)
    shards = {} if _is_file_table(data) else find_shards(data)
    if shards and ("://" in data or shards["train"][0].endswith(".tar")):
        return {split: text_shards(files, data, text_column) for split, files in shards.items()}
    tables = read_tables(data)
    column = _column(tables["train"].column_names, data, text_column, TEXT_COLUMNS, "text", "--text-column")
    return {split: Documents(texts=_Column(table, column), name=data) for split, table in tables.items()}


def is_table(data: str) -> bool:
    """Whether `data` has columns: parquet, CSV, JSON Lines or tar files, or a dataset of the Hub."""
    if data == STDLIB:
        return False
    return _is_file_table(data) or bool(find_shards(data)) or not Path(data).expanduser().exists()


def _plain_texts(path: Path, data: str) -> dict[str, Texts]:
    """A text file; or a folder of them, its splits by the names of what lies right in it."""
    if path.is_file():
        return {"train": _text_file(path)}
    inside = {child.stem.lower(): child for child in path.iterdir() if child.is_dir() or child.suffix == ".txt"}
    if any(name in inside for name in TRAIN_NAMES):
        chosen = {split: inside[name] for split, name in split_names(inside, data).items()}
        return {
            split: _text_file(part) if part.is_file() else _text_folder(part, data) for split, part in chosen.items()
        }
    return {"train": _text_folder(path, data)}


def _text_file(path: Path) -> TextFile:
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty.")
    if path.suffix.lower() in _PACKED:
        raise UserError(f"{path} is packed, and its bytes are no text: unpack it.")
    return TextFile(path=path, start=0, stop=path.stat().st_size)


def _text_folder(path: Path, data: str) -> Documents:
    files = [file for file in visible_files(path) if file.suffix == ".txt"]
    if not files:
        raise UserError(f"{path} holds neither .txt nor {' nor '.join(KINDS)} files.")
    return Documents(texts=files, name=data)


def text_shards(files: Sequence[str], data: str, column: str | None = None) -> TextShards:
    """Shards of texts, none of them read yet.

    Args:
        files: paths or addresses.
        data: what they are called, for messages.
        column: the column of the texts; found by its name where not given.

    Raises:
        UserError: if they cannot be read, or have no such column.
    """
    column = _column(list(first_columns(files[0])), data, column, TEXT_COLUMNS, "text", "--text-column")
    sizes, _ = measured(files)
    return TextShards(shards=Shards(files=tuple(files), sizes=sizes, columns=(column,)), column=column)


def standard_library() -> Documents:
    """The source text of this Python's own standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if left_out.isdisjoint(file.relative_to(root).parts))
    if not files:
        raise UserError(f"This Python has no source of its standard library in {root}.")
    return Documents(texts=[file for file in files if _is_utf8(file)], name=STDLIB)


def read_tables(data: str) -> dict[str, Any]:
    """A file of a table, a folder of parquet files, or a dataset of the Hub, as tables on the disk.

    Of a CSV file every value is text as it stands there.

    Returns:
        `datasets.Dataset` of `train` and, where the data has one, of `validation`.

    Raises:
        UserError: if there is no such data, or it cannot be read.
    """
    import datasets

    path = Path(data).expanduser()
    try:
        if _is_file_table(data):
            kind = TABLES[_suffix(data)]
            found = datasets.load_dataset(kind, data_files={"train": str(path)}, **_settings(kind, path))
        elif path.exists():
            files = {name: list(files) for name, files in find_shards(data).items()}
            if files["train"][0].endswith(".tar"):
                raise UserError(f"{data} holds .tar files, whose rows can be read as texts, but not as a table.")
            found = datasets.load_dataset("parquet", data_files=files)
        else:
            refuse_missing_path(data)
            repository, _, configuration = data.partition(":")
            found = datasets.load_dataset(repository, configuration or None)
    except UserError:
        raise
    # datasets, the Hub's client and the readers each have errors of their own.
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        if not path.exists():
            what = f"neither {STDLIB}, nor a file or folder here, nor a Hub dataset that can be loaded"
            raise UserError(f"'{data}' is {what}: {reason}") from error
        shards = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
        raise UserError(f"{broken_shard(shards) or data} cannot be read as text: {reason}") from error
    return {split: found[name] for split, name in split_names(found, data).items()}


def _is_file_table(data: str) -> bool:
    return _suffix(data) in TABLES and Path(data).expanduser().is_file()


def _suffix(data: str) -> str:
    return Path(data).suffix.lower()


def _settings(kind: str, path: Path) -> dict[str, Any]:
    if kind != "csv":
        return {}
    import pandas

    # Pandas takes words such as NA and None for missing ones, and texts of digits for numbers.
    return {"converters": dict.fromkeys(pandas.read_csv(path, nrows=0).columns, str), "keep_default_na": False}


def text_and_label(columns: Sequence[str], data: str, text: str | None, label: str | None) -> tuple[str, str]:
    """The columns of texts and of classes: those given, or those with a usual name."""
    labels = ("label", "labels", "class", "target", "category")
    return (
        _column(columns, data, text, TEXT_COLUMNS, "text", "--text-column"),
        _column(columns, data, label, labels, "classes", "--label-column"),
    )


class _Column(Sequence[str]):
    """A column of a table on the disk, read row by row."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Column(self.table.select(range(*index.indices(len(self)))), self.column)
        return self.table[index][self.column]

    def __iter__(self) -> Iterator[str]:
        for batch in self.table.iter(batch_size=1000):
            yield from batch[self.column]


def _column(columns: Sequence[str], data: str, wanted: str | None, usual: Iterable[str], what: str, flag: str) -> str:
    listed = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"{data} has no column '{wanted}'; its columns are {listed}.")
        return wanted
    for name in usual:
        if name in columns:
            return name
    raise UserError(f"{data} has no column of {what} with a usual name; its columns are {listed}. Name it: {flag}.")


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(path: Path, place: int) -> UserError:
    with path.open("rb") as file:
        head = file.read(place + 1)
    line = head.count(b"\n") + 1 - (head[-1:] == b"\n")
    return UserError(
        f"{path} is not UTF-8: byte {place:,} (line {line:,}) is 0x{head[-1]:02X}. "
        "Convert it; a file that is the whole data may be learnt as bytes, which can be anything: --tokenizer bytes."
    )
