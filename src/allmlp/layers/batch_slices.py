"""When a large batch runs through a model's blocks a few samples at a time, in inference on a CPU.

What a block's layers make of the whole batch is more than the allocator keeps (`allmlp.allocator`): the system hands it
out anew, page by page, at every call.
"""

from torch import Tensor, nn

from allmlp.allocator import LARGEST_KEPT_BYTES
from allmlp.layers.recomputing import is_watched
from allmlp.ops.execution import is_plain_inference

# Well below what the allocator hands back.
_SLICE_BYTES = 16 << 20
# Of the layers of a block the widest is about so many times as wide as its input.
_EXPANSION = 4


def runs_in_slices(model: nn.Module, x: Tensor) -> bool:
    """Whether blocks should be given the batch `x` in slices, in plain inference with nobody watching the model.

    Args:
        model: whose blocks they are.
        x: what the first one is given, the batch along its first axis.
    """
    if not is_plain_inference() or model.training or type(x) is not Tensor or not x.is_cpu:
        return False
    if slice_size(x, x.shape[0]) >= x.shape[0]:
        return False
    return not any(map(is_watched, model.modules()))


def slice_size(x: Tensor, batch: int) -> int:
    """How many of `batch` samples like those of `x` a block should be given at once."""
    sample = _EXPANSION * x.shape[1:].numel() * x.element_size()
    return batch if sample * batch <= LARGEST_KEPT_BYTES else max(1, _SLICE_BYTES // sample)
