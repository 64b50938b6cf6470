"""Memory that a step needs beyond what lies there before and after it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at the highest point of one call of `step`, above the level it began at."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - begin
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    level = highest = 0
    # The profiler has no public list of single allocations; the sums it publishes know no highest point.
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    for _, change in changes:
        level += change
        highest = max(highest, level)
    return highest


def activation_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward in one call of `forward`, the model's own parameters left out.

    Memory that several operations keep is counted once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        # The tensor itself would hold the graph that holds it, and neither would ever be freed.
        x = x.detach()
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            # Holding it keeps its address from being given to another one.
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    total = sum(size for size, _ in kept.values())
    del output
    return total
