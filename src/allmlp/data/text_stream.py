"""Text that streams from shards as windows of tokens.

Legend of the shapes: B windows, N tokens of a window.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from allmlp.data import PLACE
from allmlp.data.image_sources import shards_to_stream
from allmlp.data.shards import shuffled
from allmlp.data.text import Masking, TextData
from allmlp.data.text_sources import STDLIB, TextShards, text_shards
from allmlp.data.tokenization import encode, make_tokenizer, token_ids
from allmlp.errors import UserError

_DOCUMENTS = 16


def streamed_text(
    data: str,
    *,
    tokenizer: Any = None,
    tokenizer_name: str = "bytes",
    trained_size: int | None = None,
    text_column: str | None = None,
) -> TextData:
    """The text to train on as shards, and tokens held out; arguments as `allmlp.data.text.load_text`.

    Raises:
        UserError: if there are no such shards or tokenizer, or none for validation.
    """
    if data == STDLIB:
        raise UserError(f"{data} cannot be streamed: that takes .parquet or .tar files.")
    shards = shards_to_stream(data)
    if "validation" not in shards:
        raise UserError(
            f"{data} streams, so nothing is held out of it: give shards for validation, such as val-0000.parquet."
        )
    train, validation = (text_shards(shards[split], data, text_column) for split in ("train", "validation"))
    if tokenizer is None:
        tokenizer = make_tokenizer(tokenizer_name, [train, validation], trained_size=trained_size)
    return TextData(tokenizer=tokenizer, train=train, validation=encode(validation, tokenizer))


@dataclass(frozen=True)
class Place:
    """Where a reader stands in its documents.

    Attributes:
        reader: its number.
        readers: how many share the documents out; among others the place says nothing.
        document: how many documents it is through with, over all epochs.
        token: how many tokens of the next one.
    """

    reader: int
    readers: int
    document: int = 0
    token: int = 0


class TokenStream(IterableDataset):
    """The batches of one process, `{"input_ids": Int[B, N], "labels": Int[B, N], "place": the fields of a Place}`,
    without end but for their number.

    Each process and worker reads a part of the documents, none of them twice before all have been read, and cuts them
    into windows one behind the other, an end-of-text token between two. Labels are as those of `TokenWindows`.

    Args:
        texts: the documents.
        tokenizer: a tokenizer of transformers.
        context: N.
        batch_size: B.
        batches: how many there are.
        seed: of the order and the masks.
        buffer: documents that each worker shuffles at a time.
        process: this process's number.
        processes: how many there are.
        masking: mask tokens instead of predicting the next ones.

    Raises:
        UserError: if the tokenizer has no end of text.
    """

    def __init__(
        self,
        texts: TextShards,
        tokenizer: Any,
        context: int,
        *,
        batch_size: int,
        batches: int,
        seed: int,
        buffer: int,
        process: int = 0,
        processes: int = 1,
        masking: Masking | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token to put between documents")
        self.texts, self.tokenizer, self.context, self.masking = texts, tokenizer, context, masking
        self.batch_size, self.batches, self.seed, self.buffer = batch_size, batches, seed, buffer
        self.process, self.processes = process, processes
        self.skipped, self.places = 0, tuple[Place, ...]()

    def __len__(self) -> int:
        return self.batches

    def go_on(self, batches: int, places: Iterable[Place]) -> None:
        """Give None in place of so many batches, for a training that has had them.

        Args:
            batches: how many.
            places: where the readers stood behind them; one without a place reads through what it does not give.
        """
        self.skipped, self.places = batches, tuple(places)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.process * workers + number, self.processes * workers
        known = [place for place in self.places if (place.reader, place.readers) == (reader, readers)]
        windows = self._windows(known[0] if known else Place(reader, readers))
        for index in range(number, self.batches, workers):
            if index < self.skipped and known:
                yield None
                continue
            batch = self._batch(itertools.islice(windows, self.batch_size), index)
            yield None if index < self.skipped else batch

    def _batch(self, windows: Iterable[tuple[np.ndarray, Place]], index: int) -> dict[str, Any]:
        drawn, (*_, place) = zip(*windows, strict=True)
        window = torch.from_numpy(np.stack(drawn).astype(np.int64))
        ids, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        if self.masking is None:
            return {"input_ids": ids, "labels": labels, "shift_labels": labels, PLACE: astuple(place)}
        chance = torch.Generator().manual_seed(hash((self.seed, self.process, index)) % 2**63)
        ids, labels = map(torch.stack, zip(*(self.masking.apply(row, chance) for row in ids), strict=True))
        return {"input_ids": ids, "labels": labels, PLACE: astuple(place)}

    def documents(self, reader: int, readers: int, epoch: int) -> Iterator[str]:
        """What one of several readers is given to read in an epoch.

        Raises:
            UserError: if there are fewer documents than readers.
        """
        count = len(self.texts)
        if count < readers:
            raise UserError(f"There are {count} documents for {readers} processes and workers: each needs one.")
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.texts.shards.files))
        part = range(count * reader // readers, count * (reader + 1) // readers)
        rows = self.texts.shards.rows(part, order.tolist())
        for row in shuffled(rows, self.buffer, np.random.default_rng((self.seed, epoch, reader))):
            yield self.texts.text(row)

    def _windows(self, place: Place) -> Iterator[tuple[np.ndarray, Place]]:
        """From a place on, [N + 1] tokens each, the last the first of the next window; and where that one begins."""
        reader, readers, document, token = astuple(place)
        epochs = (self.documents(reader, readers, epoch) for epoch in itertools.count())
        documents = itertools.islice(itertools.chain.from_iterable(epochs), document, None)
        held, lengths, end = np.empty(0, np.uint32), deque[int](), np.array([self.tokenizer.eos_token_id])
        passed = token
        while True:
            parts = [held]
            for ids in token_ids(list(itertools.islice(documents, _DOCUMENTS)), self.tokenizer):
                parts += [ids, end]
                lengths.append(len(ids) + 1)
            held = np.concatenate(parts)[passed:]
            passed = 0
            while len(held) > self.context:
                token += self.context
                while token >= lengths[0]:
                    token -= lengths.popleft()
                    document += 1
                yield held[: self.context + 1], Place(reader, readers, document, token)
                held = held[self.context :]
