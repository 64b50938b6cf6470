"""Run by torchrun as each process of a training: trains the recipes it is given, one after another.

    torchrun … processes.py JOBS.json

JOBS maps a run directory to its settings, with `resume` among them where it is to go on.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from allmlp import training
from allmlp.training.recipe import RECIPES, make_recipe

if __name__ == "__main__":
    for output, settings in json.loads(Path(sys.argv[1]).read_text()).items():
        # or it would go on distributing as the last training did
        AcceleratorState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        recipe = make_recipe(settings["recipe"], RECIPES[settings["task"]])
        training.train(recipe, output, resume=settings.get("resume", False))
