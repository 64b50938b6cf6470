"""Measuring and predicting with a run."""

import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.conversion import convert_checkpoint, write_run_directory
from allmlp.data import images
from allmlp.data.labelled_images import LabelledImages
from allmlp.errors import UserError
from allmlp.training import evaluation, vision
from allmlp.training.evaluation import accuracy_of, confusion, evaluate, predict
from allmlp.training.recipe import VisionRecipe
from tests.checkpoints.parity import GOLDEN
from tests.pictures import picture, write_classes
from tests.training.tiny import tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    folder = tmp_path_factory.mktemp("evaluation")
    vision.train(tiny_recipe(folder, epochs=6), folder / "run")
    return folder / "run"


def test_accuracy_counts_what_it_says() -> None:
    logits = torch.tensor([[4.0, 0, 0], [0, 4, 0], [3, 0, 1], [0, 0, 2]])
    found = accuracy_of(logits, torch.tensor([0, 1, 1, 1]), ["a", "b", "c"])
    assert found["accuracy"] == 0.5
    assert found["top5"] == 1.0
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 1])).item())
    assert found["per_class"] == {
        "a": {"accuracy": 1.0, "precision": 0.5, "images": 1},
        "b": {"accuracy": pytest.approx(1 / 3), "precision": 1.0, "images": 3},
    }
    assert confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 2, 2]), 3).tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]


