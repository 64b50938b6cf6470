"""From a vision recipe to a trained run directory."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor
from torch.nn import functional as F
from transformers import set_seed

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.architecture import PREPARATION, VisionArchitecture, for_channels
from allmlp.checkpoints.fitting import load_weights
from allmlp.checkpoints.pretrained import Pretrained, find_pretrained
from allmlp.checkpoints.timm_models import TimmModel, create_model
from allmlp.checkpoints.training_checkpoints import checkpoint_step
from allmlp.data import as_is
from allmlp.data.image_batches import ImageBatches, training_transform
from allmlp.data.image_stream import ImageStream
from allmlp.data.images import ImageData, load_images, tell_left_out
from allmlp.data.labelled_images import LabelledImages
from allmlp.data.sampling import IGNORED
from allmlp.data.shards import Share
from allmlp.distributed import process_count, process_count_here, process_index
from allmlp.errors import UserError, shown
from allmlp.machine import cores, surroundings
from allmlp.training import report
from allmlp.training.callbacks import TensorBoard
from allmlp.training.engine import Engine, chosen_precision, prepare_output, refuse_output
from allmlp.training.evaluation import accuracy_of, evaluation_batches, logits_of
from allmlp.training.recipe import VisionRecipe
from allmlp.vision.base import VisionMLP
from allmlp.vision.resolution import resample_state_dict

_log = logging.getLogger(__name__)

# Arguments of timm's that the recipe has settings of its own for.
_SET_BY = {"drop_rate": "--drop", "drop_path_rate": "--drop-path"}


class VisionEngine(Engine):
    """The Trainer for image classifiers: labels may be mixed, smoothing is for training alone."""

    def __init__(self, *arguments: Any, label_smoothing: float, **settings: Any):
        self.label_smoothing = label_smoothing
        super().__init__(*arguments, **settings)
        # So the Trainer leaves it to the loss to take the mean over all images of a step.
        self.model_accepts_loss_kwargs = True

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        # Mixed labels all count.
        labels = [batch["labels"] for batch in batch_samples]
        counts = [len(part) if part.ndim == 2 else int((part != IGNORED).sum()) for part in labels]
        count = torch.tensor(sum(counts), device=device)
        count = self.accelerator.gather(count).sum() if self.args.world_size > 1 else count
        # Of a step in which no image can be read the loss is 0, not 0 / 0.
        return count.clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        outputs = model(pixel_values=inputs["pixel_values"])
        labels = inputs["labels"]
        # Mixed labels are smooth already.
        smoothing = self.label_smoothing if model.training and labels.ndim == 1 else 0.0
        total = F.cross_entropy(
            outputs.logits.float(), labels, label_smoothing=smoothing, ignore_index=IGNORED, reduction="sum"
        )
        # Processes hold differently many images, and their gradients are averaged.
        loss = total * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        if isinstance(self.train_dataset, ImageStream):
            # The Trainer goes on inside an epoch by throwing away as many batches of it as were learnt from.
            resumed = settings.get("epoch") == settings.get("epochs_trained")
            self.train_dataset.skip = settings.get("steps_trained_in_current_epoch", 0) if resumed else 0
        super()._run_epoch(*arguments, **settings)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # A checkpoint is a run directory too: under timm's own names, and nothing pickled.
        if self.args.should_save:
            model = self._weights()
            if self.whole is not None and state_dict is not None:
                model = self.whole
                model.load_state_dict(state_dict)
            run_directory.save_classifier(model, output_dir or str(self.args.output_dir))


def train(recipe: VisionRecipe, output: str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train an image classifier and write its run directory.

    Args:
        recipe: the hyper-parameters; `data`, and `model` or `start_from`, must be set.
        output: the run directory.
        resume: go on from the last checkpoint in it.
        overwrite: replace a former run in it.

    Returns:
        What `metrics.json` holds: the held-out accuracy, its course, the speed, the surroundings.

    Raises:
        UserError: if data, model or run directory cannot be used.
        Interrupted: if it was asked to stop and has saved a checkpoint.
    """
    output = Path(output)
    if recipe.data is None:
        raise UserError("Nothing to train on: name the data.")
    refuse_output(output, recipe, resume=resume, overwrite=overwrite)
    set_seed(recipe.seed)
    start = find_pretrained(recipe.start_from) if recipe.start_from else None
    architecture, model_args, channels = planned_model(recipe, start)
    data = load_images(
        recipe.data,
        holdout=recipe.holdout,
        seed=recipe.seed,
        channels=channels,
        strict=recipe.strict,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        streaming=recipe.streaming,
    )
    model = build_model(recipe, architecture, model_args, data.classes, start)
    # A training takes memory enough without the model that it has begun with.
    del start
    wrapped = run_directory.classifier(model, architecture, model_args, data.classes)
    resume_from = prepare_output(output, recipe, wrapped, resume=resume, overwrite=overwrite)
    cfg = model.pretrained_cfg
    training = training_batches(recipe, data, cfg)
    held_out = evaluation_batches(data.validation, cfg, recipe.strict)
    workers = useful_workers(data) if recipe.workers is None else recipe.workers
    _log.info(
        "%s, %s parameters, %s: %s images to train on, %s held out, %d classes, %s",
        architecture,
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "×".join(str(size) for size in cfg["input_size"]),
        f"{len(data.train):,}",
        f"{len(held_out):,}",
        len(data.classes),
        chosen_precision(recipe.precision),
    )
    resumed_at = checkpoint_step(resume_from) if resume_from else 0
    engine = VisionEngine(
        recipe,
        output,
        wrapped,
        parameter_groups(model, recipe),
        unit="images",
        workers=workers,
        resume_from=resume_from,
        callbacks=[TensorBoard(output / run_directory.EVENTS, model, held_out[0]["pixel_values"][None], resumed_at)],
        label_smoothing=recipe.label_smoothing,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=as_is,
        compute_metrics=_metrics,
    )
    wrapped = engine.run()
    if not engine.is_world_process_zero():
        return {}
    return _finish(recipe, engine, wrapped, data, training, held_out, output, workers)


