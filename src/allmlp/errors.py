"""What went wrong, said once and for people."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something given to allmlp cannot be used; the message says what was given, what is allowed and where.

    The command line prints the message alone and exits with code 1.
    """


class Interrupted(Exception):
    """A training was asked to stop and has saved a checkpoint; the message says where, and how to go on."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> str:
    """A sentence offering the options closest in spelling to `name`, ready to append to a message.

    Args:
        name: What was given.
        options: What is allowed.
        count: Offer at most this many.

    Returns:
        `" Did you mean 'a', 'b' or 'c'?"`, or an empty string when nothing is close.
    """
    close = [f"'{option}'" for option in difflib.get_close_matches(name, list(options), n=count, cutoff=0.5)]
    if not close:
        return ""
    return f" Did you mean {' or '.join(filter(None, [', '.join(close[:-1]), close[-1]]))}?"
