"""What goes wrong in a training through nobody's mistake, each told in one message: a gradient that is no number, a
process that died, a disk that is full.
"""

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, distributed

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.training_checkpoints import last_checkpoint
from allmlp.distributed import is_first_process, missing_processes
from allmlp.errors import Diverged, TrainingError, UserError
from allmlp.files import NO_ROOM

_log = logging.getLogger(__name__)

PATIENCE = 20
"""Steps that may be skipped one after another."""
SHOWN = 5
"""Names in a message; `nan.jsonl` has them all."""
_NOT_WRITTEN = re.compile(r"No space left on device|Disk quota exceeded|File too large")
_CUT_OFF = re.compile(r"PytorchStreamWriter failed|inline_container\.cc|iostream error")
_WORKER = re.compile(r"DataLoader worker \(pid\S* ([\d, ]+)\) (is killed by signal: [\w ]+|exited unexpectedly)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What there is to say about an optimiser step that goes wrong.

    Attributes:
        number: the step, counted from 1.
        learning_rate: the rate it is to be taken with.
        norm: the norm of its gradient, [].
        losses: the losses of its batches, each [].
        names: what each of the batches is made of.
    """

    number: int
    learning_rate: float
    norm: Tensor
    losses: Sequence[Tensor]
    names: Sequence[Sequence[str]]


class Divergence:
    """Watches for gradients that are no numbers.

    It looks at all steps since it last looked, so that a training that stops at the first of them need not wait for the
    accelerator at each.

    Args:
        output: the run directory; its `nan.jsonl` gets a line for every such step.
        skip: pass over such a step; it must be looked at before it is taken.
    """

    def __init__(self, output: Path, *, skip: bool):
        self.output, self.skip = output, skip
        self.steps: list[Step] = []
        self.skipped = 0

    def look(self) -> bool:
        """Whether the last step is to be passed over.

        Raises:
            Diverged: if a gradient is no number, and is not to be passed over; or too many were, one after another.
        """
        steps, self.steps = self.steps, []
        norms = torch.stack([step.norm for step in steps]).tolist() if steps else []
        bad = next((step for step, norm in zip(steps, norms, strict=True) if not math.isfinite(norm)), None)
        if bad is None:
            self.skipped = 0 if steps else self.skipped
            return False
        what = self._description(bad)
        self.skipped += 1
        if not self.skip:
            raise Diverged(
                f"{what} Try a lower --lr, look at these examples, or pass over such steps with --nan skip. "
                f"{way_on(self.output)}"
            )
        if self.skipped == PATIENCE:
            raise Diverged(f"{what} So it was with the {PATIENCE - 1} steps before it. {way_on(self.output)}")
        _log.warning("skipped: %s", what)
        return True

    def _description(self, step: Step) -> str:
        losses = [loss.item() for loss in step.losses]
        broken = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
        names = [name for place in broken or range(len(losses)) for name in step.names[place]]
        value = losses[broken[0]] if broken else step.norm.item()
        reports: list[tuple[bool, float, list[str]]] = gather_object([(bool(broken), value, names)])
        # The processes whose own loss is no number, or all of them where it is the gradient alone.
        culprits = [report for report in reports if report[0]] or reports
        is_loss, value = culprits[0][:2]
        examples = [name for report in culprits for name in report[2]]
        if is_first_process():
            entry = {"step": step.number, "learning_rate": step.learning_rate}
            entry |= {"loss" if is_loss else "gradient_norm": str(value), "examples": examples}
            with (self.output / run_directory.FAULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        more = len(examples) - SHOWN
        rest = f" and {more} more, listed in {self.output / run_directory.FAULTS}" if more > 0 else ""
        # What is cut from a stream of text has no names.
        batch = f" Its batch: {', '.join(examples[:SHOWN])}{rest}." if examples else ""
        return (
            f"The {'loss' if is_loss else 'gradient'} of step {step.number:,} is {value} (learning rate "
            f"{step.learning_rate:.3g}).{batch}"
        )


@contextlib.contextmanager
def explained(output: str | Path) -> Iterator[None]:
    """Inside the block faults of the machine become one message.

    Args:
        output: the run directory.

    Raises:
        TrainingError: if a process died, or the disk is full.
        UserError: as in the process that raised it.
    """
    try:
        yield
    except UserError as error:
        # torch hands over an error of a process that prepares data with all of its traceback as the message.
        _, raised, message = str(error).rpartition("\nallmlp.")
        if not raised:
            raise
        raise UserError(message.partition(": ")[2].strip()) from error
    except (RuntimeError, OSError, SafetensorError) as error:
        message = _lost_process(error) or _dead_worker(error) or _full_disk(error, Path(output))
        if message is None:
            raise
        raise TrainingError(f"{message} {way_on(output)}") from error


def way_on(output: str | Path) -> str:
    """From where a training can go on, and how."""
    checkpoint = last_checkpoint(output)
    if checkpoint is None:
        return "There is no checkpoint to go on from yet."
    return f"{checkpoint} holds everything up to there; go on with: allmlp train --resume --output {output}"


def _dead_worker(error: Exception) -> str | None:
    found = _WORKER.search(str(error))
    if not found:
        return None
    return (
        f"A process that prepares data (pid {found[1]}) {found[2]}. Too little memory is the usual reason: "
        "try fewer of them (--workers)."
    )


def _full_disk(error: Exception, output: Path) -> str | None:
    if isinstance(error, OSError):
        reason = error.strerror if error.errno in NO_ROOM else None
    # safetensors and torch write by themselves, and only safetensors says why it cannot.
    elif found := _NOT_WRITTEN.search(str(error)):
        reason = found[0]
    else:
        reason = "a file breaks off" if _CUT_OFF.search(str(error)) else None
    if reason is None:
        return None
    return f"{output} cannot be written to: {reason}, {shutil.disk_usage(output).free / 2**20:,.0f} MiB are free."


def _lost_process(error: Exception) -> str | None:
    if not _is_of_connections(error):
        return None
    with _undisturbed():
        missing = missing_processes()
    if not missing:
        return None
    world = distributed.get_world_size()
    who = "process" if len(missing) == 1 else "processes"
    return f"Lost {who} {', '.join(map(str, missing))} of 0 to {world - 1}."


def _is_of_connections(error: Exception) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "Connection" in str(error)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside the block SIGTERM is passed over, which torchrun sends to all as soon as one is gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former: Any = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
