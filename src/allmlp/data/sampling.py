"""Which examples of an epoch which process takes: together all of them, each once."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

IGNORED = -100
"""The label of what does not count in a loss or a score."""


class ShuffledBatches(Sampler[list[int]]):
    """One process's batches of the examples, in an order that depends on the seed and the epoch alone.

    A round takes `processes` × `batch_size` examples of the order, each process a part of that size. The last round
    shares out evenly what is left; a process that goes away empty-handed is given the empty batch, so that all have as
    many. A round therefore holds the same examples on one process as on several with smaller batches in proportion.

    Args:
        size: Examples in all.
        batch_size: Examples of a process and round.
        seed: Seed of the order.
        process: This process's number.
        processes: How many there are.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, process: int = 0, processes: int = 1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order from here on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // (self.processes * self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        step = self.processes * self.batch_size
        for start in range(0, self.size, step):
            yield np.array_split(order[start : start + step], self.processes)[self.process].tolist()


def ignored(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The batch with labels that do not count: what a process computes that has no example left."""
    return {
        name: torch.full_like(value, IGNORED) if name in ("labels", "shift_labels") else value
        for name, value in batch.items()
    }
