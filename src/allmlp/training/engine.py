"""The Hugging Face Trainer as every training here uses it: from a recipe, resumable, with averaged weights."""

import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from allmlp._version import __version__
from allmlp.checkpoints import run_directory
from allmlp.distributed import is_first_process
from allmlp.errors import Interrupted, UserError
from allmlp.training.callbacks import EMA_WEIGHTS, AveragedWeights, DataEpoch, Interruption, Progress
from allmlp.training.recipe import Recipe, recipe_to_yaml

_log = logging.getLogger(__name__)


class Engine(Trainer):
    """A Trainer made from a recipe.

    Args:
        recipe: The hyper-parameters.
        output: The run directory.
        model: A transformers model.
        parameters: Parameter groups for AdamW; a group's own `lr` and `weight_decay` win.
        unit: What the training counts, such as `images`.
        per_example: How many of them one example holds.
        workers: Processes that prepare data.
        resume_from: The checkpoint to go on from.
        others: Further arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        model: nn.Module,
        parameters: Sequence[dict[str, Any]],
        *,
        unit: str,
        per_example: int = 1,
        workers: int = 0,
        resume_from: Path | None = None,
        callbacks: Sequence[Any] = (),
        **others: Any,
    ):
        arguments = training_arguments(recipe, output, workers)
        self.resume_from = resume_from
        self.interruption = Interruption()
        per_step = recipe.batch_size * recipe.accumulate * arguments.world_size * per_example
        self.progress = Progress(unit, per_step)
        self.averaged = AveragedWeights(recipe.ema, resume_from) if recipe.ema else None
        optimizer = torch.optim.AdamW(
            parameters,
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
            fused=arguments.device.type in ("cpu", "cuda"),
        )
        own: list[Any] = [self.progress, self.interruption, *([self.averaged] if self.averaged else [])]
        if hasattr(others.get("train_dataset"), "set_epoch"):
            own.append(DataEpoch(others["train_dataset"]))
        super().__init__(
            model=model.to(arguments.device),
            args=arguments,
            optimizers=(optimizer, None),
            callbacks=[*own, *callbacks],
            **others,
        )
        self.remove_callback(PrinterCallback)

    def run(self) -> None:
        """Trains to the end; afterwards the model has the averaged weights where the recipe asks for them.

        Raises:
            Interrupted: It was asked to stop and has saved a checkpoint.
        """
        with self.interruption.listening():
            self.train(resume_from_checkpoint=str(self.resume_from) if self.resume_from else None)
        if self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"Stopped after step {self.state.global_step:,} of {self.state.max_steps:,}. "
                f"{self.args.output_dir}/{run_directory.CHECKPOINT}{self.state.global_step} holds everything; "
                f"go on with: allmlp train --resume --output {self.args.output_dir}"
            )
        if self.averaged:
            self.averaged.swap(self._weights())

    def _weights(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        """The Trainer's evaluation, of the averaged weights where there are any."""
        self.progress.pause()
        if self.averaged is None or not self.is_in_train:
            return super().evaluate(*arguments, **settings)
        with self.averaged.swapped(self._weights()):
            return super().evaluate(*arguments, **settings)


def training_arguments(recipe: Recipe, output: Path, workers: int = 0) -> TrainingArguments:
    """The recipe in the Trainer's terms."""
    on_cpu = not torch.accelerator.is_available()
    rhythm: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if recipe.eval_every:
        rhythm = {"eval_strategy": "steps", "save_strategy": "steps"}
        rhythm |= {"eval_steps": recipe.eval_every, "save_steps": recipe.eval_every}
    schedule: dict[str, Any] = {"lr_scheduler_type": recipe.schedule}
    if recipe.schedule == "constant":
        schedule = {"lr_scheduler_type": "constant_with_warmup"}
    elif recipe.schedule == "cosine" and recipe.min_lr:
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": recipe.min_lr}}
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        bf16=chosen_precision(recipe.precision) == "bf16",
        use_cpu=on_cpu,
        torch_compile=recipe.compile,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        # a diverging loss is shown, and no step waits for the accelerator to look at it
        logging_nan_inf_filter=False,
        save_total_limit=recipe.keep,
        dataloader_num_workers=workers,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
        **rhythm,
        **schedule,
    )


def chosen_precision(wanted: str) -> str:
    """`bf16` or `fp32`: what is wanted, or for `auto` bf16 exactly where this device computes in it."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # torch before 2.10 does not tell what the processor can do
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") and not torch.accelerator.is_available() else "fp32"


def prepare_output(output: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> Path | None:
    """Makes the run directory ready and writes the recipe into it.

    Args:
        output: The run directory.
        recipe: What is going to run.
        resume: Go on from the last complete checkpoint in it.
        overwrite: Remove a former run in it.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        UserError: It holds a run, and neither is asked for.
    """
    former = [*output.glob(f"{run_directory.CHECKPOINT}*"), *output.glob(run_directory.CONFIG)]
    if former and not resume and not overwrite:
        raise UserError(
            f"{output} holds a run already. Choose another --output, go on with it (--resume), "
            "or replace it (--overwrite)."
        )
    checkpoint = None
    if resume:
        needed = ("trainer_state.json", *((EMA_WEIGHTS,) if recipe.ema else ()))
        checkpoint = run_directory.last_checkpoint(output, needed)
        _log.info("going on from %s", checkpoint) if checkpoint else _log.warning(
            "%s has no complete checkpoint to go on from: starting at the beginning", output
        )
    if is_first_process():
        if overwrite and not resume:
            run_directory.clear(output)
        run_directory.write_text(output / run_directory.RECIPE, recipe_to_yaml(recipe))
    return checkpoint


def surroundings() -> dict[str, Any]:
    """The machine and the versions, for a run's metrics."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "cores": cores(),
        "python": platform.python_version(),
        "allmlp": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
