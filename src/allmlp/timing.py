"""Times that can be compared: everything runs in turn in one process, and ratios are taken round by round."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What `time_in_turn` found about one contender.

    Attributes:
        milliseconds: median time of one call.
        ratio: median over the rounds of this contender's time over the first one's in the same round.
    """

    milliseconds: float
    ratio: float


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2, seconds: float = 0.0
) -> dict[str, Timing]:
    """Time functions interleaved, A B C A B C …, so that whatever slows the machine for a while slows all of them.

    In front of every timed call stands one that is not: another contender has just used the caches and the memory, and
    the threads of an inference engine go on spinning for a while behind its call.

    Args:
        contenders: functions by name; ratios are to the first.
        rounds: calls of each that are timed, at least.
        warmup: further calls of each, in front of the first round.
        seconds: go on with further rounds until this much time has passed.
    """
    for function in contenders.values():
        for _ in range(warmup):
            function()
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - begin < seconds:
        for name, function in contenders.items():
            function()
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            spent[name].append(time.perf_counter() - start)
        done += 1
    first = spent[next(iter(contenders))]
    return {
        name: Timing(
            milliseconds=1e3 * statistics.median(times),
            ratio=statistics.median(time / reference for time, reference in zip(times, first, strict=True)),
        )
        for name, times in spent.items()
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
