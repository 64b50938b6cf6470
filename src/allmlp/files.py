"""Files that appear whole or not at all, whatever happens while they are written."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from allmlp.errors import UserError

UNFINISHED = ".unfinished"
"""How the names end of what is being written; a process that is killed leaves it behind."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a write for which there is no room."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        OSError: if nothing can be written there; it names `path`.
    """
    with _unfinished(Path(path)) as temporary:
        yield temporary
        finish(temporary)
        os.replace(temporary, path)


def check_writable(path: str | Path) -> None:
    """Raise the OSError that writing a file at `path` would end in, and leave everything as it is."""
    path = Path(path)
    # Parents that are missing would be made in the nearest one that is there.
    while not path.parent.exists():
        path = path.parent
    with _unfinished(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A path beside `path` that vanishes when the block ends; errors about it speak of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED) as folder:
            yield Path(folder) / path.name
    except OSError as error:
        if UNFINISHED not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file all at once: a reader sees the old one or the new one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file all at once."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def only_writer(directory: str | Path) -> Iterator[None]:
    """Keep a directory from others that ask for it in the same way, until the block ends.

    It is made where it is missing, and goes again if nothing has been written. Whoever has it loses it with its
    process, however that ends; processes forked from it have no part in it. Where there are no locks nobody is kept
    out.

    Raises:
        UserError: if another process has it.
    """
    directory = Path(directory)
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    try:
        with path.open("a") as file:
            if not _lock(file):
                raise UserError(f"{directory} is being written by another process: wait, or choose another directory.")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _lock(file: IO[str]) -> bool:
    """Lock a file, whether or not that means anything here; false where another process has locked it."""
    try:
        # filelock's locks pass to processes forked from this one, which outlive it by seconds when it is killed.
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def finish(path: Path) -> None:
    """Give a file the permissions of a new one, and wait until it, or a directory's list of names, is on the disk."""
    if os.name != "posix":
        return
    if path.is_file():
        # safetensors hides what it writes from all but its owner, whatever the umask and the folder say.
        probe = path.with_name(f".probe{UNFINISHED}")
        probe.touch()
        path.chmod(probe.stat().st_mode)
        probe.unlink()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
