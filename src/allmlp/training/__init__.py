"""From a recipe to a trained run directory, and what a run directory knows."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allmlp.training.recipe import Recipe

# The modules are imported when their task comes up: the command line's help needs none of them.
_TRAINERS = {
    "image-classification": "allmlp.training.vision",
    "text-generation": "allmlp.training.language",
    "fill-mask": "allmlp.training.language",
    "text-classification": "allmlp.training.language",
}


def train(recipe: Recipe, output: str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train what the recipe's task says and write the run directory.

    Args:
        recipe: the hyper-parameters.
        output: the run directory.
        resume: go on from the last checkpoint in it.
        overwrite: replace a former run in it.

    Returns:
        What its `metrics.json` holds.

    Raises:
        UserError: if data, model or run directory cannot be used.
        Interrupted: if it was asked to stop and has saved a checkpoint.
        TrainingError: if the loss is no number, a process died, or the disk is full.
    """
    from allmlp.distributed import is_first_process
    from allmlp.files import only_writer
    from allmlp.training.faults import explained

    with explained(output), only_writer(output) if is_first_process() else nullcontext():
        return import_module(_TRAINERS[recipe.task]).train(recipe, output, resume=resume, overwrite=overwrite)


def summary(metrics: dict[str, Any], output: str | Path) -> str:
    """What there is to say at the end of a training: the score, the speed, where everything lies."""
    return import_module(_TRAINERS[metrics["task"]]).summary(metrics, Path(output))
