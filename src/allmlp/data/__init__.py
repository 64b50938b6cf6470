"""Where training data comes from, and how it reaches a model."""

from pathlib import Path, PurePath
from typing import Any

NAMES = "names"
"""What a batch calls the names of its examples: for messages, a model does not take them."""
PLACE = "place"
"""What a batch of a stream calls the place that its reader has come to: for going on from there."""


def as_is(batch: Any) -> Any:
    """The collate function of data whose `__getitems__`, or whose iterator, gives whole batches."""
    return batch


def is_hidden(path: PurePath) -> bool:
    """Whether a part of this path, which begins in a folder of data, has a dot in front: what systems leave there."""
    return any(part.startswith(".") for part in path.parts)


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder of data, at any depth and in order, without those that `is_hidden`."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path.relative_to(folder)))
