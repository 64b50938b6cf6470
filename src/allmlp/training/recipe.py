"""Recipes: every hyper-parameter's name, default and help in one place.

A recipe is a frozen dataclass. The command line's flags and their help are made from its fields, a YAML file sets the
same names, and the run directory's `recipe.yaml` holds them all, so that it repeats the run.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from allmlp.errors import UserError, nearest, shown
from allmlp.training.values import coerce, parse_yaml, to_yaml

RecipeT = TypeVar("RecipeT", bound="Recipe")

RECIPE_BYTES = 2**20
"""A larger recipe file is refused."""


def option(default: Any, help: str, *, flag: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """A recipe field.

    Args:
        default: its value where nobody sets it; a mapping is copied for each recipe.
        help: one line for the command line's help.
        flag: the command line's flag, where it is not the field's name with dashes.
        choices: the values allowed.
    """
    metadata = {"help": help, "flag": flag, "choices": choices}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training has in common, whatever the model's kind.

    Raises:
        UserError: if a value is of the wrong type or out of range; the message names it.
    """

    task: ClassVar[str]

    data: str | None = option(None, "what to train on (the DATA argument)")
    model: str | None = option(None, "the model's name, as `allmlp models` lists it")
    start_from: str | None = option(None, "fine-tune this run directory or checkpoint", flag="--from")
    model_args: dict[str, Any] = option({}, "further arguments of the model, as YAML: '{patch_size: 2, in_chans: 1}'")  # noqa: RUF009

    epochs: float = option(30.0, "passes over the training data")
    max_steps: int | None = option(None, "stop after this many optimiser steps instead of after the epochs")
    batch_size: int = option(64, "examples per forward pass and device")
    accumulate: int = option(1, "forward passes per optimiser step (gradient accumulation)")
    lr: float = option(1e-3, "peak learning rate of AdamW")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    schedule: str = option("cosine", "how the rate falls after the warm-up", choices=("cosine", "linear", "constant"))
    warmup: float = option(0.05, "warm-up: a share of the training below 1, a number of optimiser steps from 1 on")
    weight_decay: float = option(0.05, "AdamW's weight decay; biases, norms and gains are left out")
    beta1: float = option(0.9, "AdamW's decay of the gradient's mean")
    beta2: float = option(0.999, "AdamW's decay of the gradient's square")
    adam_eps: float = option(1e-8, "AdamW's epsilon")
    clip: float = option(1.0, "largest gradient norm, 0: no clipping")
    ema: float = option(0.0, "decay of the averaged weights, evaluated and kept in place of the last ones; 0: off")

    eval_every: int = option(0, "optimiser steps between evaluations, each with a checkpoint; 0: every epoch")
    keep: int = option(2, "newest checkpoints to keep; the best one is kept besides")
    nan: str = option("stop", "at a gradient that is no number: stop, or skip the step", choices=("stop", "skip"))
    log_every: int = option(10, "optimiser steps between two points of the training curve")
    precision: str = option(
        "auto", "auto: bf16 where the device computes in it, else fp32", choices=("auto", "bf16", "fp32")
    )
    fsdp: bool = option(False, "shard weights, gradients and optimiser state over the processes (FSDP2)")
    compile: bool = option(False, "compile the model with torch.compile")
    streaming: bool = option(False, "read shards one by one as they are needed; .tar files of images always are")
    shuffle_buffer: int = option(1000, "examples that each worker shuffles at a time, where they stream")
    workers: int | None = option(None, "processes that prepare data; by default as many as help")
    seed: int = option(0, "seed of the weights, the order, the augmentation and the automatic split")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = coerce(field, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        self._require("positive", lambda v: v > 0, "epochs", "lr")
        self._require("at least 1", lambda v: v >= 1, "batch_size", "accumulate", "log_every", "keep", "max_steps")
        self._require("at least 1", lambda v: v >= 1, "shuffle_buffer")
        self._require("at least 0", lambda v: v >= 0, "min_lr", "warmup", "weight_decay", "clip", "eval_every")
        self._require("at least 0", lambda v: v >= 0, "workers", "adam_eps")
        self._require("from 0 to 4294967295", lambda v: 0 <= v < 2**32, "seed")
        self._require("at least 0 and below 1", lambda v: 0 <= v < 1, "ema", "beta1", "beta2")
        if self.schedule != "cosine":
            self._refuse_idle("min_lr", f"the cosine; the schedule {self.schedule} has no such end")
        self._require(f"at most lr, {self.lr}", lambda v: v <= self.lr, "min_lr")

    def _require(self, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"{name} is {shown(value)}; it must be {rule}.")

    def _refuse_idle(self, name: str, purpose: str) -> None:
        """Refuse a value, other than the default, that would have no effect."""
        if getattr(self, name) != getattr(type(self), name):
            raise UserError(f"{name} is for {purpose}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionRecipe(Recipe):
    """Image classification: timm's model, transforms and mixing."""

    task: ClassVar[str] = "image-classification"

    img_size: int | tuple[int, int] | None = option(
        None, "image size in pixels: 224, or HEIGHTxWIDTH; by default the model's own, or that of the --from run"
    )
    holdout: float = option(0.2, "share held out, class by class, where the data has no validation split")
    image_column: str | None = option(None, "column of the images in a parquet file or Hub dataset")
    label_column: str | None = option(None, "column of the classes in a parquet file or Hub dataset")
    strict: bool = option(False, "stop at an image that cannot be read instead of skipping it")

    crop: str = option(
        "resized",
        "training crop: resized (random area and aspect) or padded (random shift)",
        choices=("resized", "padded"),
    )
    crop_scale: float = option(0.08, "smallest share of the image's area that a resized crop keeps")
    crop_pct: float | None = option(None, "share of the resized image that the centre crop of evaluation keeps")
    hflip: float = option(0.5, "probability of a horizontal flip")
    color_jitter: float = option(0.0, "strength of brightness, contrast and saturation jitter")
    auto_augment: str | None = option(None, "timm's augmentation policy, for example rand-m9-mstd0.5-inc1 or original")
    random_erasing: float = option(0.0, "probability of erasing a random rectangle")
    mixup: float = option(0.0, "alpha of mixup, 0: off")
    cutmix: float = option(0.0, "alpha of cutmix, 0: off")
    mix_prob: float = option(1.0, "probability of mixing a batch")
    mix_switch_prob: float = option(0.5, "share of cutmix where both are on")
    label_smoothing: float = option(0.0, "label smoothing")
    drop: float = option(0.0, "dropout in front of the classifier")
    drop_path: float | None = option(None, "stochastic depth's largest rate; by default the model's own")
    layer_decay: float = option(1.0, "factor on the learning rate from one layer to the one below; 1: off")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("from 0 to 1", lambda v: 0 <= v <= 1, "hflip", "random_erasing", "mix_prob", "mix_switch_prob")
        self._require("above 0 and at most 1", lambda v: 0 < v <= 1, "crop_scale", "layer_decay")
        # As in the configuration of a run that can be loaded.
        self._require("from 0.1 to 1", lambda v: 0.1 <= v <= 1, "crop_pct")
        self._require("above 0 and below 1", lambda v: 0 < v < 1, "holdout")
        self._require("at least 0 and below 1", lambda v: 0 <= v < 1, "label_smoothing", "drop", "drop_path")
        self._require("at least 0", lambda v: v >= 0, "color_jitter", "mixup", "cutmix")
        if self.crop != "resized":
            self._refuse_idle("crop_scale", f"resized crops; crop is {self.crop}")
        if not (self.mixup or self.cutmix):
            self._refuse_idle("mix_prob", "mixup and cutmix; both are off")
        if not (self.mixup and self.cutmix):
            self._refuse_idle("mix_switch_prob", "mixup and cutmix together; one of them is off")
        sides = self.img_size if isinstance(self.img_size, tuple) else (self.img_size,)
        if any(side is not None and side < 1 for side in sides):
            raise UserError(f"img_size is {self.img_size}; it must be positive.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageRecipe(Recipe):
    """What learning from text has in common."""

    context: int | None = option(None, "tokens a model reads at once; by default the model's own length")
    tokenizer: str | None = option(
        None, "bytes (the default), characters, or a tokenizer's file, directory or name; with --from the run's own"
    )
    train_tokenizer: int | None = option(None, "train a tokenizer of this many tokens on the text")
    text_column: str | None = option(None, "column of the texts in a parquet or CSV file or Hub dataset")
    holdout: float = option(0.1, "share held out at the end, where the data has no validation split (classes: of each)")
    dropout: float | None = option(None, "dropout of embedding and blocks; by default the model's own")
    survival: float | None = option(None, "probability that a block is kept in a step; by default the model's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("at least 1", lambda v: v >= 1, "context", "train_tokenizer")
        if self.tokenizer and self.train_tokenizer:
            raise UserError(f"tokenizer {self.tokenizer} and train_tokenizer exclude each other: set one of them.")
        self._require("above 0 and below 1", lambda v: 0 < v < 1, "holdout")
        self._require("at least 0 and below 1", lambda v: 0 <= v < 1, "dropout")
        self._require("above 0 and at most 1", lambda v: 0 < v <= 1, "survival")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalRecipe(LanguageRecipe):
    """Causal language modelling: each token from those before it."""

    task: ClassVar[str] = "text-generation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedRecipe(LanguageRecipe):
    """Masked language modelling: hidden tokens from those around them."""

    task: ClassVar[str] = "fill-mask"

    mask_share: float = option(0.15, "share of the tokens that are hidden and predicted")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("above 0 and below 1", lambda v: 0 < v < 1, "mask_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassificationRecipe(LanguageRecipe):
    """Classes of whole texts."""

    task: ClassVar[str] = "text-classification"

    label_column: str | None = option(None, "column of the classes in a parquet or CSV file or Hub dataset")


_KINDS = (VisionRecipe, CausalRecipe, MaskedRecipe, TextClassificationRecipe)
RECIPES: dict[str, type[Recipe]] = {kind.task: kind for kind in _KINDS}


def task_of(settings: Mapping[str, Any]) -> str:
    """The task that settings are for: the one they name, else the one their model is for.

    A language model that is named learns to generate text; a run to start from goes on with its own task.

    Raises:
        UserError: if there is no such task.
    """
    task = settings.get("task") or _task_of_model(settings.get("model"), settings.get("start_from"))
    if not isinstance(task, str) or task not in RECIPES:
        name = shown(task)
        raise UserError(f"There is no task {name}; there are {', '.join(RECIPES)}.{nearest(name, RECIPES)}")
    return task


def _task_of_model(model: Any, start_from: Any) -> str:
    from allmlp.checkpoints import run_directory
    from allmlp.checkpoints.timm_models import require_architecture
    from allmlp.language.configuration import VARIANTS

    if isinstance(model, str):
        if model in VARIANTS:
            return CausalRecipe.task
        import allmlp.vision  # noqa: F401 registers the architectures

        require_architecture(model, also=VARIANTS)
    elif model is None and isinstance(start_from, str) and Path(start_from).is_dir():
        return run_directory.task(start_from)
    return VisionRecipe.task


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a recipe file, not yet checked; `task` is among them in a run directory's `recipe.yaml`.

    Raises:
        UserError: if there is no such file, or it is not a YAML mapping of at most `RECIPE_BYTES`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no recipe at {path}.")
    if path.stat().st_size > RECIPE_BYTES:
        raise UserError(f"{path} is no recipe: it has more than {RECIPE_BYTES:,} bytes.")
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must map hyper-parameters to values, but holds {type(settings).__name__}.")
    return settings


def make_recipe(settings: Mapping[str, Any], kind: type[RecipeT], where: str = "the recipe") -> RecipeT:
    """Check settings and make the recipe.

    Args:
        settings: values by field name; what is not given keeps its default.
        kind: the recipe's class.
        where: where the settings come from, for messages.

    Raises:
        UserError: if a name is unknown (the nearest are offered), or a value is of the wrong type or out of range.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    for name in settings:
        if name not in names:
            given = shown(name)
            raise UserError(f"{where} sets {given}, which {kind.task} does not know.{nearest(given, names)}")
    return kind(**settings)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, its task first; `read_settings` and `make_recipe` give the recipe back."""
    settings = {"task": recipe.task, **dataclasses.asdict(recipe)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return to_yaml(plain)
