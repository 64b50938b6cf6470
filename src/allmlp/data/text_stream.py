"""Text that streams from shards as windows of tokens.

Legend of the shapes: B windows, N tokens of a window.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

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
    shards = shards_to_stream(data, streaming=True)
    if "validation" not in shards:
        raise UserError(
            f"{data} streams, so nothing is held out of it: give shards for validation, such as val-0000.parquet."
        )
    train, validation = (text_shards(shards[split], data, text_column) for split in ("train", "validation"))
    if tokenizer is None:
        tokenizer = make_tokenizer(tokenizer_name, [train, validation], trained_size=trained_size)
    return TextData(tokenizer=tokenizer, train=train, validation=encode(validation, tokenizer))


class TokenStream(IterableDataset):
    """The batches of one process, `{"input_ids": Int[B, N], "labels": Int[B, N]}`, without end but for their number.

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

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.process * workers + number, self.processes * workers
        windows = self._windows(reader, readers)
        chance = torch.Generator().manual_seed(hash((self.seed, reader)) % 2**63)
        for _ in range(number, self.batches, workers):
            window = torch.from_numpy(np.stack([next(windows) for _ in range(self.batch_size)]).astype(np.int64))
            if self.masking is None:
                labels = window[:, 1:].contiguous()
                yield {"input_ids": window[:, :-1].contiguous(), "labels": labels, "shift_labels": labels}
            else:
                masked = [self.masking.apply(row, chance) for row in window[:, :-1]]
                ids, labels = (torch.stack(rows) for rows in zip(*masked, strict=True))
                yield {"input_ids": ids, "labels": labels}

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

    def _windows(self, reader: int, readers: int) -> Iterator[np.ndarray]:
        """[N + 1] tokens each, the last of which is the first of the next one."""
        epochs = (self.documents(reader, readers, epoch) for epoch in itertools.count())
        documents = itertools.chain.from_iterable(epochs)
        held = np.empty(0, np.uint32)
        while True:
            texts = list(itertools.islice(documents, _DOCUMENTS))
            parts = [held]
            for ids in token_ids(texts, self.tokenizer):
                parts += [ids, np.array([self.tokenizer.eos_token_id])]
            held = np.concatenate(parts)
            while len(held) > self.context:
                yield held[: self.context + 1]
                held = held[self.context :]
