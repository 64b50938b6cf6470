"""A run directory: a model as plain files, loadable by transformers, by timm and by `load`.

For images it is what transformers calls a TimmWrapper checkpoint: `config.json` names timm's architecture with its
arguments, `model.safetensors` holds timm's own keys. A language model lies there as transformers saves it, with its
tokenizer.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.utils import ADAPTER_CONFIG_NAME

from allmlp.checkpoints import description
from allmlp.checkpoints.fitting import check_shapes, with_weights
from allmlp.checkpoints.reading import INDEX, parts_of
from allmlp.checkpoints.timm_models import TimmModel, create_model, require_architecture
from allmlp.checkpoints.training_checkpoints import AVERAGED, checkpoints_in, last_checkpoint
from allmlp.errors import UserError, listed, shown
from allmlp.files import UNFINISHED, atomic_path, finish, write_json

CONFIG, WEIGHTS, RECIPE, METRICS, REPORT = "config.json", "model.safetensors", "recipe.yaml", "metrics.json", "report"
FAULTS, EVENTS = "nan.jsonl", "tensorboard"
VISION, LANGUAGE = "timm_wrapper", "gmlp"
# What a run of each kind of model does, by transformers' names of tasks.
_LANGUAGE_TASKS = {
    "GMLPForCausalLM": "text-generation",
    "GMLPForMaskedLM": "fill-mask",
    "GMLPForSequenceClassification": "text-classification",
}
# What holds a model, in patterns: its description, its weights, whole or in parts, and their averages.
_MODEL = (CONFIG, WEIGHTS, WEIGHTS + INDEX, "model-*-of-*.safetensors", AVERAGED)
# What a run may have beside: what training writes, and transformers' image processor or tokenizer.
_BESIDE = (
    METRICS,
    FAULTS,
    REPORT,
    EVENTS,
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_PREFIX = "timm_model."


def classifier(model: TimmModel, architecture: str, model_args: Mapping[str, Any], classes: Sequence[str]) -> Any:
    """A timm model as transformers' image classifier, the same weights inside.

    Args:
        model: the timm model; its `pretrained_cfg` says how images are prepared for it.
        architecture: its name in timm.
        model_args: what `timm.create_model` needs beside the name and the number of classes.
        classes: the classes' names, in the order of the outputs; none for a model without head.

    Returns:
        `TimmWrapperForImageClassification`, or without classes `TimmWrapperModel`.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

    described = {
        "architecture": architecture,
        "model_args": dict(model_args) or None,
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": _plain({**model.pretrained_cfg, "label_names": None}),
    }
    config = TimmWrapperConfig.from_dict(described)
    # On the meta device, since transformers would initialise the weights anew.
    with torch.device("meta"):
        wrapped = TimmWrapperForImageClassification(config) if classes else TimmWrapperModel(config)
    wrapped.timm_model = model
    # What FSDP gathers one at a time.
    wrapped._no_split_modules = sorted({type(block).__name__ for block in getattr(model, "blocks", ())})
    return wrapped


