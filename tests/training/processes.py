"""Run by torchrun as each process of a training: trains the recipes it is given, one after another.

    torchrun … processes.py JOBS.json

JOBS maps a run directory to its settings, with `resume` among them where it is to go on.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from allmlp import training
from allmlp.training.recipe import RECIPES, make_recipe

_initialise = AcceleratorState.__init__


def _shard_on_processors_too(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
    """Accelerate leaves weights whole where there is no accelerator; FSDP2 itself works there as everywhere."""
    _initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _shard_on_processors_too
    for output, settings in json.loads(Path(sys.argv[1]).read_text()).items():
        # Or it would go on distributing as the last training did.
        AcceleratorState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        recipe = make_recipe(settings["recipe"], RECIPES[settings["task"]])
        training.train(recipe, output, resume=settings.get("resume", False))
