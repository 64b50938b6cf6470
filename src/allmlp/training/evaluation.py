"""What a trained image classifier knows: accuracy on labelled images, classes of unlabelled ones."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.timm_models import TimmModel
from allmlp.data import as_is, image_sources, visible_files
from allmlp.data.image_batches import ImageBatches, evaluation_transform
from allmlp.data.images import image_mode, load_validation, read_all, tell_left_out
from allmlp.data.labelled_images import SUFFIXES, LabelledImages
from allmlp.data.sampling import IGNORED
from allmlp.errors import UserError
from allmlp.tables import table
from allmlp.training.recipe import RECIPES, Recipe, RecipeT, VisionRecipe, make_recipe, read_settings


def evaluation_batches(images: LabelledImages, cfg: dict[str, Any], strict: bool = False) -> ImageBatches:
    """Images as a model's `pretrained_cfg` wants them for evaluation; `strict` as for `BatchMaker`."""
    return ImageBatches(images, evaluation_transform(cfg), mean=cfg["mean"], std=cfg["std"], strict=strict)


@torch.inference_mode()
def logits_of(
    model: TimmModel, batches: ImageBatches, batch_size: int = 256, workers: int = 0
) -> tuple[Float[Tensor, "images classes"], Int[Tensor, " images"]]:
    """A model's logits for labelled images, in float32 and in eval mode.

    Args:
        model: a classifier; it stays on its device, and computes in its own dtype.
        batches: the images.
        batch_size: images per forward pass.
        workers: processes that prepare them.

    Returns:
        The logits, on the CPU, and the labels of the images that could be read.
    """
    weight = next(model.parameters())
    loader = DataLoader(batches, batch_size=batch_size, num_workers=workers, collate_fn=as_is)
    training = model.training
    model.eval()
    results = [
        (model(batch["pixel_values"].to(weight)).float().cpu(), batch["labels"])
        for batch in tqdm(loader, desc="evaluating", unit=" batches", leave=False, disable=None, delay=1)
    ]
    model.train(training)
    logits, labels = (torch.cat(parts) for parts in zip(*results, strict=True))
    readable = labels != IGNORED
    return logits[readable], labels[readable]


