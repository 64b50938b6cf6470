"""What went wrong, said once and for people."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Something given to allmlp cannot be used; the message says what was given, what is allowed and where.

    The command line prints the message alone and exits with code 1.
    """


class Interrupted(Exception):
    """A training was asked to stop and has saved a checkpoint; the message says where, and how to go on.

    Attributes:
        by_scheduler: the wish came as SIGTERM, as schedulers send it: the command line then exits with code 0.
    """

    def __init__(self, message: str, *, by_scheduler: bool = False):
        super().__init__(message)
        self.by_scheduler = by_scheduler


class TrainingError(Exception):
    """A training cannot go on through no fault of its arguments; the message says why, and from where it can.

    The command line prints the message alone and exits with code 1.
    """


class Diverged(TrainingError):
    """The loss or its gradient is no number; every process of a distributed training says so."""


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write thousands of digits.
        return f"<a number of {x.bit_length():,} bits>" if x.bit_length() > 128 else str(x)


shown = _Short().repr
"""`repr` of bounded length, for what comes from a file: one that refers to itself may mean more than memory holds."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(names: Sequence[str], count: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:count]) + (f", … ({len(names) - count} more)" if len(names) > count else "")


def nearest(name: str, options: Iterable[str], count: int = 3) -> str:
    """A sentence offering the options closest in spelling to `name`, ready to append to a message.

    Args:
        name: what was given.
        options: what is allowed.
        count: offer at most this many.

    Returns:
        `" Did you mean 'a', 'b' or 'c'?"`, or an empty string when nothing is close.
    """
    close = [f"'{option}'" for option in difflib.get_close_matches(name, list(options), n=count, cutoff=0.5)]
    if not close:
        return ""
    return f" Did you mean {' or '.join(filter(None, [', '.join(close[:-1]), close[-1]]))}?"