def test_of_its_own_data_the_held_out_part_counts(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for found in (evaluate(str(run)), evaluate(str(run), metrics_data(run))):
        assert found["part"] == "held out"
        assert {key: found[key] for key in ("images", "accuracy", "per_class")} == {
            key: metrics[key] for key in ("images", "accuracy", "per_class")
        }
        assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert "accuracy 100.00%" in evaluation.accuracy_text(found)


def test_data_under_the_home_folder_are_the_same_however_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    whole, short = str(tmp_path / "photos"), "~/photos"
    assert evaluation.same_data(whole, short)
    assert evaluation.same_data(short, whole)
    assert not evaluation.same_data(whole, "~/others")
    assert not evaluation.same_data("~/others", f"{tmp_path}/others/")


def test_a_checkpoint_in_double_precision_is_measured_in_it(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "double", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = {name: tensor.double() for name, tensor in load_file(run / "model.safetensors").items()}
    save_file(weights, tmp_path / "double" / "model.safetensors")
    double, single = (evaluate(str(place), metrics_data(run)) for place in (tmp_path / "double", run))
    assert double["accuracy"] == single["accuracy"] == 1.0
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
    file = str(next((run / "report" / "samples").glob("red_*.png")))
    (found,) = predict(str(tmp_path / "double"), [file], top_k=1)
    assert found["predictions"][0]["label"] == "red"


def test_a_run_is_measured_at_another_size(run: Path) -> None:
    same, larger = evaluate(str(run), img_size=8), evaluate(str(run), img_size=16, patch_kernel=8)
    assert same == evaluate(str(run))
    assert larger["accuracy"] == 1.0
    assert larger["loss"] != same["loss"]
    with pytest.raises(UserError, match="nearest sizes are 8×8 and 12×12"):
        evaluate(str(run), img_size=9)


def metrics_data(run: Path) -> str:
    """What the run was trained on."""
    recipe = evaluation.recipe_of(str(run), VisionRecipe)
    assert recipe is not None
    assert recipe.data is not None
    return recipe.data


def test_other_data_is_matched_by_class_names(run: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "some", each=4, names=("red", "green"))
    found = evaluate(str(run), str(tmp_path / "some"), batch_size=3)
    assert (found["part"], found["images"], found["accuracy"]) == ("all", 8, 1.0)
    assert list(found["per_class"]) == ["green", "red"]
    write_classes(tmp_path / "both" / "train")
    write_classes(tmp_path / "both" / "val", each=2)
    found = evaluate(str(run), str(tmp_path / "both"))
    assert (found["part"], found["images"]) == ("validation", 6)


def test_where_there_is_a_validation_split_nothing_else_is_read(run: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "data" / "train", each=2)
    write_classes(tmp_path / "data" / "val", each=1)
    (tmp_path / "data" / "train" / "red" / "00.png").write_text("no image")
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / "recipe.yaml").open("a") as file:
        file.write(f"data: {tmp_path / 'data'}\n")
    for evaluated, part in ((run, "validation"), (tmp_path / "run", "held out")):
        found = evaluate(str(evaluated), str(tmp_path / "data"), strict=True)
        assert (found["part"], found["images"]) == (part, 3)
    (tmp_path / "data" / "val" / "red" / "00.png").write_text("no image")
    with pytest.raises(UserError, match=r"val/red/00\.png cannot be read"):
        evaluate(str(run), str(tmp_path / "data"), strict=True)


def test_pictures_that_break_off_are_named_or_refused_beyond_the_memory_limit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    root = write_classes(tmp_path / "data", each=2)
    broken = root / "red" / "01.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert evaluate(str(run), str(root))["images"] == 5
    assert f"left out 1 of {root} that cannot be read: {broken}" in caplog.text
    for use in (
        lambda: evaluate(str(run), str(root), strict=True),
        lambda: predict(str(run), [str(root)], strict=True),
    ):
        with pytest.raises(UserError, match=rf"^{broken} cannot be read as an image: "):
            use()
    assert [entry["file"] for entry in predict(str(run), [str(root)]) if "error" in entry] == [str(broken)]


def test_tar_files_are_measured_by_their_class_names(run: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for number, name in enumerate(("red", "green", "red")):
            picture(name, seed=number).save(tmp_path / "image.png")
            (tmp_path / "name").write_text(name)
            archive.add(tmp_path / "image.png", f"{number}.png")
            archive.add(tmp_path / "name", f"{number}.cls")
    found = evaluate(str(run), str(tmp_path / "photos.tar"))
    assert (found["part"], found["images"], found["accuracy"]) == ("all", 3, 1.0)
    assert {name: figures["images"] for name, figures in found["per_class"].items()} == {"green": 1, "red": 2}


def test_the_trainings_columns_are_those_of_tables(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / "recipe.yaml").open("a") as file:
        file.write("image_column: photo\n")
    folder = str(write_classes(tmp_path / "some", each=2))
    assert evaluate(str(tmp_path / "run"), folder)["images"] == 6
    with pytest.raises(UserError, match="is no table, so it has no column 'picture'; leave --image-column out"):
        evaluate(str(tmp_path / "run"), folder, image_column="picture")
    datasets.Dataset.from_dict({"text": ["a"], "label": ["red"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has no column 'photo'"):
        evaluate(str(tmp_path / "run"), str(tmp_path / "a.parquet"))


def test_unknown_classes_are_refused(run: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "data")
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "purple")
    with pytest.raises(UserError, match=r"classes that the model does not know: purple\. It knows blue, green, red\."):
        evaluate(str(run), str(tmp_path / "data"))


def test_predictions_name_the_likeliest_classes(run: Path, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        picture(name, seed=99, size=(40, 40)).save(tmp_path / f"{name}.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "._red.png").write_text("what macOS adds")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    picture("red").save(tmp_path / ".ipynb_checkpoints" / "red-checkpoint.png")
    found = predict(str(run), [str(tmp_path)], top_k=2)
    assert [Path(entry["file"]).name for entry in found] == ["blue.png", "red.png", "text.jpg"]
    for entry, name in zip(found[:2], ("blue", "red"), strict=True):
        assert entry["predictions"][0]["label"] == name
        assert len(entry["predictions"]) == 2
        assert entry["predictions"][0]["probability"] > entry["predictions"][1]["probability"] > 0
    assert found[2]["error"] == "not an image"
    assert evaluation.predictions_text(found).count("%") == 4
    with pytest.raises(UserError, match=r"text\.jpg cannot be read"):
        predict(str(run), [str(tmp_path / "text.jpg")], strict=True)


@pytest.mark.parametrize(
    ("files", "top_k", "message"), [(["none.png"], 1, "There is no file none.png"), ([], 0, "top_k is 0")]
)
def test_impossible_predictions_are_refused(run: Path, files: list[str], top_k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predict(str(run), files, top_k=top_k)


def test_channels_that_no_image_has_are_refused(run: Path, tmp_path: Path) -> None:
    model = timm.create_model("mixer_nano_patch4_32", in_chans=4, num_classes=2)
    model.pretrained_cfg |= {"input_size": (4, 32, 32), "mean": (0.5,) * 4, "std": (0.5,) * 4}
    wrapped = run_directory.classifier(model, "mixer_nano_patch4_32", {"in_chans": 4}, ["a", "b"])
    run_directory.save_classifier(wrapped, tmp_path)
    image = next((run / "report" / "samples").iterdir())
    with pytest.raises(UserError, match="takes 4 channels; images have 1"):
        predict(str(tmp_path), [str(image)])


def test_a_folder_without_images_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no image"):
        predict(str(run), [str(tmp_path)])


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    write_run_directory(convert_checkpoint(GOLDEN / "as_mlp_backbone_shift3" / "checkpoint.pth"), tmp_path / "run")
    for use in (lambda: evaluate(str(tmp_path / "run"), "digits"), lambda: predict(str(tmp_path / "run"), ["a.png"])):
        with pytest.raises(UserError, match="holds a model without a classifier: it gives features, not classes"):
            use()


def test_a_run_of_another_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gmlp"}')
    for use in (lambda: evaluate(str(tmp_path), "digits"), lambda: predict(str(tmp_path), ["a.png"])):
        with pytest.raises(UserError, match="a model of type 'gmlp', not an image classifier"):
            use()


def test_a_checkpoint_is_evaluated_with_its_runs_recipe(run: Path) -> None:
    found = evaluate(str(run / "checkpoint-18"))
    assert found["part"] == "held out"


def test_a_run_is_measured_on_what_its_own_seed_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision.train(tiny_recipe(tmp_path, seed=3, holdout=0.3, epochs=1), tmp_path / "run")
    asked, load = {}, evaluation.load_validation
    monkeypatch.setattr(evaluation, "load_validation", lambda data, **given: asked.update(given) or load(data, **given))
    evaluate(str(tmp_path / "run"))
    assert asked["cut"] == (0.3, 3)


def test_broken_images_count_for_nothing() -> None:
    model = timm.create_model("gmlp_nano_patch4_32", num_blocks=1, embed_dim=8)
    good = np.zeros((8, 8, 3), np.uint8)
    some = LabelledImages(sources=[good, "/no/such.png", good], labels=np.array([2, 1, 0]), names=["a", "b", "c"])
    logits, labels = evaluation.logits_of(model, evaluation.evaluation_batches(some, model.pretrained_cfg))
    assert labels.tolist() == [2, 0]
    assert logits.shape == (2, 10)
