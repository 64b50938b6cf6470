"""The checkpoints of a training in its run directory: `checkpoint-STEP` appears, and vanishes, all at once."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from allmlp.errors import UserError
from allmlp.files import UNFINISHED, finish

STATE = "trainer_state.json"
"""The Trainer's own account of a training; a checkpoint without it is none to go on from."""
AVERAGED = "ema.safetensors"
"""The averaged weights beside those that training goes on with, where there are any."""
_PREFIX = "checkpoint-"


def last_checkpoint(directory: str | Path, also: Sequence[str] = ()) -> Path | None:
    """The newest checkpoint in a run directory that a training can go on from, if there is one.

    Args:
        directory: the run directory.
        also: names of files that have to be in it beside `STATE`.
    """
    needed = (STATE, *also)
    complete = [path for path in checkpoints_in(directory) if all((path / name).is_file() for name in needed)]
    return complete[-1] if complete else None


def require_readable(checkpoint: Path) -> None:
    """Check that each file of a checkpoint can be read.

    Raises:
        UserError: if one is damaged, or holds what would have to be run.
    """
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                # What the Trainer reads, as it reads it; mapped, so that no tensor is read yet.
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # A damaged file fails anywhere in a parser.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
            raise UserError(
                f"{path} cannot be read: {reason}. Remove {checkpoint} to go on from the checkpoint before it."
            ) from error


def checkpoint_path(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run directory."""
    return Path(directory) / f"{_PREFIX}{step}"


def stream_places(checkpoint: Path, process: int) -> Path:
    """Where a checkpoint says how far a process has come in the texts that it streams."""
    return checkpoint / f"stream_{process}.json"


def unfinished_checkpoint(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is written until it is complete."""
    return checkpoint_path(Path(directory) / UNFINISHED, step)


def publish_checkpoint(directory: str | Path, step: int) -> Path:
    """Give a complete checkpoint its name, in one move that a crash cannot cut in two.

    Args:
        directory: the run directory.
        step: the optimiser step; the checkpoint lies where `unfinished_checkpoint` says.

    Returns:
        The checkpoint.
    """
    written = unfinished_checkpoint(directory, step)
    checkpoint = checkpoint_path(directory, step)
    for path in [*written.rglob("*"), written]:
        finish(path)
    if checkpoint.exists():
        _remove_at_once(checkpoint)
    os.replace(written, checkpoint)
    finish(checkpoint.parent)
    _remove_if_empty(written.parent)
    return checkpoint


def rotate_checkpoints(directory: str | Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the newest and the best, each of them at once.

    Args:
        directory: the run directory.
        keep: how many of the newest stay.
        best: the step of the one that stays in any case.
    """
    for checkpoint in checkpoints_in(directory)[:-keep]:
        if checkpoint_step(checkpoint) != best:
            _remove_at_once(checkpoint)


def checkpoints_in(directory: str | Path) -> list[Path]:
    """The checkpoints in a run directory, by their steps."""
    found = [path for path in Path(directory).glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _remove_at_once(checkpoint: Path) -> None:
    # It loses its name first, since files vanish one by one.
    grave = checkpoint.with_name(UNFINISHED) / f"{checkpoint.name}.removed"
    grave.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, grave)
    shutil.rmtree(grave)
    _remove_if_empty(grave.parent)


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
