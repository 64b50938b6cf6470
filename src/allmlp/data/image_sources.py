"""Where labelled images lie: one function per kind of place, each giving the classes and the splits."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allmlp._version import __version__
from allmlp.data import is_hidden, visible_files
from allmlp.data.labelled_images import SUFFIXES, LabelledImages
from allmlp.data.shards import (
    KINDS,
    TRAIN_NAMES,
    VALIDATION_NAMES,
    ImageShards,
    Shards,
    check_class_column,
    class_names,
    find_shards,
    first_columns,
    measured,
    refuse_columns,
    refuse_missing_path,
    split_names,
)
from allmlp.errors import UserError, first_line, listed

DIGITS = "digits"

Found = tuple[tuple[str, ...], Mapping[str, LabelledImages | ImageShards]]
"""The classes, and the images of `train` and, where the data has one, of `validation`."""


def find(data: str, image_column: str | None = None, label_column: str | None = None, streaming: bool = False) -> Found:
    """Recognise what `data` names and list its images; see `allmlp.data.images.load_images`.

    Raises:
        UserError: if there is no such data, it has no labelled images, a column is named and it is no table, or it is
            to be streamed and has no shards.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    if data == DIGITS:
        refuse_columns(data, **columns)
        if streaming:
            raise UserError(f"{data} cannot be streamed: that takes .parquet or .tar files.")
        return digits()
    path, shards = Path(data).expanduser(), shards_to_stream(data) if streaming else find_shards(data)
    if shards:
        read = streamed if streaming or shards["train"][0].endswith(".tar") else table
        return read(shards, data, image_column, label_column)
    if path.is_file():
        raise UserError(
            f"{data} is a file; images come from a folder of class folders, from .parquet or from .tar files."
        )
    if path.is_dir():
        refuse_columns(data, **columns)
        return folder(path)
    refuse_missing_path(data)
    return hub(data, image_column, label_column)


def is_table(data: str) -> bool:
    """Whether `data` has columns: shards, or a dataset of the Hub."""
    return data != DIGITS and bool(find_shards(data) or not Path(data).expanduser().exists())


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
        UserError: if there are no class folders, or one of them holds no file; or validation has a class of its own.
    """
    inside = {child.name.lower(): child for child in path.iterdir() if child.is_dir()}
    found = next((inside[name] for name in TRAIN_NAMES if name in inside), path)
    # Trains are photographed, too: a folder without class folders, beside others of its kind, is a class.
    others = [name for name in inside if name not in (*TRAIN_NAMES, *VALIDATION_NAMES) and not is_hidden(Path(name))]
    is_class = others and not any(child.is_dir() for child in found.iterdir())
    roots = {"train": path if is_class else found}
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
            found = visible_files(root / name)
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
        UserError: if it cannot be loaded, or has no labelled images.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        raise UserError(
            f"'{name}' is neither {DIGITS}, nor a file or folder here, nor a Hub dataset that can be loaded: "
            f"{first_line(error)}"
        ) from error
    return _from_tables(loaded, name, image_column, label_column)


def table(files: Mapping[str, Sequence[str]], data: str, image_column: str | None, label_column: str | None) -> Found:
    """Parquet files with a column of encoded images and one of classes.

    Raises:
        UserError: if they cannot be read, or have no such columns.
    """
    import datasets

    try:
        loaded = datasets.load_dataset("parquet", data_files={name: list(paths) for name, paths in files.items()})
    except Exception as error:
        broken = broken_shard(path for split in files.values() for path in split) or data
        raise UserError(f"{broken} cannot be read as parquet: {first_line(error.__cause__ or error)}") from error
    return _from_tables(loaded, data, image_column, label_column)


def _from_tables(tables: Any, data: str, image_column: str | None, label_column: str | None) -> Found:
    import datasets

    chosen = split_names(tables, data)
    features = tables[chosen["train"]].features
    image_column = _image_column(features, data, image_column)
    label_column = _label_column(features, data, label_column)
    check_class_column(features, label_column, data)
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
        # Arrow has an error for each pair of types, datasets for others.
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
    for name in ("label", "labels", "class", "cls", "target"):
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


def shards_to_stream(data: str) -> dict[str, tuple[str, ...]]:
    """The shards that `data` names, by split, here or on the Hub.

    Raises:
        UserError: if there are none.
    """
    if shards := find_shards(data):
        return shards
    if Path(data).expanduser().exists():
        raise UserError(f"{data} cannot be streamed: that takes .parquet or .tar files.")
    refuse_missing_path(data)
    return hub_shards(data)


def hub_shards(name: str) -> dict[str, tuple[str, ...]]:
    """The addresses of a Hub dataset's shards, by split.

    Raises:
        UserError: if it cannot be found, or has no shards.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        files = datasets.load_dataset_builder(repository, configuration or None).config.data_files or {}
    except Exception as error:
        raise UserError(f"'{name}' is no file or folder here, and no Hub dataset: {first_line(error)}") from error
    splits = {split: tuple(files[found]) for split, found in split_names(files, name).items()} if files else {}
    if not splits or not splits["train"][0].endswith(KINDS):
        raise UserError(f"The Hub's {name} has no .parquet or .tar files to train on, and cannot be streamed.")
    return splits


