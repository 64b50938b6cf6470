"""Which examples are held out, and which of the others a process takes in an epoch: together all, each once."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

IGNORED = -100
"""The label of what does not count in a loss or a score."""


def hold_out(labels: Int[np.ndarray, " examples"], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut labelled examples in two, class by class, the same way for the same seed.

    Args:
        labels: their classes, at least two of each.
        share: part of them held out: of each class as near to it as whole numbers allow, and in all at least as many,
            and left over, as there are classes.
        seed: seed of the cut.

    Returns:
        The places of what is kept and of what is held out, in order.
    """
    from sklearn.model_selection import train_test_split

    classes = len(np.unique(labels))
    count = min(max(round(share * len(labels)), classes), len(labels) - classes)
    kept, out = train_test_split(np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels.tolist())
    return np.sort(kept), np.sort(out)


class ShuffledBatches(Sampler[list[int]]):
    """One process's batches of the examples, in an order that depends on the seed and the epoch alone.

    A round takes `processes` × `batch_size` examples of the order, each process a part of that size. The last round
    shares out evenly what is left; a process that goes away empty-handed is given the empty batch, so that all have as
    many. A round therefore holds the same examples on one process as on several with smaller batches in proportion.

    Args:
        size: examples in all.
        batch_size: examples of a process and round.
        seed: seed of the order.
        process: this process's number.
        processes: how many there are.
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
