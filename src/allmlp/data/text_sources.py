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

from allmlp.data.image_sources import broken_shard
from allmlp.data.shards import find_shards, refuse_columns, refuse_missing_path, split_names
from allmlp.errors import UserError, first_line

STDLIB = "python-stdlib"
TEXT_COLUMNS = ("text", "txt", "content", "sentence", "document", "review")
# Read of a file at a time; what ends in it is never cut inside a line.
_PIECE = 2**22


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
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.start, shape=(self.stop - self.start,))

    def __iter__(self) -> Iterator[str]:
        """The text, cut after line ends.

        Raises:
            UserError: it is not UTF-8; the message says where.
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
        place = self.start + int((self.stop - self.start) * (1 - share))
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
    """

    texts: Sequence[str | Path]
    name: str
    separated = True

    def __iter__(self) -> Iterator[str]:
        """The documents.

        Raises:
            UserError: a file is not UTF-8; the message says where. Or a row holds no text.
        """
        for number, text in enumerate(self.texts):
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
            Documents(texts=self.texts[:-count], name=self.name),
            Documents(texts=self.texts[-count:], name=self.name),
        )


Texts = TextFile | Documents


def find_texts(data: str, text_column: str | None = None) -> dict[str, Texts]:
    """Recognises what `data` names.

    Args:
        data: `python-stdlib`, a text file, a folder of text or parquet files, a parquet file, or a Hub dataset's name.
        text_column: the column of the texts in a table; found by its name where not given.

    Returns:
        The texts of `train` and, where the data has one, of `validation`.

    Raises:
        UserError: there is no such data, it has no text, or a column is named and it is no table.
    """
    if is_table(data):
        tables = read_tables(data)
        column = _column(tables["train"].column_names, data, text_column, TEXT_COLUMNS, "text", "--text-column")
        return {split: Documents(texts=_Column(table, column), name=data) for split, table in tables.items()}
    refuse_columns(data, text_column=text_column)
    if data == STDLIB:
        return {"train": standard_library()}
    path = Path(data).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise UserError(f"{data} is empty.")
        return {"train": TextFile(path=path, start=0, stop=path.stat().st_size)}
    files = sorted(file for file in path.rglob("*.txt") if file.is_file())
    if not files:
        raise UserError(f"{data} holds neither .txt nor .parquet files.")
    return {"train": Documents(texts=files, name=data)}


def is_table(data: str) -> bool:
    """Whether `data` has columns: parquet and CSV files, or a dataset of the Hub."""
    path = Path(data).expanduser()
    if path.is_dir():
        return data != STDLIB and any(path.rglob("*.parquet"))
    return data != STDLIB and (path.suffix in (".parquet", ".csv") or not path.is_file())


def standard_library() -> Documents:
    """The source text of this Python's own standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if left_out.isdisjoint(file.relative_to(root).parts))
    if not files:
        raise UserError(f"This Python has no source of its standard library in {root}.")
    return Documents(texts=[file for file in files if _is_utf8(file)], name=STDLIB)


def read_tables(data: str) -> dict[str, Any]:
    """A parquet or CSV file, a folder of parquet files, or a dataset of the Hub, as tables on the disk.

    Returns:
        `datasets.Dataset` of `train` and, where the data has one, of `validation`.

    Raises:
        UserError: there is no such data, or it cannot be read.
    """
    import datasets

    path = Path(data).expanduser()
    try:
        if path.is_file():
            kind = "csv" if path.suffix == ".csv" else "parquet"
            found = datasets.load_dataset(kind, data_files={"train": str(path)})
        elif path.is_dir():
            found = datasets.load_dataset(
                "parquet", data_files={name: list(files) for name, files in find_shards(str(path)).items()}
            )
        else:
            refuse_missing_path(data)
            repository, _, configuration = data.partition(":")
            found = datasets.load_dataset(repository, configuration or None)
    except UserError:
        raise
    # datasets, the Hub's client and the readers each have errors of their own
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        shards = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
        raise UserError(f"{broken_shard(shards) or data} cannot be read as text: {reason}") from error
    return {split: found[name] for split, name in split_names(found, data).items()}


def find_text_column(columns: Sequence[str], data: str, wanted: str | None) -> str:
    """The column of texts: the one given, or one with a usual name.

    Raises:
        UserError: There is none.
    """
    return _column(columns, data, wanted, TEXT_COLUMNS, "text", "--text-column")


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