def accuracy_of(
    logits: Float[Tensor, "examples classes"],
    labels: Int[Tensor, " examples"],
    classes: Sequence[str],
    unit: str = "images",
) -> dict[str, Any]:
    """Loss, top-1 and top-5 accuracy, and each class's accuracy (its recall), precision and number of examples.

    Args:
        logits: a classifier's.
        labels: the true classes.
        classes: their names.
        unit: what the examples are; their numbers stand under this name.
    """
    predicted = logits.argmax(1)
    counts = confusion(labels, predicted, len(classes))
    right, present, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    best = logits.topk(min(5, len(classes)), dim=1).indices
    return {
        unit: len(labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (predicted == labels).float().mean().item(),
        "top5": (best == labels[:, None]).any(1).float().mean().item(),
        "per_class": {
            name: {
                "accuracy": (right[i] / present[i]).item(),
                "precision": (right[i] / said[i].clamp(min=1)).item(),
                unit: int(present[i]),
            }
            for i, name in enumerate(classes)
            if present[i]
        },
    }


def confusion(
    true: Int[Tensor, " images"], predicted: Int[Tensor, " images"], classes: int
) -> Int[Tensor, "classes classes"]:
    """How many images of each class (row) are taken for each class (column)."""
    return torch.bincount(true * classes + predicted, minlength=classes * classes).view(classes, classes)


def evaluate(
    run: str,
    data: str | None = None,
    *,
    img_size: int | tuple[int, int] | None = None,
    patch_kernel: int | tuple[int, int] | None = None,
    batch_size: int = 256,
    strict: bool = False,
    workers: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """A run's accuracy on labelled images.

    Of the data it was trained on, the held-out part counts; of other data its validation split, or all of it where it
    has none. Classes are matched by name.

    Args:
        run: a run directory.
        data: what `allmlp.data.images.load_images` takes; the run's own by default.
        img_size: as for `run_directory.load`; images are resized to it.
        patch_kernel: as for `run_directory.load`.
        batch_size: images per forward pass.
        strict: raise at an image that cannot be read.
        workers: processes that prepare images.
        image_column: column of the images in a table, by default as in training.
        label_column: column of the classes in a table, likewise.

    Returns:
        What `accuracy_of` gives, with `run`, `data` and the `part` of the data that counts.

    Raises:
        UserError: if the run or the data cannot be used, or the data has classes that the model does not know.
    """
    model = load_classifier(run, img_size, patch_kernel)
    cfg = model.pretrained_cfg
    recipe = recipe_of(run, VisionRecipe)
    data = data or (recipe.data if recipe else None)
    if data is None:
        raise UserError(f"{run} does not say what it was trained on; name the data to evaluate on.")
    columns = {"image_column": image_column, "label_column": label_column}
    if image_sources.is_table(data):
        columns = trained_columns(recipe, columns)
    channels = cfg["input_size"][0]
    own = recipe if recipe and same_data(data, recipe.data) else None
    names, images, part = load_validation(
        data,
        cut=(own.holdout, own.seed) if own else None,
        channels=channels,
        strict=strict,
        streaming=own is not None and own.streaming,
        **columns,
    )
    part = "held out" if own else part
    images = relabelled(images, names, cfg["label_names"], data)
    batches = evaluation_batches(images, cfg, strict)
    logits, labels = logits_of(model, batches, batch_size, workers)
    tell_left_out(data, batches.unreadable(), len(labels))
    return {"run": str(run), "data": data, "part": part, **accuracy_of(logits, labels, cfg["label_names"])}


def predict(
    run: str,
    files: Sequence[str],
    *,
    img_size: int | tuple[int, int] | None = None,
    patch_kernel: int | tuple[int, int] | None = None,
    top_k: int = 5,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """The likeliest classes of image files.

    Args:
        run: a run directory.
        files: image files, and folders of them.
        img_size: as for `run_directory.load`; images are resized to it.
        patch_kernel: as for `run_directory.load`.
        top_k: classes per image.
        strict: raise at a file that cannot be read.

    Returns:
        For each file `{"file", "predictions": [{"label", "probability"}, …]}`, the likeliest first, or
        `{"file", "error"}` where it cannot be read.

    Raises:
        UserError: if the run cannot be used, there is no such file, or `strict` and one cannot be read.
    """
    if top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1.")
    if not files:
        raise UserError("Nothing to predict: name image files, or folders of them.")
    model = load_classifier(run, img_size, patch_kernel)
    cfg = model.pretrained_cfg
    names = [str(path) for path in named_files(files, SUFFIXES, "image")]
    images = LabelledImages(sources=names, labels=np.zeros(len(names), dtype=np.int64), names=names)
    readable, reasons = read_all(images, image_mode(cfg["input_size"][0]), strict)
    predictions: dict[str, list[dict[str, Any]]] = {}
    if len(readable):
        batches = evaluation_batches(readable, cfg, strict)
        logits, _ = logits_of(model, batches)
        reasons |= dict.fromkeys(batches.unreadable(), "broken")
        read = [name for name in readable.names if name not in reasons]
        predictions = dict(zip(read, likeliest(logits, cfg["label_names"], top_k), strict=True))
    return [
        {"file": name, "error": reasons[name]} if name in reasons else {"file": name, "predictions": predictions[name]}
        for name in names
    ]


def likeliest(
    logits: Float[Tensor, "examples classes"], classes: Sequence[str], top_k: int
) -> list[list[dict[str, Any]]]:
    """For each example its `top_k` likeliest classes, `{"label", "probability"}` each, the likeliest first."""
    best = logits.softmax(1).topk(min(top_k, logits.shape[1]))
    return [
        [{"label": classes[i], "probability": share} for i, share in zip(places, shares, strict=True)]
        for places, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def accuracy_text(found: dict[str, Any]) -> str:
    """What `evaluate` found, as text."""
    rows = [("class", "images", "accuracy", "precision")]
    for name, figures in found["per_class"].items():
        rows.append((name, f"{figures['images']:,}", f"{figures['accuracy']:.2%}", f"{figures['precision']:.2%}"))
    return (
        f"{found['run']} on {found['data']} ({found['part']}), {found['images']:,} images\n"
        f"accuracy {found['accuracy']:.2%}, top 5 {found['top5']:.2%}, loss {found['loss']:.4f}\n\n"
        + table(rows, right=(1, 2, 3))
    )


def predictions_text(found: list[dict[str, Any]]) -> str:
    """What `predict` found, as text."""
    readable = [entry for entry in found if "error" not in entry]
    return table(
        [
            (_shown(entry), *(f"{each['label']} {each['probability']:.1%}" for each in entry["predictions"]))
            for entry in readable
        ]
    )


def _shown(entry: dict[str, Any], length: int = 60) -> str:
    """A file's name, or a text in one line."""
    if "file" in entry:
        return entry["file"]
    text = " ".join(entry["text"].split())
    return text if len(text) <= length else text[: length - 1] + "…"


def load_classifier(
    run: str, img_size: int | tuple[int, int] | None = None, patch_kernel: int | tuple[int, int] | None = None
) -> TimmModel:
    """The image classifier of a run directory, for another image size where one is named.

    Raises:
        UserError: if it is no run directory, or one of another task, or takes no images of that size.
    """
    config = run_directory.read_config(run)
    kind = config["model_type"]
    if kind != run_directory.VISION:
        raise UserError(f"{run} holds a model of type '{kind}', not an image classifier.")
    model = run_directory.load(run, img_size=img_size, patch_kernel=patch_kernel)
    if not getattr(model, "num_classes", 0):
        raise UserError(f"{run} holds a model without a classifier: it gives features, not classes.")
    if not model.pretrained_cfg.get("label_names"):
        model.pretrained_cfg["label_names"] = [str(index) for index in range(model.num_classes)]
    return model


def recipe_of(run: str, kind: type[RecipeT]) -> RecipeT | None:
    """The recipe of this kind that a run, or the run of a checkpoint, was trained with, where it has one."""
    for folder in (Path(run), Path(run).parent):
        path = folder / run_directory.RECIPE
        if path.is_file():
            settings = read_settings(path)
            found = RECIPES.get(str(settings.pop("task", None)))
            return make_recipe(settings, found, str(path)) if found and issubclass(found, kind) else None
    return None


def trained_columns(recipe: Recipe | None, given: dict[str, str | None]) -> dict[str, str | None]:
    """The columns of a table: those given, else those of the training."""
    return {name: column or getattr(recipe, name, None) for name, column in given.items()}


def relabelled(images: LabelledImages, names: Sequence[str], known: Sequence[str], data: str) -> LabelledImages:
    """The same images, with labels that index the model's classes in place of the data's.

    Raises:
        UserError: if the data has classes that the model does not know.
    """
    strange = [name for name in names if name not in known]
    if strange:
        raise UserError(
            f"{data} has classes that the model does not know: {', '.join(strange[:8])}. "
            f"It knows {', '.join(known[:8])}{', …' if len(known) > 8 else ''}."
        )
    index = np.array([known.index(name) for name in names])
    return LabelledImages(sources=images.sources, labels=index[images.labels], names=images.names)


def named_files(files: Sequence[str], suffixes: Container[str], what: str) -> list[Path]:
    """These files, and those of their kind in these folders.

    Raises:
        UserError: if one does not exist, or a folder holds none of its kind.
    """
    paths: list[Path] = []
    for file in files:
        path = Path(file)
        if path.is_dir():
            inside = [child for child in visible_files(path) if child.suffix.lower() in suffixes]
            if not inside:
                raise UserError(f"{file} holds no {what}.")
            paths += inside
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"There is no file {file}.")
    return paths


def same_data(first: str, second: str | None) -> bool:
    """Whether two names of data are of the same."""
    if first == second:
        return True
    if second is None:
        return False
    places = [Path(data).expanduser() for data in (first, second)]
    return places[0].exists() and places[0].resolve() == places[1].resolve()
