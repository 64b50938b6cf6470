"""Streaming: each example of each shard exactly once, whoever reads."""

import collections
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from allmlp.data import as_is, image_sources, shards
from allmlp.data.image_batches import evaluation_transform
from allmlp.data.image_stream import ImageStream
from allmlp.data.images import load_images
from allmlp.data.sampling import IGNORED
from allmlp.data.shards import Row, Shards, Share, find_shards, measured, shuffled
from allmlp.errors import UserError
from tests.data.shards import picture, write_parquet, write_tars

SIZES = (7, 13, 1, 22)
CFG = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
Writer = Callable[..., None]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _stream(folder: Path, process: int = 0, processes: int = 1, batch_size: int = 4, **settings: Any) -> ImageStream:
    _, splits = image_sources.find(str(folder), streaming=True)
    images = splits["train"]
    share = Share(examples=len(images), batch_size=batch_size, process=process, processes=processes)
    arguments = {"mean": CFG["mean"], "std": CFG["std"], "buffer": 6, "seed": 0, **settings}
    return ImageStream(images, evaluation_transform({**CFG, "interpolation": "bicubic"}), share=share, **arguments)


def _epoch(stream: ImageStream, workers: int = 0) -> list[dict[str, Any]]:
    return list(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is))


def _names(*epochs: list[dict[str, Any]]) -> list[str]:
    return [name for epoch in epochs for batch in epoch for name in batch["names"]]


