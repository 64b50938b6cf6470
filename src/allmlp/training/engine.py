"""The Hugging Face Trainer as every training here uses it: from a recipe, resumable, with averaged weights."""

import copy
import json
import logging
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.training_checkpoints import (
    AVERAGED,
    STATE,
    checkpoint_path,
    checkpoint_step,
    last_checkpoint,
    publish_checkpoint,
    require_readable,
    rotate_checkpoints,
    stream_places,
    unfinished_checkpoint,
)
from allmlp.data import NAMES, PLACE
from allmlp.data.sampling import IGNORED, ShuffledBatches
from allmlp.data.text_stream import Place, TokenStream
from allmlp.distributed import is_first_process, is_restarted, join_again, process_count
from allmlp.errors import Interrupted, UserError, listed
from allmlp.files import write_json, write_text
from allmlp.training.callbacks import (
    AveragedWeights,
    DataEpoch,
    EvaluationGivenUp,
    Interruption,
    Progress,
)
from allmlp.training.faults import Divergence, Step, way_on
from allmlp.training.recipe import Recipe, read_settings, recipe_to_yaml
from allmlp.training.values import parse_yaml

_log = logging.getLogger(__name__)
# What a data set without a validation split is cut by.
_OF_THE_SPLIT = ("seed", "holdout")


