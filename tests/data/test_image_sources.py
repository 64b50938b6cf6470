"""Places where images lie."""

import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allmlp.data import image_sources
from allmlp.data.labelled_images import UnreadableImage, decode
from allmlp.data.text_sources import find_texts
from allmlp.errors import UserError
from tests.pictures import COLOURS, picture, write_classes

NAMES = list(COLOURS)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _encoded(name: str, seed: int) -> dict[str, object]:
    buffer = io.BytesIO()
    picture(name, seed).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _rows(each: int = 2) -> dict[str, list[object]]:
    pairs = [(name, seed) for name in NAMES for seed in range(each)]
    return {"image": [_encoded(*pair) for pair in pairs], "label": [NAMES.index(name) for name, _ in pairs]}


def _write(path: Path, rows: dict[str, Sequence[object]], features: datasets.Features | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if features is None:
        pq.write_table(pa.table(rows), path)
    else:
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


TYPED = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


def test_parquet_takes_classes_from_its_features(tmp_path: Path) -> None:
    _write(tmp_path / "one.parquet", _rows(), TYPED)
    classes, splits = image_sources.find(str(tmp_path / "one.parquet"))
    assert classes == tuple(NAMES)
    assert list(splits) == ["train"]
    assert splits["train"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits["train"].names[3].endswith(" train row 3")
    assert decode(splits["train"].sources[3]).tobytes() == picture("green", 1).tobytes()


def test_a_folder_of_parquet_files_is_split_by_their_names(tmp_path: Path) -> None:
    _write(tmp_path / "data" / "train-00000-of-00002.parquet", _rows(3), TYPED)
    _write(tmp_path / "data" / "train-00001-of-00002.parquet", _rows(1), TYPED)
    _write(tmp_path / "data" / "test.parquet", _rows(1), TYPED)
    classes, splits = image_sources.find(str(tmp_path / "data"))
    assert classes == tuple(NAMES)
    assert {name: len(images) for name, images in splits.items()} == {"train": 12, "validation": 3}


def test_untyped_columns_are_found_by_shape_and_name(tmp_path: Path) -> None:
    rows = _rows(1)
    rows = {"picture": rows["image"], "class": ["wolf", "cat", "cat"], "id": [1, 2, 3]}
    _write(tmp_path / "plain.parquet", rows)
    classes, splits = image_sources.find(str(tmp_path / "plain.parquet"))
    assert classes == ("cat", "wolf")
    assert splits["train"].labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize("named", [{"image_column": "photo"}, {"label_column": "photo"}])
def test_what_is_no_table_has_no_columns(tmp_path: Path, named: dict[str, str]) -> None:
    write_classes(tmp_path / "folder", each=1)
    for data in (str(tmp_path / "folder"), image_sources.DIGITS):
        assert not image_sources.is_table(data)
        with pytest.raises(UserError, match=f"is no table, .* 'photo'; leave --{next(iter(named))[:5]}-column out"):
            image_sources.find(data, **named)


def test_columns_can_be_named_and_must_exist(tmp_path: Path) -> None:
    rows = _rows(1)
    two = datasets.Features(
        {"image": datasets.Image(), "fine": datasets.ClassLabel(names=NAMES), "coarse": datasets.ClassLabel(2)}
    )
    _write(tmp_path / "two.parquet", {"image": rows["image"], "fine": rows["label"], "coarse": [0, 0, 1]}, two)
    file = str(tmp_path / "two.parquet")
    with pytest.raises(UserError, match=r"several columns of classes: fine, coarse\. Name one: --label-column"):
        image_sources.find(file)
    assert image_sources.find(file, label_column="coarse")[0] == ("0", "1")
    with pytest.raises(UserError, match="no column 'colour'; its columns are image, fine, coarse"):
        image_sources.find(file, label_column="colour")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a"], "label": [1]}, "no column of images; its columns are text, label"),
        ({"image": [_encoded("red", 0)], "size": [1]}, "no column of classes; its columns are image, size"),
    ],
)
def test_tables_without_images_or_classes_are_refused(
    tmp_path: Path, rows: dict[str, Sequence[object]], message: str
) -> None:
    _write(tmp_path / "table.parquet", rows)
    with pytest.raises(UserError, match=message):
        image_sources.find(str(tmp_path / "table.parquet"))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", [[1], [2], [1]], "Column 'label' of .*table.parquet holds no classes, but values of type list"),
        ("label", [{"a": 1}] * 3, "Column 'label' of .*table.parquet holds no classes, but values of type dict"),
        ("image", [1, 2, 3], "Column 'image' of .*table.parquet holds no images"),
        ("image", [["a"]] * 3, "Column 'image' of .*table.parquet holds no images"),
        ("image", [{"bytes": 5, "path": 7}] * 3, "Column 'image' of .*table.parquet holds no images"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path: Path, column: str, values: list[object], message: str) -> None:
    file = str(tmp_path / "table.parquet")
    _write(tmp_path / "table.parquet", {**_rows(1), column: values})
    with pytest.raises(UserError, match=message):
        image_sources.find(file)
    if column == "label":
        with pytest.raises(UserError, match=message):
            image_sources.find(file, streaming=True)


