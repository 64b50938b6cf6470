"""Labelled images that stream from shards as batches for a model."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from allmlp.data.image_batches import BatchMaker, ImageTransform
from allmlp.data.shards import ImageShards, Row, Share, shuffled


class ImageStream(BatchMaker, IterableDataset):
    """The batches of one process, in the order and with the augmentation of the epoch; see `BatchMaker` and `Share`.

    An epoch takes the shards in an order of its own, every image once. Each worker draws from a buffer of images, still
    encoded, so that memory does not grow with the data.

    Args:
        images: the images and their classes.
        transform: from a PIL image to uint8 pixels of the model's size.
        share: what this process takes.
        buffer: images that each worker shuffles at a time.
        seed: seed of the order and of the augmentation.
        settings: further arguments of `BatchMaker`.

    Attributes:
        skip: how many batches of an epoch are not made: None stands in their place, for a training that goes on from
            behind them.
    """

    def __init__(
        self,
        images: ImageShards,
        transform: ImageTransform,
        *,
        share: Share,
        buffer: int,
        seed: int,
        **settings: Any,
    ):
        super().__init__(transform, count=len(images), seed=seed, **settings)
        self.images, self.share, self.buffer = images, share, buffer
        self.skip = 0

    def __len__(self) -> int:
        """The batches of an epoch."""
        return self.share.batches

    def unreadable(self) -> list[str]:
        """Names of the images found broken while they were decoded."""
        shards = self.images.shards
        numbers = self.broken.nonzero().flatten().tolist()
        places = np.searchsorted(shards.starts, numbers, side="right") - 1
        found = zip(numbers, places.tolist(), strict=True)
        return [f"{shards.files[place]} row {number - shards.starts[place]}" for number, place in found]

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        seed = (int(self.seed or 0), self.epoch)
        order = np.random.default_rng(seed).permutation(len(self.images.shards.files))
        parts = self.share.parts()
        if not parts:
            return
        whole = range(parts[0].start, parts[-1].stop)
        rows = self.images.shards.rows(whole, order.tolist())
        drawn = shuffled(rows, self.buffer, np.random.default_rng((*seed, whole.start)))
        skipped = self.share.among_first(self.skip)
        for place, part in enumerate(parts):
            examples = self._examples(drawn, len(part))
            yield None if place < skipped else self.make_batch(examples)

    def _examples(self, rows: Iterator[Row], count: int) -> Sequence[tuple[int, Any, int, str]]:
        return [self.images.example(next(rows)) for _ in range(count)]
