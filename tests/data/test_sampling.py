"""What each process takes of an epoch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from allmlp.data.sampling import IGNORED, ShuffledBatches, ignored


def _all(size: int, batch_size: int, processes: int, epoch: int = 0, seed: int = 0) -> list[list[list[int]]]:
    """The batches of each process."""
    found = []
    for process in range(processes):
        batches = ShuffledBatches(size, batch_size, seed=seed, process=process, processes=processes)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


@given(size=st.integers(1, 60), batch_size=st.integers(1, 9), processes=st.integers(1, 5), epoch=st.integers(0, 3))
def test_every_example_comes_once_and_all_have_as_many_batches(
    size: int, batch_size: int, processes: int, epoch: int
) -> None:
    found = _all(size, batch_size, processes, epoch)
    assert sorted(i for batches in found for batch in batches for i in batch) == list(range(size))
    assert len({len(batches) for batches in found}) == 1
    for together in zip(*found, strict=True):
        sizes = [len(batch) for batch in together]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size


@given(size=st.integers(1, 60), batch_size=st.integers(1, 9), processes=st.integers(2, 5))
def test_a_round_holds_the_same_examples_on_one_process_as_on_several(
    size: int, batch_size: int, processes: int
) -> None:
    alone = _all(size, batch_size * processes, 1)[0]
    together = _all(size, batch_size, processes)
    for whole, parts in zip(alone, zip(*together, strict=True), strict=True):
        assert [i for part in parts for i in part] == whole


def test_the_order_follows_seed_and_epoch() -> None:
    first = _all(50, 8, 1)
    assert _all(50, 8, 1) == first
    assert _all(50, 8, 1, epoch=1) != first
    assert _all(50, 8, 1, seed=1) != first


def test_ignored_labels_do_not_count() -> None:
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3), "shift_labels": torch.ones(2, 3)}
    found = ignored(batch)
    assert (found["input_ids"] == 1).all()
    assert (found["labels"] == IGNORED).all()
    assert (found["shift_labels"] == IGNORED).all()
