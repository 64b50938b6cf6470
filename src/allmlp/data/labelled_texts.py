"""Texts with classes, from parquet or CSV files or the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from allmlp.data import NAMES
from allmlp.data.sampling import hold_out, ignored
from allmlp.data.shards import check_class_column
from allmlp.data.text_sources import Documents, is_table, read_tables, text_and_label
from allmlp.data.tokenization import first_tokens
from allmlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts and their classes.

    Attributes:
        texts: the texts.
        labels: [texts], indices of the classes.
    """

    texts: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def documents(self, name: str) -> Documents:
        """The texts alone."""
        return Documents(texts=self.texts, name=name)

    def subset(self, places: Sequence[int] | np.ndarray) -> "LabelledTexts":
        """The texts at these places."""
        return LabelledTexts(texts=[self.texts[place] for place in places], labels=self.labels[list(places)])


def read_labelled_texts(
    data: str, *, text_column: str | None = None, label_column: str | None = None
) -> tuple[tuple[str, ...], dict[str, LabelledTexts]]:
    """The classes' names, and the texts of `train` and, where the data has one, of `validation`.

    Args:
        data: a parquet, CSV or JSON Lines file, a folder of parquet files, or a Hub dataset's name.
        text_column: column of the texts; found by its name where not given.
        label_column: column of the classes; found by its name where not given.

    Raises:
        UserError: if there is no such data, it lacks a column, or a row has no text or a class of its own.
    """
    import datasets

    if not is_table(data):
        raise UserError(f"{data} is no table; texts with classes come from .parquet, .csv and .jsonl files.")
    tables = read_tables(data)
    text, label = text_and_label(tables["train"].column_names, data, text_column, label_column)
    feature = tables["train"].features[label]
    check_class_column(tables["train"].features, label, data)
    raw = {split: (table[text][:], table[label][:]) for split, table in tables.items()}
    if isinstance(feature, datasets.ClassLabel):
        names: Sequence[Any] = range(len(feature.names))
        classes = tuple(feature.names)
    else:
        names = sorted({value for value in raw["train"][1] if value not in (None, "")}, key=_class_order)
        classes = tuple(str(value) for value in names)
    number = {value: place for place, value in enumerate(names)}
    splits = {}
    for split, (texts, labels) in raw.items():
        for row, (content, value) in enumerate(zip(texts, labels, strict=True)):
            if not isinstance(content, str):
                raise UserError(f"Row {row} of {data} ({split}) has no text in column '{text}'.")
            if value in (None, ""):
                raise UserError(f"Row {row} of {data} ({split}) has no class in column '{label}'.")
            if value not in number:
                raise UserError(f"Row {row} of {data} ({split}) has the class {value!r}, which training has not.")
        splits[split] = LabelledTexts(texts=texts, labels=np.array([number[value] for value in labels], np.int64))
    return classes, splits


def load_labelled_texts(
    data: str, *, holdout: float, seed: int, text_column: str | None = None, label_column: str | None = None
) -> tuple[tuple[str, ...], LabelledTexts, LabelledTexts]:
    """The classes' names, what is learnt from and what is held out; arguments and errors as `read_labelled_texts`, and:

    Args:
        holdout: share of each class held out where the data has no validation split of its own.
        seed: of that cut.

    Raises:
        UserError: if there are fewer than two classes; or one has a single text, and the data no validation split.
    """
    classes, splits = read_labelled_texts(data, text_column=text_column, label_column=label_column)
    if len(classes) < 2:
        raise UserError(f"{data} has {len(classes)} class; telling texts apart takes at least two.")
    train = splits["train"]
    if "validation" in splits:
        return classes, train, splits["validation"]
    single = np.flatnonzero(np.bincount(train.labels) == 1)
    if len(single):
        raise UserError(
            f"Class '{classes[single[0]]}' of {data} has a single text, so none can be held out; "
            "add texts or give a validation split."
        )
    kept, held_out = hold_out(train.labels, holdout, seed)
    return classes, train.subset(kept), train.subset(held_out)


def _class_order(value: Any) -> tuple[str, Any, str]:
    """Numbers by their size, also where they are written as text; all else by its kind, such as dates."""
    is_number = value.isascii() and value.isdecimal() if isinstance(value, str) else isinstance(value, Number)
    return ("", float(value), str(value)) if is_number else (type(value).__name__, value, "")


class TextBatches(Dataset):
    """Labelled texts as batches: `{"input_ids", "attention_mask", "labels", "names"}`, padded to the longest.

    Args:
        texts: the texts and their classes.
        tokenizer: a tokenizer of transformers.
        context: tokens of a text that are read at most, the first ones.

    Raises:
        UserError: if the tokenizer cannot pad.
    """

    def __init__(self, texts: LabelledTexts, tokenizer: Any, context: int) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.ids = first_tokens(texts.texts, tokenizer, context)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        if not indices:
            return ignored(self.__getitems__([0]))
        chosen = [torch.from_numpy(self.ids[index]) for index in indices]
        return {
            "input_ids": self._padded(chosen, self.tokenizer.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(ids) for ids in chosen], 0),
            "labels": torch.from_numpy(self.texts.labels[indices]),
            NAMES: [self.texts.texts[index][:60] for index in indices],
        }

    def _padded(self, rows: list[Tensor], filling: int) -> Tensor:
        side = self.tokenizer.padding_side
        return pad_sequence(rows, batch_first=True, padding_value=filling, padding_side=side)