def streamed(
    files: Mapping[str, Sequence[str]], data: str, image_column: str | None, label_column: str | None
) -> Found:
    """Shards by their splits, without reading the images: what a row means is told from those of `train`.

    Classes come from the column's type, from `classnames.txt` beside the shards, or from looking at all labels.

    Raises:
        UserError: if they cannot be read, or have no such columns.
    """
    import datasets

    train = files["train"]
    columns = first_columns(train[0])
    in_tar = train[0].endswith(".tar")
    # Rows of a tar file may hold images of different kinds, each under an ending of its own.
    by_ending = in_tar and image_column is None and any(f".{ending}" in SUFFIXES for ending in columns)
    image = None if by_ending else _image_column(columns, data, image_column)
    label = _label_column(columns, data, label_column)
    if not in_tar:
        check_class_column(columns, label, data)
    classes = class_names(train[0])
    if isinstance(columns[label], datasets.ClassLabel):
        classes = tuple(columns[label].names)
    sizes, values = measured(train, None if classes else label)
    names = tuple(str(value) for value in values) if classes is None else classes
    index: dict[Any, int] = {name: place for place, name in enumerate(names)}
    index |= {value: place for place, value in enumerate(range(len(names)) if classes else values)}
    shards = Shards(files=tuple(train), sizes=sizes, columns=(image, label) if image else ())
    images = ImageShards(shards=shards, image=image, label=label, index=index)
    return names, {split: images if split == "train" else _held_out(images, files[split]) for split in files}


def _held_out(train: ImageShards, files: Sequence[str]) -> ImageShards:
    """Shards held out, whose rows mean what those to train on do."""
    import datasets

    index, column = train.index, first_columns(files[0]).get(train.label)
    # A column with names of its own counts by these.
    if isinstance(column, datasets.ClassLabel):
        index = {place: index[name] for place, name in enumerate(column.names) if name in index}
    shards = Shards(files=tuple(files), sizes=measured(files)[0], columns=train.shards.columns)
    return dataclasses.replace(train, shards=shards, index=index)


def stored(images: ImageShards) -> LabelledImages:
    """The images of shards where any of them can be asked for: copied into datasets' cache once, and mapped from it.

    Raises:
        UserError: if a shard cannot be read, or a row has no class or holds something else than an image.
    """
    import datasets
    import fsspec
    from datasets.exceptions import DatasetGenerationError

    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"image": image, "label": datasets.Value("int64"), "name": datasets.Value("string")}
    files = [fsspec.url_to_fs(file) for file in images.shards.files]
    # The cache knows a copy by these arguments, so that they say what it was made from, and by which reader.
    made_from = (__version__, *(system.ukey(path) for system, path in files))
    try:
        copy = datasets.Dataset.from_generator(
            _records, datasets.Features(features), gen_kwargs={"images": images, "made_from": made_from}
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        where = listed(images.shards.files, 2)
        raise UserError(f"{where} cannot be read: {first_line(error.__cause__ or error)}") from error
    return LabelledImages(
        sources=copy["image"], labels=np.array(copy["label"], dtype=np.int64), names=list(copy["name"])
    )


def _records(images: ImageShards, made_from: Sequence[str]) -> Iterator[dict[str, Any]]:
    for row in images.shards.rows(range(len(images))):
        _, image, label, name = images.example(row)
        yield {"image": image, "label": label, "name": name}


def broken_shard(files: Iterable[str | Path]) -> str | Path | None:
    """The first parquet file without its end, where a table says what lies where; None where all of them have it."""
    from pyarrow import parquet

    for file in files:
        try:
            parquet.read_metadata(file)
        # Whatever is wrong with it, it is this one.
        except Exception:
            return file
    return None


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    children = sorted(root.iterdir())
    classes = [child.name for child in children if child.is_dir() and not is_hidden(child.relative_to(root))]
    if not classes:
        what = "holds files, but no class folders to label them" if children else "is empty"
        raise UserError(f"{root} {what}; images go into one folder per class.")
    return classes
