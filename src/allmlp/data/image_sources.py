"""Where labelled images lie: one function per kind of place, each giving the classes and the splits."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allmlp.data.labelled_images import LabelledImages
from allmlp.errors import UserError

DIGITS = "digits"
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test", "eval")

Found = tuple[tuple[str, ...], dict[str, LabelledImages]]
"""The classes, and the images of `train` and, where the data has one, of `validation`."""


def find(data: str, image_column: str | None = None, label_column: str | None = None) -> Found:
    """Recognises what `data` names and lists its images; see `allmlp.data.images.load_images`.

    Raises:
        UserError: There is no such data, or it has no labelled images.
    """
    if data == DIGITS:
        return digits()
    path = Path(data).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"{data} is a file; images come from a folder of class folders or a .parquet file.")
        return table({"train": [str(path)]}, data, image_column, label_column)
    if path.is_dir():
        parquet = parquet_splits(path)
        return table(parquet, data, image_column, label_column) if parquet else folder(path)
    if data.startswith((".", "/", "~")) or data.count("/") > 1 or (os.sep != "/" and os.sep in data):
        raise UserError(f"There is no file or folder {data}.")
    return hub(data, image_column, label_column)


def digits() -> Found:
    """scikit-learn's 1,797 handwritten digits, 8×8 scans with 17 grey levels, scaled to 0…255."""
    from sklearn.datasets import load_digits

    scans, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    pixels = (scans.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    names = [f"digit {index}" for index in range(len(labels))]
    images = LabelledImages(sources=pixels, labels=labels, names=names)
    return tuple(str(digit) for digit in range(10)), {"train": images}


def folder(path: Path) -> Found:
    """A folder of class folders, or one that holds such folders for training and, maybe, for validation.

    Raises:
        UserError: There are no class folders, or one of them holds no file; or validation has a class of its own.
    """
    inside = {child.name.lower(): child for child in path.iterdir() if child.is_dir()}
    roots = {"train": next((inside[name] for name in TRAIN_NAMES if name in inside), path)}
    if roots["train"] != path:
        validation = next((inside[name] for name in VALIDATION_NAMES if name in inside), None)
        roots |= {"validation": validation} if validation else {}
    classes = tuple(_class_folders(roots["train"]))
    splits = {}
    for split_name, root in roots.items():
        unknown = [name for name in _class_folders(root) if name not in classes]
        if unknown:
            raise UserError(f"{root} holds classes that {roots['train']} does not: {', '.join(unknown)}.")
        files, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(
                file for file in (root / name).rglob("*") if file.is_file() and not file.name.startswith(".")
            )
            if not found and split_name == "train":
                raise UserError(f"Class '{name}' has no image: {root / name} is empty.")
            files += found
            labels += [label] * len(found)
        if not files:
            raise UserError(f"{root} holds no image.")
        names = [str(file) for file in files]
        splits[split_name] = LabelledImages(sources=names, labels=np.array(labels), names=names)
    return classes, splits


def hub(name: str, image_column: str | None, label_column: str | None) -> Found:
    """A dataset of the Hugging Face Hub, downloaded once into its cache.

    Raises:
        UserError: It cannot be loaded, or has no labelled images.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"'{name}' is neither {DIGITS}, nor a file or folder here, nor a Hub dataset that can be loaded: {reason}"
        ) from error
    return _from_tables(loaded, name, image_column, label_column)


def table(files: Mapping[str, Sequence[str]], data: str, image_column: str | None, label_column: str | None) -> Found:
    """Parquet files with a column of encoded images and one of classes.

    Raises:
        UserError: They cannot be read, or have no such columns.
    """
    import datasets

    try:
        loaded = datasets.load_dataset("parquet", data_files={name: list(paths) for name, paths in files.items()})
    except Exception as error:
        cause = error.__cause__ or error
        broken = broken_shard(path for paths in files.values() for path in paths) or data
        raise UserError(f"{broken} cannot be read as parquet: {str(cause).strip().splitlines()[0]}") from error
    return _from_tables(loaded, data, image_column, label_column)


def _from_tables(tables: Any, data: str, image_column: str | None, label_column: str | None) -> Found:
    import datasets

    chosen = {"train": next((name for name in TRAIN_NAMES if name in tables), None)}
    if chosen["train"] is None:
        if len(tables) != 1:
            raise UserError(f"{data} has no training split; its splits are {', '.join(tables)}.")
        chosen["train"] = next(iter(tables))
    else:
        chosen["validation"] = next((name for name in VALIDATION_NAMES if name in tables), None)
    chosen = {split: name for split, name in chosen.items() if name}
    features = tables[chosen["train"]].features
    image_column = _image_column(features, data, image_column)
    label_column = _label_column(features, data, label_column)
    if not isinstance(features[label_column], (datasets.ClassLabel, datasets.Value)):
        kind = type(features[label_column]).__name__.lower()
        raise UserError(f"Column '{label_column}' of {data} holds no classes, but values of type {kind}.")
    raw = {split: tables[name].with_format("arrow")[label_column].to_pylist() for split, name in chosen.items()}
    if isinstance(features[label_column], datasets.ClassLabel):
        classes = tuple(features[label_column].names)
        index: dict[Any, int] = {label: label for label in range(len(classes))}
    else:
        values = sorted(value for value in set(raw["train"]) if value is not None)
        classes = tuple(str(value) for value in values)
        index = {value: label for label, value in enumerate(values)}
    splits = {}
    for split, name in chosen.items():
        strange = sorted({str(value) for value in raw[split] if value not in index})
        if strange:
            raise UserError(f"Split '{name}' of {data} has labels that are no class: {', '.join(strange[:5])}.")
        try:
            column = tables[name].cast_column(image_column, datasets.Image(decode=False))[image_column]
        # Arrow has an error for each pair of types, datasets for others
        except Exception as error:
            raise UserError(f"Column '{image_column}' of {data} holds no images: {error}") from error
        splits[split] = LabelledImages(
            sources=column,
            labels=np.array([index[value] for value in raw[split]], dtype=np.int64),
            names=[f"{data} {name} row {row}" for row in range(len(raw[split]))],
        )
    return classes, splits


def _image_column(features: Mapping[str, Any], data: str, wanted: str | None) -> str:
    import datasets

    if wanted is not None:
        return _given_column(features, data, wanted)
    for name, feature in features.items():
        encoded = isinstance(feature, Mapping) and "bytes" in feature
        if isinstance(feature, datasets.Image) or encoded:
            return name
    for name in ("image", "img"):
        if name in features:
            return name
    raise UserError(f"{data} has no column of images; its columns are {', '.join(features)}. Name it: --image-column.")


def _label_column(features: Mapping[str, Any], data: str, wanted: str | None) -> str:
    import datasets

    if wanted is not None:
        return _given_column(features, data, wanted)
    for name in ("label", "labels", "class", "target"):
        if name in features:
            return name
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    if typed:
        raise UserError(f"{data} has several columns of classes: {', '.join(typed)}. Name one: --label-column.")
    raise UserError(f"{data} has no column of classes; its columns are {', '.join(features)}. Name it: --label-column.")


def _given_column(features: Mapping[str, Any], data: str, wanted: str) -> str:
    if wanted not in features:
        raise UserError(f"{data} has no column '{wanted}'; its columns are {', '.join(features)}.")
    return wanted


def parquet_splits(path: Path) -> dict[str, list[str]]:
    """The parquet files of a folder by split, told from how their names begin; all are `train` where none says so."""
    files = sorted(path.rglob("*.parquet"))
    named = {
        split: [str(file) for file in files if file.name.lower().startswith(prefixes)]
        for split, prefixes in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES))
    }
    if not named["train"]:
        return {"train": [str(file) for file in files]} if files else {}
    return {split: members for split, members in named.items() if members}


def broken_shard(files: Iterable[str | Path]) -> str | Path | None:
    """The first parquet file without its end, where a table says what lies where; None where all of them have it."""
    from pyarrow import parquet

    for file in files:
        try:
            parquet.read_metadata(file)
        # whatever is wrong with it, it is this one
        except Exception:
            return file
    return None


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    children = sorted(root.iterdir())
    classes = [child.name for child in children if child.is_dir() and not child.name.startswith(".")]
    if not classes:
        what = "holds files, but no class folders to label them" if children else "is empty"
        raise UserError(f"{root} {what}; images go into one folder per class.")
    return classes
