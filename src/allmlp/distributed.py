"""Which process of a distributed training this is, and what the others say. Torch is loaded where it is needed."""

import os
import time
from datetime import timedelta
from typing import Any


def is_first_process() -> bool:
    """Whether this process speaks and writes: the first as torchrun numbers them, or the only one."""
    return process_index() == 0


def process_index() -> int:
    """This process's number, from 0, as torchrun numbers them over all machines."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """The processes of the training, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_count_here() -> int:
    """The processes of the training that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_restarted() -> bool:
    """Whether torchrun has started the processes anew (`--max-restarts`) because one of them had died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def join_again(backend: str | None = None) -> None:
    """Where torchrun has started the processes anew: let them meet where those before have left no addresses.

    torchrun's rendezvous outlives a restart, and whoever is there first would read where the dead ones listened.

    Args:
        backend: torch's name of how the processes exchange tensors; by default what each kind of device needs.
    """
    from torch import distributed

    if not is_restarted() or process_count() == 1 or distributed.is_initialized():
        return
    store, rank, size = next(distributed.rendezvous("env://", timeout=timedelta(minutes=30)))
    store = distributed.PrefixStore(f"allmlp/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def largest_anywhere(value: int, device: Any = "cpu") -> int:
    """The largest of the values that the processes of a training give; all of them have to call this together.

    Args:
        value: what this process gives.
        device: where the processes exchange what they compute; an accelerator is waited for.
    """
    import torch
    from torch import distributed

    if not _several():
        return value
    values = torch.tensor(value, device=device)
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return int(values)


def missing_processes(patience: float = 5.0) -> list[int]:
    """A roll call among the processes of a training: the ranks that have not answered after so many seconds."""
    from torch import distributed

    if not _several():
        return []
    # Every process answers and counts the answers at the rendezvous, which torchrun's agent keeps alive.
    store: Any = distributed.distributed_c10d._get_default_store()
    missing = set(range(distributed.get_world_size())) - {distributed.get_rank()}
    try:
        store.set(_present(distributed.get_rank()), "")
        deadline = time.monotonic() + patience
        while missing and time.monotonic() < deadline:
            missing -= {rank for rank in missing if store.check([_present(rank)])}
            time.sleep(0.05)
    except RuntimeError:
        # Without an agent the first process keeps the rendezvous.
        return [0]
    return sorted(missing)


def _present(rank: int) -> str:
    # The rendezvous outlives a restart, and remembers.
    return f"allmlp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/present/{rank}"


def _several() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