def summary(metrics: dict[str, Any], output: Path) -> str:
    """The accuracy, the speed, and where the run directory and its pictures are."""
    return (
        f"accuracy {metrics['accuracy']:.2%} on {metrics['images']:,} held-out images "
        f"(top 5 {metrics['top5']:.2%}, loss {metrics['loss']:.4f})\n"
        f"{metrics['epochs']:g} epochs in {metrics['training_seconds']:,.0f} s of training, "
        f"{metrics['images_per_second']:,.0f} images/s, {metrics['precision']}\n"
        f"run directory  {output}\n"
        f"pictures       {', '.join(str(output / picture) for picture in metrics['pictures'])}"
    )


def planned_model(recipe: VisionRecipe, start: Pretrained | None = None) -> tuple[str, dict[str, Any], int]:
    """The architecture, its arguments and its image channels.

    Arguments are those of the model to start from, where there is one and the architecture is the same, under those of
    the recipe.

    Raises:
        UserError: if there is no such model, none is named, or the one to start from is no classifier.
    """
    found = None
    if start:
        found = start.architecture
        if not isinstance(found, VisionArchitecture):
            raise UserError(f"{recipe.start_from} holds a {found.name}, not an image classifier.")
    architecture = recipe.model or (found.name if found else None)
    if architecture is None:
        raise UserError("Nothing to train: name a model, or a run directory to start from.")
    arguments = dict(recipe.model_args)
    for name, flag in _SET_BY.items():
        if name in arguments:
            raise UserError(f"model_args sets {name}: that is what {flag} is for.")
    if recipe.img_size is not None:
        arguments["img_size"] = recipe.img_size
    if found and architecture == found.name:
        kept = {name: value for name, value in found.model_args.items() if name not in _SET_BY}
        arguments = {**kept, **arguments}
    if arguments.get("global_pool") == "":
        raise UserError("Without pooling (global_pool '') a model gives maps, not classes.")
    if arguments.get("features_only") or (found and found.model_args.get("features_only")):
        raise UserError(f"{recipe.start_from or architecture} is a backbone here: it gives features, not classes.")
    channels = arguments.get("in_chans", 3)
    if type(channels) is not int:
        raise UserError(f"in_chans is {shown(channels)}; it must be a whole number.")
    return architecture, arguments, channels


