"""What the processes of a training tell each other."""

import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

from allmlp.distributed import is_first_process, is_restarted, largest_anywhere, missing_processes
from allmlp.errors import TrainingError
from allmlp.training.faults import explained


def test_torchrun_tells_who_and_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_first_process()
    assert not is_restarted()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not is_first_process()
    assert is_restarted()


def test_a_process_alone_agrees_with_itself_and_misses_nobody() -> None:
    assert largest_anywhere(15) == 15
    assert missing_processes() == []


def _speak(rank: int, folder: Path) -> None:
    """One of three processes: the second is killed, and the others lose it in a sum."""
    store = distributed.FileStore(str(folder / "store"), 3)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
    said = [str(largest_anywhere(signal.SIGTERM if rank == 1 else 0))]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with explained(folder):
            distributed.all_reduce(torch.ones(3))
    except TrainingError as error:
        said.append(str(error))
    (folder / str(rank)).write_text("\n".join(said))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_processes_agree_and_name_the_one_that_is_gone(tmp_path: Path) -> None:
    children = []
    for rank in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            children.append(os.fork())
        if not children[-1]:
            try:
                _speak(rank, tmp_path)
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    for rank in (0, 2):
        assert (tmp_path / str(rank)).read_text().splitlines() == [
            "15",
            "Lost process 1 of 0 to 2. There is no checkpoint to go on from yet.",
        ]