def test_what_a_row_names_is_read_where_it_is_a_file(tmp_path: Path) -> None:
    picture("red").save(tmp_path / "red.png")
    paths = [str(tmp_path / "red.png"), "/dev/zero", "/dev/null"]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": ["a", "a", "a"]}
    _write(tmp_path / "table.parquet", rows)
    sources = image_sources.find(str(tmp_path / "table.parquet"))[1]["train"].sources
    assert decode(sources[0]).size == (16, 12)
    for source in (sources[1], sources[2]):
        with pytest.raises(UnreadableImage, match="not a file"):
            decode(source)


def test_rows_without_a_class_are_refused(tmp_path: Path) -> None:
    rows = _rows(1)
    rows["label"][1] = -1
    _write(tmp_path / "table.parquet", rows, TYPED)
    with pytest.raises(UserError, match=r"Split 'train' .* labels that are no class: -1"):
        image_sources.find(str(tmp_path / "table.parquet"))


def test_a_shard_that_breaks_off_is_named(tmp_path: Path) -> None:
    shards = [tmp_path / f"train-0000{number}.parquet" for number in range(3)]
    for shard in shards:
        _write(shard, _rows(3), TYPED)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"^{shards[1]} cannot be read as parquet: "):
        image_sources.find(str(tmp_path))
    with pytest.raises(UserError, match=f"^{shards[1]} cannot be read as text: "):
        find_texts(str(tmp_path))


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        image_sources.find(str(tmp_path / "broken.parquet"))
    (tmp_path / "archive.zip").write_text("no table")
    with pytest.raises(UserError, match="is a file; images come from"):
        image_sources.find(str(tmp_path / "archive.zip"))


def test_hub_datasets_load_through_datasets(tmp_path: Path) -> None:
    # load_dataset takes a local repository exactly as it takes one from the Hub.
    _write(tmp_path / "repository" / "train.parquet", _rows(2), TYPED)
    _write(tmp_path / "repository" / "validation.parquet", _rows(1), TYPED)
    classes, splits = image_sources.hub(str(tmp_path / "repository"), None, None)
    assert classes == tuple(NAMES)
    assert {name: len(images) for name, images in splits.items()} == {"train": 6, "validation": 3}


def test_a_name_that_is_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'flowerz' is neither digits, nor a file or folder here, nor a Hub dataset"):
        image_sources.find("flowerz")
    for path in ("./flowers", "/no/such/folder", "a/b/c"):
        with pytest.raises(UserError, match="There is no file or folder"):
            image_sources.find(path)


def test_folders_without_class_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        image_sources.find(str(tmp_path))
    picture("red").save(tmp_path / "red.png")
    with pytest.raises(UserError, match="holds files, but no class folders"):
        image_sources.find(str(tmp_path))


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    names = ("plane", "train", "val")
    for name in names:
        (tmp_path / name).mkdir()
        picture("red").save(tmp_path / name / "00.png")
    classes, splits = image_sources.find(str(tmp_path))
    assert classes == names
    assert {split: images.labels.tolist() for split, images in splits.items()} == {"train": [0, 1, 2]}
    (tmp_path / "plane").rename(tmp_path / ".plane")
    with pytest.raises(UserError, match=r"train holds files, but no class folders"):
        image_sources.find(str(tmp_path))


def test_hidden_files_and_those_of_hidden_folders_are_no_images(tmp_path: Path) -> None:
    root = write_classes(tmp_path / ".data", each=2)
    for hidden in ("red/.ipynb_checkpoints/00-checkpoint.png", "red/._00.png", "red/more/.x/y/00.png", ".git/00.png"):
        (root / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / hidden).write_bytes((root / "red" / "00.png").read_bytes())
    (root / "red" / "more" / "00.png").write_bytes((root / "red" / "00.png").read_bytes())
    classes, splits = image_sources.find(str(root))
    assert classes == tuple(COLOURS)
    assert [Path(name).relative_to(root / "red") for name in splits["train"].names if "/red/" in name] == [
        Path("00.png"),
        Path("01.png"),
        Path("more/00.png"),
    ]


def test_validation_may_not_have_classes_of_its_own(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", names=("red", "blue"))
    write_classes(tmp_path / "test")
    with pytest.raises(UserError, match=r"holds classes that .*train does not: green"):
        image_sources.find(str(tmp_path))
