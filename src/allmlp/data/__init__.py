"""Where training data comes from, and how it reaches a model."""

from typing import Any

NAMES = "names"
"""What a batch calls the names of its examples: for messages, a model does not take them."""
PLACE = "place"
"""What a batch of a stream calls the place that its reader has come to: for going on from there."""


def as_is(batch: Any) -> Any:
    """The collate function of data whose `__getitems__`, or whose iterator, gives whole batches."""
    return batch
