"""Data found, read and cut."""

import logging
from pathlib import Path

import numpy as np
import pytest

from allmlp.data import images as module
from allmlp.data.images import load_images, load_validation
from allmlp.data.labelled_images import UnreadableImage
from allmlp.errors import UserError
from tests.pictures import COLOURS, picture, write_classes


def test_digits_hold_out_a_fifth_of_every_class() -> None:
    data = load_images("digits", channels=1)
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.validation) == 1797
    assert len(data.validation) == 359
    assert np.bincount(data.validation.labels).min() >= 34
    assert data.train.sources.shape[1:] == (8, 8)
    assert data.train.sources.max() == 255
    assert load_images("digits").train.sources.shape[1:] == (8, 8, 3)


def test_the_cut_follows_the_seed(tmp_path: Path) -> None:
    folder = str(write_classes(tmp_path / "data", each=10))
    cuts = [load_images(folder, holdout=0.3, seed=seed).validation.names for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]
    assert len(cuts[0]) == 9


def test_odd_shares_still_leave_one_of_each_class_on_both_sides(tmp_path: Path) -> None:
    data = load_images(str(write_classes(tmp_path / "data", each=2)), holdout=0.01)
    assert sorted(data.validation.labels) == sorted(data.train.labels) == [0, 1, 2]
    data = load_images(str(tmp_path / "data"), holdout=0.99)
    assert sorted(data.validation.labels) == sorted(data.train.labels) == [0, 1, 2]


def test_a_given_validation_split_is_used(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", each=3)
    write_classes(tmp_path / "val", each=1, names=("red", "blue"))
    data = load_images(str(tmp_path))
    assert data.classes == tuple(COLOURS)
    assert (len(data.train), len(data.validation)) == (9, 2)
    assert [data.classes[label] for label in data.validation.labels] == ["blue", "red"]


def test_broken_files_are_left_out_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_classes(tmp_path / "data", each=5)
    (root / "red" / "notes.txt").write_text("no image")
    (root / "red" / ".hidden").write_text("no image")
    whole = (root / "blue" / "00.png").read_bytes()
    (root / "blue" / "00.png").write_bytes(whole[:80])
    with caplog.at_level(logging.WARNING):
        data = load_images(str(root))
    assert len(data.train) + len(data.validation) == 14
    assert len(data.unreadable) == 2
    assert "left out 2 of" in caplog.text
    assert "notes.txt (not an image)" in caplog.text
    assert "00.png" in caplog.text
    with pytest.raises(UnreadableImage, match=r"00\.png cannot be read"):
        load_images(str(root), strict=True)


def test_images_beyond_the_memory_limit_stay_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_LIMIT", 1000)
    root = write_classes(tmp_path / "data", each=3)
    (root / "red" / "text.png").write_text("no image")
    data = load_images(str(root))
    assert len(data.train) + len(data.validation) == 9
    assert len(data.unreadable) == 1
    assert isinstance(data.train.sources[0], str)


def test_images_of_several_sizes_are_kept_decoded(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", each=2)
    picture("red", size=(20, 30)).save(root / "red" / "tall.png")
    _, images, part = load_validation(str(root))
    assert part == "all"
    assert {source.shape for source in images.sources} == {(12, 16, 3), (30, 20, 3)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: [file.unlink() for file in (root / "red").iterdir()], "Class 'red' has no image"),
        (lambda root: [file.write_text("x") for file in (root / "red").iterdir()], "Class 'red' .* can be read"),
        (lambda root: [file.unlink() for file in list((root / "red").iterdir())[1:]], "single image"),
        (lambda root: [file.write_text("x") for file in root.rglob("*.png")], "No image of .* can be read"),
    ],
    ids=["empty class", "unreadable class", "one image", "nothing readable"],
)
def test_classes_without_images_are_named(tmp_path: Path, spoil: object, message: str) -> None:
    root = write_classes(tmp_path / "data", each=3)
    spoil(root)
    with pytest.raises(UserError, match=message):
        load_images(str(root))


def test_one_class_and_odd_channels_are_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", names=("red",))
    with pytest.raises(UserError, match="one class only"):
        load_images(str(root))
    with pytest.raises(UserError, match="4 channels"):
        load_images("digits", channels=4)