class Engine(Trainer):
    """A Trainer made from a recipe.

    Args:
        recipe: the hyper-parameters.
        output: the run directory.
        model: a transformers model.
        parameters: parameter groups for AdamW; a group's own `lr` and `weight_decay` win.
        unit: what the training counts, such as `images`.
        per_example: how many of them one example holds.
        workers: processes that prepare data.
        resume_from: the checkpoint to go on from.
        tokenizer: a language model's, kept in every checkpoint.
        others: further arguments of `transformers.Trainer`.
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
        tokenizer: Any = None,
        callbacks: Sequence[Any] = (),
        **others: Any,
    ):
        arguments = training_arguments(recipe, output, workers, "accuracy" if others.get("compute_metrics") else "loss")
        self.resume_from, self.keep, self.tokenizer = resume_from, recipe.keep, tokenizer
        self.interruption = Interruption()
        self.divergence = Divergence(output, skip=recipe.nan == "skip")
        self.batches: list[tuple[Tensor, list[str]]] = []
        self.reader_places: dict[int, tuple[int, ...]] = {}
        self.place = str(output)
        self.per_example = per_example
        self.progress = Progress(unit, _per_step(recipe, per_example))
        self.averaged = AveragedWeights(recipe.ema, resume_from) if recipe.ema else None
        self.adamw = torch.optim.AdamW(
            parameters,
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
            fused=arguments.device.type in ("cpu", "cuda"),
        )
        own: list[Any] = [self.progress, self.interruption, *([self.averaged] if self.averaged else [])]
        data = others["train_dataset"]
        self.order = None
        if not isinstance(data, IterableDataset):
            self.order = ShuffledBatches(
                len(data),
                recipe.batch_size,
                seed=recipe.seed,
                process=arguments.process_index,
                processes=arguments.world_size,
            )
        elif resume_from is not None and isinstance(data, TokenStream):
            places = stream_places(resume_from, arguments.process_index)
            if places.is_file():
                self.reader_places = {place[0]: place for place in json.loads(places.read_text(encoding="utf-8"))}
            data.go_on(
                checkpoint_step(resume_from) * recipe.accumulate, [Place(*at) for at in self.reader_places.values()]
            )
        own.append(DataEpoch([part for part in (self.order, data) if hasattr(part, "set_epoch")]))
        config: Any = model.config
        caches = vars(config).get("use_cache")
        super().__init__(model=model.to(arguments.device), args=arguments, callbacks=[*own, *callbacks], **others)
        # The Trainer turns decoding caches off, also in the configuration that is saved.
        if caches is None:
            del config.use_cache
        else:
            config.use_cache = caches
        self.remove_callback(PrinterCallback)
        if recipe.fsdp and process_count() > 1 and not self.is_fsdp_enabled:
            raise UserError("Accelerate shards over accelerators, and this machine has none: leave --fsdp out.")
        # Nothing of the kind can be made of the sharded model.
        self.whole = copy.deepcopy(self._weights()) if self.is_fsdp_enabled else None

    def run(self) -> Any:
        """Train to the end.

        Returns:
            The model, with the averaged weights where the recipe asks for them; of a sharded model a whole copy, which
            the first process alone has the weights of.

        Raises:
            Interrupted: if it was asked to stop and has saved a checkpoint.
            Diverged: if the loss or its gradient is no number.
        """
        # What is drawn in the model, such as dropout, is drawn anew in each process.
        torch.manual_seed(self.args.seed + self.args.process_index)
        with self.interruption.listening():
            self.train(resume_from_checkpoint=str(self.resume_from) if self.resume_from else None)
        if self.interruption.asked or self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"Stopped after step {self.state.global_step:,} of {self.state.max_steps:,}. "
                f"{way_on(str(self.args.output_dir))}",
                by_scheduler=self.interruption.asked == signal.SIGTERM,
            )
        if self.averaged:
            self.averaged.swap(self._weights())
        if self.whole is None:
            return self._weights()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self._weights(), options=options)
        if self.is_world_process_zero():
            self.whole.load_state_dict(state)
        return self.whole

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        """The recipe's AdamW; it cannot be given to a Trainer that shards."""
        self.optimizer = self.adamw
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches: the data is shared out already, and Accelerate need not do it."""
        how: dict[str, Any] = {"batch_size": None} if self.order is None else {"batch_sampler": self.order}
        data: Any = self.train_dataset
        return DataLoader(
            data,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            **how,
        )

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **settings: Any) -> Any:
        """The Trainer's evaluation, but its loss is the mean over all examples, each counted once."""
        output: Any = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **settings)
        output.metrics[f"{metric_key_prefix}_loss"] = self.held_out_loss(output.predictions, output.label_ids)
        return output

    def held_out_loss(self, predictions: Any, labels: Any) -> float:
        """The loss, in nats, of what `prediction_step` gave for all of the held-out examples."""
        return F.cross_entropy(torch.from_numpy(predictions), torch.from_numpy(labels), ignore_index=IGNORED).item()

    @property
    def course(self) -> dict[str, Any]:
        """How the training went, for a run's metrics: `history`, the `best` checkpoint, the `skipped_steps`."""
        logged = self.state.log_history
        kept = [entry for entry in logged if "loss" in entry or "eval_loss" in entry]
        best = self.state.best_global_step
        return {
            "best": {
                "checkpoint": checkpoint_path(str(self.args.output_dir), best).name,
                self.args.metric_for_best_model: self.state.best_metric,
            }
            if best
            else None,
            "skipped_steps": [entry["step"] for entry in logged if "skipped" in entry],
            "history": [
                {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
                for entry in kept
            ],
        }

    def _weights(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        """The Trainer's evaluation, of the averaged weights where there are any; it leaves no trace in the training."""
        self.progress.pause()
        self.divergence.look()
        averaged = self.averaged.swapped(self._weights()) if self.averaged and self.is_in_train else nullcontext()
        # A resumed training may not have had this evaluation, which draws a seed for its loader.
        with averaged, torch.random.fork_rng(devices=[]):
            return super().evaluate(*arguments, **settings)

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **settings: Any) -> Tensor:
        """The Trainer's step on one batch, remembered until its gradient has been looked at."""
        names = inputs.pop(NAMES, [])
        if place := inputs.pop(PLACE, None):
            self.reader_places[place[0]] = place
        # Processes have as many examples each, but for one.
        self.progress.count(len(inputs["labels"]) * self.per_example * self.args.world_size)
        loss = super().training_step(model, inputs, *arguments, **settings)
        self.batches.append((loss, names))
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **settings: Any) -> Any:
        """The Trainer's prediction of one batch, whose examples' names the model does not take."""
        unnamed = {name: value for name, value in inputs.items() if name != NAMES}
        return super().prediction_step(model, unnamed, *arguments, **settings)

    def _get_learning_rate(self) -> float:
        # The Trainer tells the first group's, which is the lowest where rates decay from layer to layer.
        scheduler: Any = self.lr_scheduler
        return max(scheduler.get_last_lr())

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        losses, names = zip(*self.batches, strict=True)
        self.batches = []
        number = self.state.global_step + 1
        rate = self._get_learning_rate()
        step = Step(number=number, learning_rate=rate, norm=norm, losses=losses, names=names)
        self.divergence.steps.append(step)
        # What is computed on the processor needs no waiting for.
        due = self.divergence.skip or norm.device.type == "cpu" or number % self.args.logging_steps == 0
        if due and self.divergence.look():
            # Without gradients the optimiser leaves weights and moments as they are.
            model.zero_grad()
            self.state.log_history.append({"step": number, "skipped": True})
            return torch.zeros_like(norm)
        return norm

    def _maybe_log_save_evaluate(
        self, loss: Any, grad_norm: Any, model: Any, trial: Any, *others: Any, **more: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(loss, grad_norm, model, trial, *others, **more)
        except EvaluationGivenUp:
            self._save_checkpoint(model, trial)
            self.control.should_training_stop = True

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        # A training that was killed after its last step would take one more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **settings)

    def _get_output_dir(self, trial: Any) -> str:
        return self.place

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint with the averaged weights: it gets its name when it is complete."""
        self.divergence.look()
        output, step = Path(str(self.args.output_dir)), self.state.global_step
        unfinished = unfinished_checkpoint(output, step)
        self.place = str(unfinished.parent)
        try:
            super()._save_checkpoint(model, trial)
            if self.averaged:
                self.averaged.save(unfinished)
            if self.reader_places:
                write_json(stream_places(unfinished, self.args.process_index), [*self.reader_places.values()])
            if self.is_world_process_zero():
                if best := self.state.best_global_step:
                    self.state.best_model_checkpoint = str(checkpoint_path(output, best))
                self.state.save_to_json(str(unfinished / STATE))
                if self.tokenizer is not None:
                    run_directory.save_tokenizer(unfinished, self.tokenizer, self._weights().config)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish_checkpoint(output, step)
                rotate_checkpoints(output, self.keep, self.state.best_global_step)
        except BaseException:
            if self.is_world_process_zero():
                run_directory.remove_unfinished(output)
            raise
        finally:
            self.place = str(output)


def training_arguments(recipe: Recipe, output: Path, workers: int = 0, best: str = "loss") -> TrainingArguments:
    """The recipe in the Trainer's terms; `best` is the measure by which an evaluation is the best one."""
    on_cpu = not torch.accelerator.is_available()
    join_again("gloo" if on_cpu else None)
    rhythm: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if recipe.eval_every:
        rhythm = {"eval_strategy": "steps", "save_strategy": "steps"}
        rhythm |= {"eval_steps": recipe.eval_every, "save_steps": recipe.eval_every}
    sharding: dict[str, Any] = {}
    if recipe.fsdp and process_count() > 1:
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
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
        # Whoever looks at each loss waits for the accelerator, as a training that may skip steps does anyway.
        logging_nan_inf_filter=recipe.nan == "skip",
        metric_for_best_model=best,
        greater_is_better=best != "loss",
        dataloader_num_workers=workers,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
        **sharding,
        **rhythm,
        **schedule,
    )