@pytest.mark.parametrize("write", [write_tars, write_parquet])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_exactly_once(tmp_path: Path, write: Writer, processes: int, workers: int) -> None:
    write(tmp_path, SIZES)
    epochs = [_epoch(_stream(tmp_path, process, processes), workers) for process in range(processes)]
    shards = find_shards(str(tmp_path))["train"]
    expected = [f"{file} row {row}" for file, size in zip(shards, SIZES, strict=True) for row in range(size)]
    assert collections.Counter(_names(*epochs)) == collections.Counter(expected)
    # None waits for another.
    assert {len(epoch) for epoch in epochs} == {-(-sum(SIZES) // (4 * processes))}
    assert len(epochs[0]) == len(_stream(tmp_path, 0, processes))
    for epoch in epochs:
        for batch in epoch:
            brightness = (batch["pixel_values"].mean((1, 2, 3)) * 127.5 + 127.5).numpy()
            assert (np.round((brightness - 20) / 70) == batch["labels"].numpy()).all()


@given(
    examples=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    processes=st.integers(1, 7),
)
def test_shares_are_even_and_whole(examples: int, batch_size: int, processes: int) -> None:
    shares = [Share(examples=examples, batch_size=batch_size, process=i, processes=processes) for i in range(processes)]
    parts = [share.parts() for share in shares]
    assert [place for mine in parts for part in mine for place in part] == list(range(examples))
    assert {len(mine) for mine in parts} == {shares[0].batches}
    taken = [sum(map(len, mine)) for mine in parts]
    assert max(taken) - min(taken) <= 1


def test_a_process_left_without_examples_gets_a_batch_that_does_not_count(tmp_path: Path) -> None:
    write_parquet(tmp_path, (5,))
    one, other = (_epoch(_stream(tmp_path, process, 2, batch_size=2)) for process in range(2))
    assert [len(batch["names"]) for batch in one] == [2, 0]
    assert [len(batch["names"]) for batch in other] == [2, 1]
    assert one[1]["labels"].tolist() == [IGNORED]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_batches_to_skip_are_not_made_and_the_others_stay(tmp_path: Path, workers: int) -> None:
    write_tars(tmp_path, SIZES)
    stream = _stream(tmp_path, batch_size=7)
    whole = _epoch(stream, workers)
    # Which no number of workers above one shares out evenly.
    assert len(whole) == 7
    for skip in (0, 1, 3, 4, 6, 7):
        stream.skip = skip
        rest = _epoch(stream, workers)
        assert rest[:skip] == [None] * skip
        assert _names(rest[skip:]) == _names(whole[skip:])
        for batch, expected in zip(rest[skip:], whole[skip:], strict=True):
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_the_order_follows_seed_and_epoch(tmp_path: Path) -> None:
    write_tars(tmp_path, SIZES)
    stream = _stream(tmp_path)
    first = _names(_epoch(stream))
    assert _names(_epoch(_stream(tmp_path))) == first
    assert _names(_epoch(_stream(tmp_path, seed=1))) != first
    stream.set_epoch(1)
    again = _names(_epoch(stream))
    assert again != first
    assert sorted(again) == sorted(first)


@given(count=st.integers(0, 50), buffer=st.integers(1, 60))
def test_the_buffer_loses_nothing(count: int, buffer: int) -> None:
    rows = [Row(number=number, name="", values={}) for number in range(count)]
    found = [row.number for row in shuffled(iter(rows), buffer, np.random.default_rng(0))]
    assert sorted(found) == list(range(count))
    # An example comes at most a buffer's length too early.
    assert all(number - place < buffer for place, number in enumerate(found))


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_shards_elsewhere_are_read_through_fsspec(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, (3, 4))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", "/photos/", recursive=True)
    found = find_shards("memory://photos")
    assert all(file.startswith("memory://") for file in found["train"])
    _, splits = image_sources.find("memory://photos", streaming=True)
    assert [row.number for row in splits["train"].shards.rows(range(2, 6))] == [2, 3, 4, 5]
    memory.rm("/photos", recursive=True)


def test_splits_are_told_from_names(tmp_path: Path) -> None:
    for name in ("imagenet1k-train-0000", "imagenet1k-validation-00"):
        (tmp_path / f"{name}.tar").touch()
    found = find_shards(str(tmp_path))
    assert [Path(file).name for file in found["train"]] == ["imagenet1k-train-0000.tar"]
    assert [Path(file).name for file in found["validation"]] == ["imagenet1k-validation-00.tar"]
    # As of a data set with splits, the first that is meant for validation, and no other.
    for name in ("imagenet1k-test-00", "imagenet1k-dev-00"):
        (tmp_path / f"{name}.tar").touch()
    assert find_shards(str(tmp_path)) == found
    (tmp_path / "more.parquet").touch()
    with pytest.raises(UserError, match="holds both"):
        find_shards(str(tmp_path))
    with pytest.raises(UserError, match="memory://nothing holds no shards"):
        find_shards("memory://nothing")


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "photos"
    for name in ("0.tar", "._0.tar", ".old/1.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for data in (folder, folder / "*.tar", folder / "**" / "*.tar", folder / "0.tar"):
        assert find_shards(str(data)) == {"train": (str(folder / "0.tar"),)}


def test_a_word_for_training_wins(tmp_path: Path) -> None:
    for name in ("train-dev-0", "val-0"):
        (tmp_path / f"{name}.tar").touch()
    found = find_shards(str(tmp_path))
    assert [Path(file).name for split in ("train", "validation") for file in found[split]] == [
        "train-dev-0.tar",
        "val-0.tar",
    ]


def test_where_none_is_for_training_all_are(tmp_path: Path) -> None:
    for name in ("val-0", "test-0"):
        (tmp_path / f"{name}.tar").touch()
    assert [Path(file).name for file in find_shards(str(tmp_path))["train"]] == ["test-0.tar", "val-0.tar"]


def test_known_lengths_spare_looking_into_tar_files(tmp_path: Path) -> None:
    write_tars(tmp_path, (3, 4))
    files = find_shards(str(tmp_path))["train"]
    assert measured(files) == ((3, 4), [])
    assert measured(files, "cls") == ((3, 4), [0, 1, 2])
    names = [Path(file).name for file in files]
    info = {"splits": {"train": {"filenames": names, "shard_lengths": [30, 40], "num_samples": 70}}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert measured(files)[0] == (30, 40)
    (tmp_path / "classnames.txt").write_bytes(b"bird\r\ncat\r\ndog\r\n")
    classes, splits = image_sources.find(str(tmp_path))
    images = splits["train"]
    assert classes == ("bird", "cat", "dog")
    assert images.index[2] == images.index["dog"] == 2
    with pytest.raises(UserError, match=r"train-0000.tar ends after 3 of its 30 examples"):
        list(images.shards.rows(range(70)))
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": names}}}))
    with pytest.raises(UserError, match=r"_info.json beside .* is not as timm writes it"):
        measured(files)


def test_a_broken_shard_and_a_broken_image_are_named(tmp_path: Path) -> None:
    write_tars(tmp_path, (6,))
    file = tmp_path / "train-0000.tar"
    with tarfile.open(file) as archive:
        place = archive.getmember("000002.png").offset_data
    content = bytearray(file.read_bytes())
    content[place : place + 8] = bytes(8)
    file.write_bytes(content)
    stream = _stream(tmp_path)
    assert len(_names(_epoch(stream, workers=1))) == 5
    assert stream.unreadable() == [f"{file} row 2"]
    (tmp_path / "train-0001.parquet").touch()
    with pytest.raises(UserError, match=r"train-0001.parquet cannot be read"):
        list(Shards(files=(str(tmp_path / "train-0001.parquet"),), sizes=(3,)).rows(range(3)))


def test_only_rows_of_a_known_class_are_examples(tmp_path: Path) -> None:
    row = {"0.png": picture(0), "0.cls": b"1"}
    others = {"1.png": picture(1), "2.png": picture(2), "2.cls": "²".encode()}
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in {"._0.png": b"macOS", **row, **others}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "classnames.txt").write_text("bird\ncat\n")
    images = image_sources.find(str(tmp_path))[1]["train"]
    first, *unknown = images.shards.rows(range(len(images)))
    assert images.example(first)[:3] == (0, {"bytes": row["0.png"], "path": None}, 1)
    for number, (broken, label) in enumerate(zip(unknown, ("None", "'²'"), strict=True), 1):
        with pytest.raises(UserError, match=rf"train.tar row {number} has {label} in 'cls', which is no class"):
            images.example(broken)


def test_training_streams_and_validation_does_not(tmp_path: Path) -> None:
    write_tars(tmp_path / "photos", (6, 9))
    with pytest.raises(UserError, match="nothing is held out"):
        load_images(str(tmp_path / "photos"))
    write_tars(tmp_path / "photos", (6,), "val", first=90)
    data = load_images(str(tmp_path / "photos"))
    assert len(data.train) == 15
    assert data.classes == ("0", "1", "2")
    assert data.validation.labels.tolist() == [0, 1, 2, 0, 1, 2]
    write_parquet(tmp_path / "tables", (8,))
    write_parquet(tmp_path / "tables", (4,), "test", first=90)
    data = load_images(str(tmp_path / "tables"), streaming=True)
    assert (len(data.train), len(data.validation)) == (8, 4)
    assert len(load_images(str(tmp_path / "tables")).train.labels) == 8


def test_each_epoch_and_seed_shuffles_a_shard_anew(tmp_path: Path) -> None:
    write_tars(tmp_path, (20,))
    stream = _stream(tmp_path)
    first = _names(_epoch(stream))
    assert _names(_epoch(_stream(tmp_path, seed=1))) != first
    stream.set_epoch(1)
    assert _names(_epoch(stream)) != first


def _write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_broken_images_of_streamed_validation_are_left_out_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tars(tmp_path, (6,))
    first, last = {"0.png": picture(0), "0.cls": b"0"}, {"2.png": picture(2), "2.cls": b"2"}
    _write_tar(tmp_path / "val.tar", {**first, "1.png": b"broken", "1.cls": b"1", **last})
    data = load_images(str(tmp_path))
    assert data.validation.labels.tolist() == [0, 2]
    assert len(data.unreadable) == 1
    assert f"left out 1 of {tmp_path} that cannot be read" in caplog.text
    with pytest.raises(UserError, match="cannot be read as an image"):
        load_images(str(tmp_path), strict=True)


def test_streamed_validation_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path, (6,))
    _write_tar(tmp_path / "val.tar", {"0.png": b"broken", "0.cls": b"1"})
    with pytest.raises(UserError, match=rf"No image of {tmp_path} can be read: .* row 0 \(not an image\)"):
        load_images(str(tmp_path))


def _write_labelled(path: Path, labels: Sequence[str]) -> None:
    """A tar file of an image for each of these contents of `cls`."""
    content = {}
    for number, label in enumerate(labels):
        content |= {f"{number}.png": picture(number), f"{number}.cls": label.encode()}
    _write_tar(path, content)


@pytest.mark.parametrize("places", [("train", "val"), ("train",)])
def test_streamed_validation_takes_its_class_names_from_training(tmp_path: Path, places: Sequence[str]) -> None:
    _write_labelled(tmp_path / "train" / "0.tar", "0101")
    _write_labelled(tmp_path / "val" / "0.tar", "10")
    for place in places:
        (tmp_path / place / "classnames.txt").write_text("cat\ndog\n")
    data = load_images(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.validation.labels.tolist() == [1, 0]
    assert data.validation.names == [f"{tmp_path}/val/0.tar row {row}" for row in range(2)]


def test_classes_of_tar_files_may_be_words(tmp_path: Path) -> None:
    _write_labelled(tmp_path / "train.tar", ["dog", "cat", "dog"])
    _write_labelled(tmp_path / "val.tar", ["cat", "dog\n"])
    data = load_images(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.validation.labels.tolist() == [0, 1]
    _write_labelled(tmp_path / "val.tar", ["cat", "bird"])
    with pytest.raises(UserError, match=r"val.tar row 1 has 'bird' in 'cls', which is no class"):
        load_images(str(tmp_path))


def test_images_of_different_kinds_are_all_found(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    first, second = {"0.json": b"{}", "0.png": picture(0), "0.cls": b"0"}, {"1.JPG": jpeg.getvalue(), "1.cls": b"1"}
    for split in ("train", "val"):
        _write_tar(tmp_path / f"{split}.tar", {**first, **second, "2.jpeg": jpeg.getvalue(), "2.cls": b"1"})
    data = load_images(str(tmp_path))
    assert data.validation.labels.tolist() == [0, 1, 1]
    stream = _stream(tmp_path)
    assert len(_names(_epoch(stream))) == 3
    assert stream.unreadable() == []
    with pytest.raises(UserError, match=rf"No image of {tmp_path} can be read"):
        load_images(str(tmp_path), image_column="json")
    data = load_images(str(tmp_path), image_column="png")
    assert len(data.validation) == 1
    assert data.unreadable == tuple(f"{tmp_path}/val.tar row {row} (the record is empty)" for row in (1, 2))


def test_tar_files_without_images_are_refused(tmp_path: Path) -> None:
    _write_tar(tmp_path / "train.tar", {"0.txt": b"words", "0.cls": b"0"})
    with pytest.raises(UserError, match=r"no column of images; its columns are txt, cls\. Name it: --image-column"):
        load_images(str(tmp_path))


def test_streamed_validation_counts_by_the_names_of_its_own_column(tmp_path: Path) -> None:
    for split, names in (("train", ["cat", "dog"]), ("val", ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": picture(number), "path": None} for number in range(3)], "label": [0, 0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert load_images(str(tmp_path), streaming=True).validation.labels.tolist() == [1, 1, 0]


def test_streamed_validation_is_copied_once_and_anew_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tars(tmp_path, (3,))
    write_tars(tmp_path, (2,), "val")
    first = load_images(str(tmp_path)).validation
    assert isinstance(first.sources, np.ndarray)
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "rows", lambda *_: pytest.fail("read again"))
        again = load_images(str(tmp_path)).validation
    assert (again.sources == first.sources).all()
    write_tars(tmp_path, (3,), "val", first=1)
    assert load_images(str(tmp_path)).validation.labels.tolist() == [1, 2, 0]


def test_a_column_of_something_else_holds_no_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pq.write_table(pa.table({"image": [1, 2], "label": ["a", "b"]}), tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=r"val.parquet row 0 has 1 in 'image', which is no image"):
        load_images(str(tmp_path), streaming=True)


def test_streamed_validation_may_lack_classes(tmp_path: Path) -> None:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "label": pa.string()})
    for split, letters in (("train", "abcabc"), ("val", "cb")):
        rows = [{"image": {"bytes": picture(i), "path": None}, "label": letter} for i, letter in enumerate(letters)]
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / f"{split}-0.parquet")
    data = load_images(str(tmp_path), streaming=True)
    assert [data.classes[label] for label in data.validation.labels] == ["c", "b"]


def test_a_group_of_rows_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [np.random.default_rng(number).bytes(2**15) for number in range(256)]
    table = pa.table({"image": images, "label": [0, 1] * 128})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False, data_page_size=2**15, write_batch_size=1)
    assert pq.read_metadata(tmp_path / "t.parquet").num_row_groups == 1
    asked = []

    class Counted(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr(shards, "_opened", Counted)
    rows = Shards(files=(str(tmp_path / "t.parquet"),), sizes=(256,), columns=("image", "label")).rows(range(256))
    assert [row.values["image"] for row in rows] == images
    assert sum(asked) > 256 * 2**15
    assert max(asked) <= 2**21


def test_equal_names_in_two_folders_of_a_tar_file_are_two_rows(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for folder in "ab":
            member = tarfile.TarInfo(f"{folder}/0.cls")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"1"))
    assert len(list(Shards(files=(str(tmp_path / "t.tar"),), sizes=(2,)).rows(range(2)))) == 2