def plain_state_dict(wrapped: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's own names."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in wrapped.state_dict().items()}


def save_classifier(wrapped: Any, directory: str | Path) -> list[str]:
    """Write `config.json` and `model.safetensors`, each all at once and only if there is room for both.

    Args:
        wrapped: what `classifier` gives.
        directory: the run directory; made where it is missing.

    Returns:
        The files' names.
    """
    directory = Path(directory)
    weights = {name: tensor.contiguous() for name, tensor in plain_state_dict(wrapped).items()}
    wrapped.config.architectures = [type(wrapped).__name__]
    # The configuration last, which makes it a run directory.
    with atomic_path(directory / CONFIG) as config, atomic_path(directory / WEIGHTS) as temporary:
        config.write_text(wrapped.config.to_json_string(use_diff=True), encoding="utf-8")
        save_file(weights, temporary, metadata={"format": "pt"})
    return [WEIGHTS, CONFIG]


def save_language(directory: str | Path, model: Any, tokenizer: Any = None) -> list[str]:
    """Write a language model and its tokenizer as transformers saves them, each file all at once.

    Args:
        directory: the run directory; made where it is missing.
        model: a model of `allmlp.language`.
        tokenizer: a tokenizer of transformers.

    Returns:
        The files' names.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".", suffix=UNFINISHED) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(temporary, tokenizer, model.config)
        for path in Path(temporary).iterdir():
            finish(path)
        # The configuration last, which makes it a run directory.
        written = sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG)
        for path in written:
            os.replace(path, directory / path.name)
    return [path.name for path in written]


def save_tokenizer(directory: str | Path, tokenizer: Any, config: Any) -> None:
    """Write a tokenizer as transformers saves it, for a language model of this configuration."""
    if tokenizer.is_fast:
        # It would be saved with the padding and the length of the last call.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    if config.spatial_weight == "dense":
        # What pipelines cut texts to.
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    tokenizer.save_pretrained(directory)


def save_metrics(directory: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json` all at once."""
    write_json(Path(directory) / METRICS, metrics)


def read_config(directory: str | Path) -> dict[str, Any]:
    """A run directory's `config.json`.

    Raises:
        UserError: if it is no run directory; the message says what is there instead.
    """
    directory = Path(directory)
    path = directory / CONFIG
    if directory.is_file():
        raise UserError(
            f"{directory} is a file, no run directory. If it is a checkpoint, allmlp.convert reads it, and allmlp "
            "convert makes a run directory of it."
        )
    if not directory.is_dir():
        raise UserError(f"There is no run directory {directory}.")
    if not path.is_file():
        checkpoint = last_checkpoint(directory)
        hint = f" Its training did not finish; the last checkpoint is {checkpoint}." if checkpoint else ""
        raise UserError(f"{directory} is no run directory: it has no {CONFIG}.{hint}")
    return description.read_json(path)


def task(source: str | Path) -> str:
    """What the model of a run directory does, by transformers' name, such as `image-classification`.

    Raises:
        UserError: if it is no run directory, or its model does nothing by itself.
    """
    config = read_config(source)
    if config["model_type"] == VISION:
        return "image-classification"
    for name in config.get("architectures") or []:
        if config["model_type"] == LANGUAGE and name in _LANGUAGE_TASKS:
            return _LANGUAGE_TASKS[name]
    raise UserError(f"{source} holds a model of type '{config['model_type']}' without a head that allmlp knows.")


def load(
    source: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    patch_kernel: int | tuple[int, int] | None = None,
) -> TimmModel:
    """The model of a run directory, ready to use, in eval mode, on the CPU.

    Of images it is timm's module; its `pretrained_cfg` says how they are prepared for it and holds the classes' names
    under `label_names`. Of text it is transformers' model. Of a checkpoint with averaged weights it has these, which
    are what was evaluated there.

    Args:
        source: a run directory or one of its checkpoints.
        img_size: another image size in pixels than the one it was trained at, one number or (height, width); weights
            that belong to positions are resampled (docs/resolution.md).
        patch_kernel: pixels that a patch sees there; the model's own where None.

    Raises:
        UserError: if it is no run directory, its architecture is unknown, config and weights do not match, an adapter
            lies beside a language model, or the model cannot take images of that size.
    """
    config = read_config(source)
    if config["model_type"] == LANGUAGE:
        model = load_language(source, config)
    elif config["model_type"] == VISION:
        model = load_classifier(source, config)
    else:
        kind = shown(config["model_type"])
        raise UserError(f"{source} holds a model of type {kind}, which allmlp does not know.")
    if img_size is not None or patch_kernel is not None:
        from allmlp.vision.base import VisionMLP

        if isinstance(getattr(model, "model", None), VisionMLP):
            raise UserError(
                f"{source} holds {config['architecture']} wrapped for features: its image size cannot be changed "
                f"afterwards. {_sized_otherwise(model)}"
            )
        if not isinstance(model, VisionMLP):
            raise UserError(f"{source} holds no image model of allmlp: its image size cannot be changed.")
        try:
            model.set_input_size(img_size, patch_kernel=patch_kernel)
        except ValueError as error:
            raise UserError(f"{source} cannot take images of this size: {error}") from error
    return model


def _sized_otherwise(backbone: TimmModel) -> str:
    """How a backbone of allmlp takes images of another size, as a sentence."""
    if not backbone.pretrained_cfg.get("fixed_input_size"):
        return "It takes images of any size as it is: leave the size out."
    return (
        "Make it at that size, by timm.create_model(…, features_only=True, img_size=…), and load the weights into it: "
        "they are resampled."
    )


def load_language(directory: str | Path, config: Mapping[str, Any]) -> Any:
    """The language model that a configuration describes, with the weights beside it, in eval mode.

    Of the configuration GMLPConfig's own fields are taken and no others, which could name code and further files.
    """
    from transformers.utils import logging as transformers_logging

    from allmlp import language

    description.check_language(config, Path(directory) / CONFIG)
    _require_no_adapter(directory)
    names = [name for name in config.get("architectures") or [] if name in language.__all__]
    kind: Any = getattr(language, names[0]) if names else language.GMLPModel
    weights = _weights(directory)
    shapes = _shapes(weights)
    own = {field.name for field in dataclasses.fields(language.GMLPConfig)}
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        known = language.GMLPConfig.from_dict({name: value for name, value in config.items() if name in own})
        with torch.device("meta"), description.at_most(_allowed(shapes)):
            blank = kind(known)
        check_shapes(blank, shapes, str(directory), shared=getattr(blank, "all_tied_weights_keys", ()))
        loaded: Any = kind.from_pretrained(
            directory, config=known, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    # transformers, safetensors and the configuration each have errors of their own.
    except Exception as error:
        raise UserError(f"The language model in {directory} cannot be loaded: {str(error).strip()}") from error
    finally:
        if progress:
            transformers_logging.enable_progress_bar()
    model, report = loaded
    found = [f"{len(keys)} {what}: {listed(sorted(map(str, keys)))}" for what, keys in report.items() if keys]
    if found:
        raise UserError(f"The weights of {directory} do not match the model.\n  " + "\n  ".join(found))
    if weights[0].name == AVERAGED:
        # Tied weights stand in it once.
        model.load_state_dict(_state(weights), strict=False)
    return model.eval()


def _require_no_adapter(directory: str | Path) -> None:
    """Check that transformers would load the model that lies in a directory, and nothing on top or in its place.

    Raises:
        UserError: if PEFT's adapter lies there, whose configuration may name any model.
    """
    if (Path(directory) / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(
            f"{directory} holds an adapter beside its model ({ADAPTER_CONFIG_NAME}), and none is applied unasked. Put "
            "the adapter's files into a folder of their own, and load it on the model by PEFT: "
            f"PeftModel.from_pretrained(allmlp.load({str(directory)!r}), FOLDER)."
        )


def load_classifier(directory: str | Path, config: Mapping[str, Any]) -> TimmModel:
    """The timm model that a configuration describes, with the weights beside it, in eval mode."""
    import allmlp.vision  # noqa: F401 registers the architectures with timm

    description.check_classifier(config, Path(directory) / CONFIG)
    weights = _weights(directory)
    cfg = {**config["pretrained_cfg"], "num_classes": config["num_classes"]}

    def build() -> TimmModel:
        arguments = config.get("model_args") or {}
        return create_model(config["architecture"], arguments, num_classes=config["num_classes"], pretrained_cfg=cfg)

    try:
        require_architecture(config["architecture"])
        shapes = _shapes(weights)
        # What does not fit is found out before it takes memory.
        with torch.device("meta"), description.at_most(_allowed(shapes)):
            blank = build()
    except UserError as error:
        raise UserError(f"The image classifier in {directory} cannot be loaded: {error}") from error
    check_shapes(blank, shapes, str(directory))
    model: TimmModel = with_weights(blank, build, _state(weights), str(directory))
    model.pretrained_cfg = {**cfg, "label_names": config.get("label_names")}
    return model.eval()


def require_same_model(checkpoint: Path, model: Any, tokenizer: Any = None) -> None:
    """Check that a training of this model can go on from a checkpoint.

    Args:
        checkpoint: a checkpoint of a run.
        model: a transformers model, `classifier`'s for images.
        tokenizer: a language model's.

    Raises:
        UserError: if the weights are of other shapes, or the classes or tokens others.
    """
    if (checkpoint / WEIGHTS).is_file():
        shared = getattr(model, "all_tied_weights_keys", None) or ()
        check_shapes(getattr(model, "timm_model", model), _shapes([checkpoint / WEIGHTS]), str(checkpoint), shared)
        former, now = (_class_names(config) for config in (read_config(checkpoint), model.config.to_dict()))
        if former and former != now:
            raise UserError(f"The classes of {checkpoint} are {listed(former)}; those of the data are {listed(now)}.")
    vocabulary = checkpoint / "tokenizer.json"
    if tokenizer is not None and vocabulary.is_file():
        other = set(Tokenizer.from_file(str(vocabulary)).get_vocab().items()) ^ set(tokenizer.get_vocab().items())
        if other:
            raise UserError(f"The tokens of {checkpoint} are others than those of the data: {min(other)[0]!r} is one.")


def _class_names(config: Mapping[str, Any]) -> list[str]:
    return list(config.get("label_names") or (config.get("id2label") or {}).values())


def models_in(directory: str | Path) -> list[Path]:
    """What holds a model in a directory, files and checkpoints: whoever replaces them loses it."""
    return [*checkpoints_in(directory), *_matching(directory, _MODEL)]


def former_run(directory: str | Path) -> list[Path]:
    """What a run has left in its directory, files and folders; nothing where there is no run.

    A model, be it weights alone, or a recipe makes it one: a folder `report` alone may be anybody's.
    """
    own = [*models_in(directory), *_matching(directory, [RECIPE])]
    return own and [*own, *_matching(directory, _BESIDE)]


def _matching(directory: str | Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in Path(directory).glob(pattern)]


def remove(paths: Iterable[Path], keep: Container[str] = ()) -> None:
    """Remove a former run's files and folders; `keep` names those that a new one has replaced."""
    for path in paths:
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_unfinished(directory: str | Path) -> None:
    """Remove what was being written, or being removed, when a former run ended all of a sudden."""
    for place in (Path(directory), Path(directory) / REPORT):
        for path in place.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)


def _weights(directory: str | Path) -> list[Path]:
    """The files of the weights that count: averaged ones where there are any; one file, or several with an index."""
    averaged, whole, index = (Path(directory) / name for name in (AVERAGED, WEIGHTS, WEIGHTS + INDEX))
    if averaged.is_file():
        return [averaged]
    if whole.is_file() or not index.is_file():
        return [whole]
    return [whole.with_name(name) for name in parts_of(index)]


def _shapes(weights: Sequence[Path]) -> dict[str, list[int]]:
    """The weights' names, timm's own, and shapes, without their numbers."""
    shapes = {}
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name.removeprefix(_PREFIX): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        # safetensors has one exception of its own for every broken file.
        except Exception as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return shapes


def _state(weights: Sequence[Path]) -> dict[str, Tensor]:
    """The weights under timm's own names."""
    return {name.removeprefix(_PREFIX): tensor for path in weights for name, tensor in load_file(path).items()}


def _allowed(shapes: Mapping[str, Any]) -> int:
    # Modules may make some weights more than once.
    return 4 * len(shapes) + 1000


def _plain(value: Any) -> Any:
    """JSON's types only."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