def build_model(
    recipe: VisionRecipe,
    architecture: str,
    model_args: dict[str, Any],
    classes: Sequence[str],
    start: Pretrained | None = None,
) -> TimmModel:
    """The model to train, its `pretrained_cfg` telling how images are prepared for it.

    Raises:
        UserError: if the model cannot be made so, or does not match the weights to start from.
    """
    training_only = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    model = create_model(architecture, model_args, num_classes=len(classes), **training_only)
    cfg: dict[str, Any] = {**model.pretrained_cfg, "num_classes": len(classes), "label_names": list(classes)}
    if start:
        # Images go on being prepared as the weights know them.
        cfg |= {name: value for name, value in start.model.pretrained_cfg.items() if name in PREPARATION}
    channels = model_args.get("in_chans", 3)
    size = model_args.get("img_size", cfg["input_size"][-2:])
    cfg["input_size"] = (channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
    cfg |= for_channels(cfg, channels)
    if recipe.crop_pct is not None:
        cfg["crop_pct"] = recipe.crop_pct
    model.pretrained_cfg = cfg
    if start:
        start_from(model, start.model, str(recipe.start_from))
    return model


def start_from(model: TimmModel, weights: TimmModel, source: str) -> None:
    """Load the weights to fine-tune, resampled to the model's image size.

    A classifier for other classes is left out, and that is said.

    Raises:
        UserError: if the weights do not match the model otherwise.
    """
    state = weights.state_dict()
    fresh = model.state_dict()
    head = [name for name in fresh if name.startswith(f"{model.pretrained_cfg['classifier']}.")]
    former, wanted = weights.pretrained_cfg.get("label_names"), model.pretrained_cfg["label_names"]
    other_size = any(name not in state or state[name].shape != fresh[name].shape for name in head)
    if other_size or (former and former != wanted):
        _log.info(
            "the classifier of %s tells %s classes apart; a new one for %s classes replaces it",
            source,
            getattr(weights, "num_classes", "no"),
            len(wanted),
        )
        state = {name: tensor for name, tensor in state.items() if name not in head}
        state |= {name: fresh[name] for name in head}
    if isinstance(model, VisionMLP) and isinstance(weights, VisionMLP):
        state = resample_state_dict(state, model, weights.stem.grid_size)
    load_weights(model, state, source)


def training_batches(recipe: VisionRecipe, data: ImageData, cfg: dict[str, Any]) -> ImageBatches | ImageStream:
    """The training images, augmented as the recipe says."""
    mix = None
    if recipe.mixup or recipe.cutmix:
        mix = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mix_prob,
            switch_prob=recipe.mix_switch_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=len(data.classes),
        )
    erase = RandomErasing(recipe.random_erasing, mode="pixel", device="cpu") if recipe.random_erasing else None
    transform = training_transform(
        cfg,
        crop=recipe.crop,
        crop_scale=recipe.crop_scale,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
    )
    settings: dict[str, Any] = {"mean": cfg["mean"], "std": cfg["std"], "mix": mix, "erase": erase, "seed": recipe.seed}
    settings["strict"] = recipe.strict
    if isinstance(data.train, LabelledImages):
        return ImageBatches(data.train, transform, **settings)
    share = Share(
        examples=len(data.train), batch_size=recipe.batch_size, process=process_index(), processes=process_count()
    )
    return ImageStream(data.train, transform, share=share, buffer=recipe.shuffle_buffer, **settings)


def parameter_groups(model: TimmModel, recipe: VisionRecipe) -> list[dict[str, Any]]:
    """timm's groups: no decay for biases, norms and what the model names; lower rates for lower layers."""
    left_out = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if recipe.layer_decay == 1.0:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=left_out)
    groups = param_groups_layer_decay(
        model, recipe.weight_decay, no_weight_decay_list=left_out, layer_decay=recipe.layer_decay
    )
    return [{**group, "lr": recipe.lr * group["lr_scale"]} for group in groups]


def useful_workers(data: ImageData) -> int:
    """How many processes should prepare images for this one.

    None where the model computes on the same cores and the images are small and in memory: a batch of them is prepared
    sooner than it travels between processes. Else one per core that falls to this process, at most 16.
    """
    pixels = getattr(data.train, "sources", None)
    small = isinstance(pixels, np.ndarray) and pixels[0].size <= 64 * 64 * 3
    return 0 if small and not torch.accelerator.is_available() else min(max(cores() // process_count_here(), 1), 16)


def _metrics(prediction: Any) -> dict[str, float]:
    logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"accuracy": best[:, 0].float().mean().item(), "top5": best.any(1).float().mean().item()}


def _finish(
    recipe: VisionRecipe,
    engine: Engine,
    wrapped: Any,
    data: ImageData,
    training: ImageBatches | ImageStream,
    held_out: ImageBatches,
    output: Path,
    workers: int,
) -> dict[str, Any]:
    """Write everything of the run directory that training itself has not."""
    run_directory.save_classifier(wrapped, output)
    model = wrapped.timm_model
    logits, labels = logits_of(model, held_out, workers=workers)
    turned_out = [*training.unreadable(), *held_out.unreadable()]
    tell_left_out(recipe.data, turned_out, len(labels))
    metrics: dict[str, Any] = {
        "task": VisionRecipe.task,
        **accuracy_of(logits, labels, data.classes),
        "epochs": round(engine.state.epoch or 0.0, 4),
        "steps": engine.state.global_step,
        "images_per_second": round(engine.progress.rate, 1),
        "training_seconds": round(engine.progress.seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": "bf16" if engine.args.bf16 else "fp32",
        "unreadable_images": [*data.unreadable, *turned_out],
        "surroundings": surroundings(),
        **engine.course,
    }
    pictures = report.write(output / run_directory.REPORT, metrics["history"], logits, labels, held_out, model)
    metrics["pictures"] = [str(path.relative_to(output)) for path in pictures]
    run_directory.save_metrics(output, metrics)
    return metrics
