"""Run directories: the same files for transformers, for timm and for allmlp."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.utils import logging

import allmlp
from allmlp.checkpoints import run_directory
from allmlp.checkpoints.training_checkpoints import unfinished_checkpoint
from allmlp.data.labelled_texts import LabelledTexts, TextBatches
from allmlp.data.tokenization import make_tokenizer
from allmlp.errors import UserError
from allmlp.files import UNFINISHED
from allmlp.language import GMLPForCausalLM, GMLPModel
from tests.language.tiny import tiny_config
from tests.pictures import picture
from tests.vision.nano import ANY_SIZE, NANO

ARGUMENTS = {"img_size": 8, "patch_size": 4, "num_blocks": 2, "embed_dim": 16}
CLASSES = ["cat", "dog", "wolf"]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """A saved model and the model."""
    model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **ARGUMENTS).eval()
    wrapped = run_directory.classifier(model, "gmlp_nano_patch4_32", ARGUMENTS, CLASSES)
    run_directory.save_classifier(wrapped, tmp_path / "run")
    return tmp_path / "run", model


def test_the_weights_of_a_fresh_model_are_left_as_they_are() -> None:
    model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **ARGUMENTS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = run_directory.classifier(model, "gmlp_nano_patch4_32", ARGUMENTS, CLASSES)
    torch.testing.assert_close(run_directory.plain_state_dict(wrapped), before, rtol=0, atol=0)


def test_files_of_a_run_are_readable_to_whom_new_files_are(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    run_directory.save_language(tmp_path / "text", GMLPForCausalLM(tiny_config()))
    for path in (*saved[0].iterdir(), *(tmp_path / "text").iterdir()):
        assert path.stat().st_mode == (tmp_path / "new").stat().st_mode, path


@pytest.mark.parametrize("name", [*NANO, "gmlp", "gmlp, tied"])
@pytest.mark.parametrize("backbone", [False, True])
def test_loading_draws_no_weights_to_be_replaced(name: str, backbone: bool, tmp_path: Path) -> None:
    if name in NANO:
        arguments: dict[str, Any] = {"features_only": True} if backbone else {"num_classes": 3}
        model: Any = timm.create_model(name, **arguments).eval()
        arguments.pop("num_classes", None)
        wrapped = run_directory.classifier(model, name, arguments, [] if backbone else CLASSES)
        run_directory.save_classifier(wrapped, tmp_path)
        x = torch.randn(1, 3, 32, 32)
    else:
        kind = GMLPModel if backbone else GMLPForCausalLM
        model = kind(tiny_config(tie_word_embeddings="tied" in name)).eval()
        run_directory.save_language(tmp_path, model)
        x = torch.randint(5, (2, 4))
    before = torch.get_rng_state()
    loaded: Any = allmlp.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        found, expected = (made(x) for made in (loaded, model))
    if name not in NANO:
        found, expected = found[0], expected[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_transformers_timm_and_allmlp_load_the_same_model(saved: tuple[Path, torch.nn.Module]) -> None:
    run, model = saved
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        ours = allmlp.load(run)
        wrapped = AutoModelForImageClassification.from_pretrained(run).eval()
        plain = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
        for logits in (ours(images), wrapped(images).logits, plain(images)):
            torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert not ours.training
    assert ours.pretrained_cfg["label_names"] == CLASSES
    assert wrapped.config.id2label == dict(enumerate(CLASSES))
    assert plain.pretrained_cfg["label_names"] == CLASSES


def test_the_processor_prepares_images_as_training_did(saved: tuple[Path, torch.nn.Module]) -> None:
    from allmlp.data.labelled_images import LabelledImages
    from allmlp.training.evaluation import evaluation_batches

    run, model = saved
    image = picture("red", size=(30, 20))
    theirs = AutoImageProcessor.from_pretrained(run)(image)["pixel_values"]
    images = LabelledImages(sources=[np.asarray(image)], labels=np.array([0]), names=["red"])
    ours = evaluation_batches(images, model.pretrained_cfg)[0]["pixel_values"]
    torch.testing.assert_close(theirs[0], ours, rtol=1e-4, atol=1e-5)


def test_pipelines_take_a_run_directory(saved: tuple[Path, torch.nn.Module]) -> None:
    run, _ = saved
    answer = pipeline("image-classification", model=str(run))(picture("red"), top_k=2)
    assert len(answer) == 2
    assert {each["label"] for each in answer} <= set(CLASSES)


def test_runs_load_at_another_size(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    run, model = saved
    model.set_input_size((12, 8), patch_kernel=(6, 4))
    loaded = allmlp.load(run, img_size=(12, 8), patch_kernel=(6, 4))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.pretrained_cfg["input_size"] == (3, 12, 8)
    assert loaded.pretrained_cfg["label_names"] == CLASSES
    plain = timm.create_model(f"local-dir:{run}", pretrained=True, img_size=(12, 8), patch_kernel=(6, 4))
    torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)
    # And a run of that size is written and loaded as any other.
    arguments = {**ARGUMENTS, "img_size": [12, 8], "patch_kernel": [6, 4]}
    again = run_directory.classifier(model, "gmlp_nano_patch4_32", arguments, CLASSES)
    run_directory.save_classifier(again, tmp_path / "again")
    images = torch.randn(2, 3, 12, 8)
    torch.testing.assert_close(allmlp.load(tmp_path / "again")(images), model(images), rtol=0, atol=0)


def test_sizes_that_a_run_cannot_take_are_refused(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    run, _ = saved
    with pytest.raises(UserError, match=r"run cannot take images of this size: .* nearest sizes are 8×8 and 12×12"):
        allmlp.load(run, img_size=9)
    theirs = timm.create_model("test_vit", num_classes=3)
    wrapped = run_directory.classifier(theirs, "test_vit", {}, CLASSES)
    run_directory.save_classifier(wrapped, tmp_path / "theirs")
    with pytest.raises(UserError, match="theirs holds no image model of allmlp: its image size cannot be changed"):
        allmlp.load(tmp_path / "theirs", img_size=64)


@pytest.mark.parametrize("name", NANO)
def test_a_backbone_says_how_it_takes_another_size(name: str, tmp_path: Path) -> None:
    arguments = {"features_only": True}
    model = timm.create_model(name, **arguments).eval()
    run_directory.save_classifier(run_directory.classifier(model, name, arguments, []), tmp_path)
    with pytest.raises(UserError, match=rf"holds {name} wrapped for features") as refusal:
        allmlp.load(tmp_path, img_size=64)
    images = torch.randn(1, 3, 64, 64)
    if name in ANY_SIZE:
        assert "takes images of any size as it is" in str(refusal.value)
        assert len(allmlp.load(tmp_path)(images)) == len(model.feature_info.channels())
    else:
        assert "timm.create_model(…, features_only=True, img_size=…)" in str(refusal.value)
        larger = timm.create_model(name, features_only=True, img_size=64)
        larger.load_state_dict(allmlp.load(tmp_path).state_dict())
        assert len(larger(images)) == len(model.feature_info.channels())


def test_directories_that_are_no_run_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run directory"):
        allmlp.load(tmp_path / "none")
    (tmp_path / "own.pth").touch()
    with pytest.raises(UserError, match=r"own\.pth is a file, no run directory\. .*allmlp\.convert reads it"):
        allmlp.load(tmp_path / "own.pth")
    with pytest.raises(UserError, match=r"is no run directory: it has no config\.json"):
        allmlp.load(tmp_path)
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").touch()
    with pytest.raises(UserError, match=r"training did not finish; the last checkpoint is .*checkpoint-7"):
        allmlp.load(tmp_path)
    for text, message in (("{", "not valid JSON"), ("{}", "what kind of model"), ('{"model_type": "bert"}', "'bert'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            allmlp.load(tmp_path)


def test_config_and_weights_that_do_not_match_are_listed(saved: tuple[Path, torch.nn.Module]) -> None:
    run, _ = saved
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "model_args": {**ARGUMENTS, "num_blocks": 3}}))
    with pytest.raises(UserError, match=r"10 missing: blocks\.2\.norm\.weight.*… \(2 more\)"):
        allmlp.load(run)
    (run / "config.json").write_text(json.dumps({**config, "model_args": {**ARGUMENTS, "num_blocks": 1}}))
    with pytest.raises(UserError, match=r"10 unexpected: blocks\.1\."):
        allmlp.load(run)
    (run / "config.json").write_text(json.dumps({**config, "num_classes": 4, "label_names": [*CLASSES, "fox"]}))
    with pytest.raises(UserError, match=r"2 of another shape: head\.weight \[3, 16\] instead of \[4, 16\]"):
        allmlp.load(run)


def test_broken_weights_and_unknown_architectures_are_named(saved: tuple[Path, torch.nn.Module]) -> None:
    run, _ = saved
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        allmlp.load(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        allmlp.load(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "architecture": "gmlp_nan_patch4_32"}))
    with pytest.raises(UserError, match=r"no model 'gmlp_nan_patch4_32'\. Did you mean 'gmlp_nano_patch4_32'"):
        allmlp.load(run)


def test_removing_a_run_leaves_what_is_not_its_own(saved: tuple[Path, torch.nn.Module]) -> None:
    run, _ = saved
    for folder in ("checkpoint-3", "checkpoint-best", "report", "tensorboard"):
        (run / folder).mkdir()
    beside = ("tokenizer.json", "special_tokens_map.json", "model-00001-of-00002.safetensors", "ema.safetensors")
    for file in ("recipe.yaml", "metrics.json", "nan.jsonl", *beside, "mine.txt"):
        (run / file).touch()
    run_directory.remove(run_directory.former_run(run), keep=["config.json"])
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-best", "config.json", "mine.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "recipe.yaml", "checkpoint-7", "model.safetensors", "ema.safetensors"),
        *("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
    ],
)
def test_a_model_or_a_recipe_makes_a_run(name: str, tmp_path: Path) -> None:
    for other in ("report", "metrics.json", "tokenizer.json", "checkpoint-best", "other.safetensors"):
        (tmp_path / other).mkdir()
    assert run_directory.former_run(tmp_path) == []
    assert run_directory.former_run(tmp_path / "none") == []
    (tmp_path / name).mkdir()
    found = {path.name for path in run_directory.former_run(tmp_path)}
    assert found == {name, "report", "metrics.json", "tokenizer.json"}
    lost = [path.name for path in run_directory.models_in(tmp_path)]
    assert lost == ([] if name == "recipe.yaml" else [name])


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    unfinished_checkpoint(tmp_path, 3).mkdir(parents=True)
    # What a kill leaves of a file and of a picture.
    (tmp_path / f".model.safetensors.x{UNFINISHED}").mkdir()
    (tmp_path / "report" / f".curves.png.x{UNFINISHED}").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    run_directory.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "report"]


def test_double_precision_is_kept(tmp_path: Path) -> None:
    model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **ARGUMENTS).double().eval()
    wrapped = run_directory.classifier(model, "gmlp_nano_patch4_32", ARGUMENTS, CLASSES)
    run_directory.save_classifier(wrapped, tmp_path)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(allmlp.load(tmp_path)(images), model(images))


@pytest.mark.parametrize("kind", ["classifier", "language"])
def test_weights_in_several_files_are_loaded(kind: str, tmp_path: Path) -> None:
    if kind == "classifier":
        model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **ARGUMENTS).eval()
        saved: Any = run_directory.classifier(model, "gmlp_nano_patch4_32", ARGUMENTS, CLASSES)
    else:
        saved = model = GMLPForCausalLM(tiny_config())
    saved.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(allmlp.load(tmp_path).state_dict(), model.state_dict(), rtol=0, atol=0)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"cannot be (read|loaded)"):
        allmlp.load(tmp_path)


def test_a_tokenizer_is_saved_without_the_padding_of_its_last_call(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes", [])
    TextBatches(LabelledTexts(texts=["abcdef", "x"], labels=np.array([0, 1])), tokenizer, 4).__getitems__([0, 1])
    run_directory.save_language(tmp_path, GMLPForCausalLM(tiny_config(vocab_size=258)), tokenizer)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)


def test_classes_in_another_order_are_other_classes(tmp_path: Path) -> None:
    def wrapped(classes: list[str]) -> Any:
        model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **ARGUMENTS)
        return run_directory.classifier(model, "gmlp_nano_patch4_32", ARGUMENTS, classes)

    run_directory.save_classifier(wrapped(CLASSES), tmp_path)
    run_directory.require_same_model(tmp_path, wrapped(CLASSES))
    with pytest.raises(UserError, match=r"classes of .* are cat, dog, wolf; those of the data are wolf, dog, cat"):
        run_directory.require_same_model(tmp_path, wrapped(CLASSES[::-1]))


def test_progress_bars_are_as_they_were_behind_loading(tmp_path: Path) -> None:
    run_directory.save_language(tmp_path, GMLPForCausalLM(tiny_config()))
    logging.enable_progress_bar()
    allmlp.load(tmp_path)
    assert logging.is_progress_bar_enabled()