def chosen_precision(wanted: str) -> str:
    """`bf16` or `fp32`: what is wanted, or for `auto` bf16 exactly where this device computes in it."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # torch before 2.10 does not tell what the processor can do.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") and not torch.accelerator.is_available() else "fp32"


def refuse_output(output: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Check that a training may write its run directory; to be asked before data are read for minutes.

    Raises:
        UserError: if it lies in the folder of the data, or holds a run that is neither to be gone on with nor replaced.
    """
    data = Path(recipe.data).expanduser() if recipe.data else None
    if data is not None and data.is_dir() and output.resolve().is_relative_to(data.resolve()):
        raise UserError(f"{output} lies in the data, {data}, and would become part of it: choose another --output.")
    # A recipe alone is what a training leaves that ended before its first checkpoint: nothing is lost with it.
    former = run_directory.models_in(output)
    if former and not (resume or is_restarted() or overwrite):
        raise UserError(
            f"{output} holds a run already: {listed([path.name for path in former])}. Choose another --output, go on "
            "with it (--resume), or replace it (--overwrite)."
        )


def prepare_output(
    output: Path,
    recipe: Recipe,
    model: Any,
    *,
    resume: bool,
    overwrite: bool,
    tokenizer: Any = None,
    unit: str = "images",
    per_example: int = 1,
) -> Path | None:
    """Make the run directory ready and write the recipe into it.

    Args:
        output: the run directory.
        recipe: what is going to run.
        model: the transformers model that is going to be trained.
        resume: go on from the last complete checkpoint in it.
        overwrite: remove a former run in it.
        tokenizer: a language model's.
        unit: what the training counts, such as `images`.
        per_example: how many of them one example holds.

    Returns:
        The checkpoint to go on from, if any: processes that torchrun has started anew always go on.

    Raises:
        UserError: if the checkpoint is damaged, or is one of another model, or something else would be held out than in
            the beginning, or a step would take more or fewer examples; the run directory stays as it is.
    """
    resume = resume or is_restarted()
    checkpoint, keeps_recipe = None, False
    if resume:
        checkpoint = last_checkpoint(output, also=(AVERAGED,) if recipe.ema else ())
        _log.info("going on from %s", checkpoint) if checkpoint else _log.warning(
            "%s has no complete checkpoint to go on from: starting at the beginning", output
        )
        if checkpoint:
            require_readable(checkpoint)
            _require_same_step(checkpoint, recipe, unit, per_example)
            changes = _changes(output, recipe)
            try:
                run_directory.require_same_model(checkpoint, model, tokenizer)
                if moved := [change for name, change in changes.items() if name in _OF_THE_SPLIT]:
                    raise UserError(f"What is learnt from and what is held out would be mixed: {', '.join(moved)}.")
            except UserError as error:
                raise UserError(
                    f"{error}\nGo on with the model and the data of the run, or choose another --output."
                ) from error
            keeps_recipe = _is_finished(checkpoint, recipe)
            if changes:
                what = "no step is left to train, the recipe stays without" if keeps_recipe else "going on with"
                _log.warning("%s other hyper-parameters: %s", what, ", ".join(changes.values()))
    if is_first_process():
        run_directory.remove_unfinished(output)
        if overwrite and not resume:
            run_directory.remove(run_directory.former_run(output))
        if not (keeps_recipe and (output / run_directory.RECIPE).is_file()):
            write_text(output / run_directory.RECIPE, recipe_to_yaml(recipe))
    return checkpoint


