"""The pictures, by what is in them."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from allmlp.data.labelled_images import LabelledImages
from allmlp.training import report
from tests.pictures import picture

CLASSES = ["blue", "green", "red"]


def _model(name: str, **arguments: object) -> torch.nn.Module:
    model = timm.create_model(name, num_classes=3, **arguments)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": CLASSES}
    return model


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title]]


def _held_out() -> tuple[LabelledImages, torch.Tensor, torch.Tensor]:
    names = [CLASSES[index % 3] for index in range(9)]
    sources = [np.asarray(picture(name, seed)) for seed, name in enumerate(names)]
    labels = np.array([CLASSES.index(name) for name in names])
    logits = 5 * torch.nn.functional.one_hot(torch.tensor(labels), 3).float()
    logits[2] = torch.tensor([0.0, 6.0, 0.0])
    return LabelledImages(sources=sources, labels=labels, names=names), logits, torch.tensor(labels)


def test_curves_show_every_point_of_the_history() -> None:
    history = [{"epoch": e / 4, "step": e, "loss": 2 - e / 8} for e in range(1, 9)]
    history += [
        {"epoch": e, "step": 4 * e, "eval_loss": 1.0, "eval_accuracy": 0.5 * e, "eval_top5": 1.0} for e in (1, 2)
    ]
    left, right = report.draw_curves(history, 1.0).axes
    assert [len(line.get_xdata()) for line in left.lines] == [8, 2]
    assert right.lines[0].get_ydata().tolist() == [50, 100]
    assert "100.00%" in [text.get_text() for text in right.texts]
    assert (left.get_xlim()[0], left.get_ylim()[0]) == (0, 0)
    assert left.get_ylim()[1] > 1.03 * 1.875
    assert [tick for tick in left.get_xticks() if tick % 1] == []


def test_curves_of_less_than_an_epoch_have_few_ticks() -> None:
    history = [{"epoch": 0.07, "step": 1, "loss": 1.0, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_top5": 1.0}]
    for axes in report.draw_curves(history, 0.5).axes:
        assert 2 <= len(axes.get_xticks()) <= 8


def test_confusion_shows_shares_of_each_class() -> None:
    _, logits, labels = _held_out()
    figure = report.draw_confusion(labels, logits.argmax(1), CLASSES)
    shares = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[100, 0, 0], [0, 100, 0], [0, 100 / 3, 200 / 3]], rtol=1e-6)
    assert "Confusion, % of each class (88.89% right)" in figure.axes[0].get_title(loc="left")


def test_confusion_of_many_classes_shows_the_most_confused() -> None:
    labels = torch.arange(100)
    predicted = labels.clone()
    predicted[7] = 93
    figure = report.draw_confusion(labels, predicted, [f"class {index}" for index in range(100)])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 30
    assert {"class 7", "class 93"} <= set(names)


def test_predictions_mark_mistakes() -> None:
    images, logits, labels = _held_out()
    texts = _texts(report.draw_predictions(images, logits, labels, CLASSES))
    assert sum("is red" in text for text in texts) == 2, "once among the images, once among the mistakes"
    assert sum(text == "blue 99%" for text in texts) == 3


def test_without_mistakes_there_is_no_section_for_them() -> None:
    images, logits, labels = _held_out()
    logits[2] = logits[5]
    assert len(report.draw_predictions(images, logits, labels, CLASSES).subfigs) == 1


@pytest.mark.parametrize(
    ("name", "row"),
    [("gmlp_nano_patch4_32", "sgu.weight"), ("resmlp_nano_patch4_32", "linear_tokens.weight")],
)
def test_spatial_weights_are_drawn_as_patch_grids(name: str, row: str) -> None:
    model = _model(name, num_blocks=2)
    figure = report.draw_spatial_weights(model)
    assert figure is not None
    first = next(axes for axes in figure.axes if axes.images)
    shown = np.asarray(first.images[0].get_array())
    matrix = model.get_parameter(f"blocks.0.{row}").detach().reshape(-1, 64, 64)[0].numpy()
    assert shown.shape == (8, 8)
    assert any(np.array_equal(shown.ravel(), position) for position in matrix)
    assert sum(bool(axes.images) for axes in figure.axes) == 24


def test_mixer_shows_its_strongest_hidden_units() -> None:
    model = _model("mixer_nano_patch4_32", num_blocks=1)
    figure = report.draw_spatial_weights(model)
    matrix = model.blocks[0].mlp_tokens.fc1.weight.detach().numpy()
    strongest = matrix[np.linalg.norm(matrix, axis=1).argmax()]
    np.testing.assert_array_equal(np.asarray(figure.axes[0].images[0].get_array()).ravel(), strongest)


def test_images_that_are_not_square_keep_their_grid() -> None:
    figure = report.draw_spatial_weights(_model("gmlp_nano_patch4_32", num_blocks=1, img_size=(16, 32)))
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (4, 8)
    figure = report.draw_spatial_weights(_model("gmlp_nano_patch4_32", num_blocks=1, patch_size=(8, 4)))
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (4, 8)


def test_models_that_mix_no_positions_have_no_such_picture() -> None:
    assert report.draw_spatial_weights(_model("s2mlp_nano_patch4_32", num_blocks=1)) is None


def test_samples_are_files_named_after_their_class(tmp_path: Path) -> None:
    images, _, _ = _held_out()
    report.write_samples(tmp_path / "samples", images, CLASSES)
    files = sorted((tmp_path / "samples").iterdir())
    assert len(files) == 8
    assert {file.name.split("_")[0] for file in files} == set(CLASSES)
    with Image.open(files[0]) as image:
        assert image.size == (16, 12)


@pytest.mark.parametrize("letter", ["x", "犬", "𠮷"])
def test_samples_of_classes_with_long_names_are_files_too(letter: str, tmp_path: Path) -> None:
    """A folder's name may be as long as a file's, a label in a table as long as it likes."""
    images, _, _ = _held_out()
    report.write_samples(tmp_path / "samples", images, [f"{name} {300 * letter}" for name in CLASSES])
    files = sorted((tmp_path / "samples").iterdir())
    assert len(files) == 8
    assert {file.name.split("_")[0] for file in files} == set(CLASSES)