def _per_step(recipe: Recipe, per_example: int) -> int:
    """What a full optimiser step learns from."""
    return recipe.batch_size * recipe.accumulate * process_count() * per_example


def _require_same_step(checkpoint: Path, recipe: Recipe, unit: str, per_example: int) -> None:
    """Refuse steps of another size: steps are what tells how far a run is, in its schedule and in its data."""
    callbacks = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("stateful_callbacks", {})
    former = callbacks.get(Progress.__name__, {}).get("attributes", {}).get("per_step")
    now = _per_step(recipe, per_example)
    if former in (None, now):
        return
    names, factors = "batch size × accumulate × processes", [recipe.batch_size, recipe.accumulate, process_count()]
    if per_example > 1:
        names, factors = f"{names} × context", [*factors, per_example]
    raise UserError(
        f"A step of {checkpoint} took {former:,} {unit} and would take {now:,} ({names}: "
        f"{' × '.join(map(str, factors))}). Choose --batch-size and --accumulate so that it stays the same."
    )


def _changes(output: Path, recipe: Recipe) -> dict[str, str]:
    """The hyper-parameters that a resumed run does not share with its beginning."""
    if not (output / run_directory.RECIPE).is_file():
        return {}
    former, now = read_settings(output / run_directory.RECIPE), parse_yaml(recipe_to_yaml(recipe))
    differing = [name for name in now if name in former and former[name] != now[name]]
    return {name: f"{name} {former[name]} → {now[name]}" for name in differing}


def _is_finished(checkpoint: Path, recipe: Recipe) -> bool:
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if recipe.max_steps is not None:
        return state.get("global_step", 0) >= recipe.max_steps
    return (state.get("epoch") or 0.0) >= recipe.epochs
