"""Training image classifiers, from the recipe to the run directory."""

import dataclasses
import gc
import json
import logging
import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import get_worker_info

import allmlp
from allmlp.data import image_batches
from allmlp.data.images import load_images
from allmlp.errors import Interrupted, UserError
from allmlp.training import callbacks, vision
from allmlp.training.recipe import VisionRecipe, make_recipe, read_settings
from tests.data.shards import write_tars
from tests.pictures import write_classes
from tests.training.tiny import tiny_recipe

EVERYTHING = {
    "mixup": 0.8,
    "label_smoothing": 0.1,
    "ema": 0.9,
    "drop": 0.1,
    "drop_path": 0.1,
    "layer_decay": 0.8,
    "accumulate": 2,
    "batch_size": 4,
    "random_erasing": 0.2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run and its metrics."""
    folder = tmp_path_factory.mktemp("vision")
    return folder / "run", vision.train(tiny_recipe(folder, epochs=6), folder / "run")


def test_the_model_learns_and_says_how_well(finished: tuple[Path, dict[str, Any]]) -> None:
    run, metrics = finished
    assert metrics["accuracy"] == 1.0
    assert metrics["steps"] == 18
    assert metrics["images_per_second"] > 0
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert len(losses) == 18
    assert losses[-1] < losses[0]
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert "accuracy 100.00% on 6 held-out images" in vision.summary(metrics, run)


def test_the_run_directory_is_complete(finished: tuple[Path, dict[str, Any]]) -> None:
    run, metrics = finished
    for name in ("config.json", "model.safetensors", "recipe.yaml", "metrics.json", "checkpoint-18", "tensorboard"):
        assert (run / name).exists(), name
    assert metrics["pictures"] == [
        f"report/{name}.png" for name in ("curves", "confusion", "predictions", "spatial_weights")
    ]
    assert all((run / picture).stat().st_size > 5000 for picture in metrics["pictures"])
    assert not list(run.rglob(".*")), "temporary files are left"


def test_tensorboard_has_scalars_and_the_graph(finished: tuple[Path, dict[str, Any]]) -> None:
    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    assert {"train/loss", "eval/accuracy", "train/learning_rate"} <= set(events.Tags()["scalars"])
    assert events.Tags()["graph"]


def test_run_and_checkpoint_load_with_the_same_weights(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    weights = load_file(run / "model.safetensors")
    for place in (run, run / "checkpoint-18"):
        model = allmlp.load(place)
        assert not model.training
        assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
        torch.testing.assert_close(dict(model.state_dict()), weights)


def test_the_recipe_in_the_run_directory_repeats_the_run(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = finished
    settings = read_settings(run / "recipe.yaml")
    del settings["task"]
    vision.train(make_recipe(settings, VisionRecipe), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything on"])
def test_an_interrupted_training_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    recipe = tiny_recipe(tmp_path, epochs=4, **settings)
    whole = vision.train(recipe, tmp_path / "whole")

    stop_at = whole["steps"] // 2 + 1
    step_end = callbacks.Progress.on_step_end

    def interrupting(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        step_end(self, args, state, control, **others)
        if state.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Progress, "on_step_end", interrupting)
        with pytest.raises(Interrupted, match=f"Stopped after step {stop_at} of .*--resume"):
            vision.train(recipe, tmp_path / "parts")
    assert (tmp_path / "parts" / f"checkpoint-{stop_at}" / "model.safetensors").is_file()
    assert allmlp.load(tmp_path / "parts" / f"checkpoint-{stop_at}")
    assert not (tmp_path / "parts" / "model.safetensors").exists()

    resumed = vision.train(recipe, tmp_path / "parts", resume=True)
    assert _course(resumed) == _course(whole)
    torch.testing.assert_close(
        load_file(tmp_path / "parts" / "model.safetensors"),
        load_file(tmp_path / "whole" / "model.safetensors"),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_without_making_the_batches_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    write_tars(tmp_path / "tars", (11, 13, 16))
    write_tars(tmp_path / "tars", (6,), "val")
    settings = {
        "batch_size": 4,
        "accumulate": 2,
        "eval_every": 4,
        "workers": workers,
        "shuffle_buffer": 5,
        "mixup": 0.5,
    }
    recipe = tiny_recipe(tmp_path, data=str(tmp_path / "tars"), **settings)
    whole = vision.train(recipe, tmp_path / "whole")
    assert whole["steps"] == 10
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-10")
    # Counted by each worker for itself.
    decoded = torch.zeros(2).share_memory_()
    decode = image_batches.decode

    def counted(source: Any, mode: str) -> Any:
        decoded[getattr(get_worker_info(), "id", 0)] += isinstance(source, dict)
        return decode(source, mode)

    monkeypatch.setattr(image_batches, "decode", counted)
    resumed = vision.train(recipe, tmp_path / "parts", resume=True)
    # Of the second epoch's five steps of eight images three were taken.
    assert decoded.sum() == 16
    assert _course(resumed) == _course(whole)
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("parts", "whole")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_finished_run_that_is_resumed_stays_as_it_is(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    settings = read_settings(run / "recipe.yaml")
    del settings["task"]
    again = vision.train(make_recipe(settings, VisionRecipe), run, resume=True)
    for name in ("training_seconds", "images_per_second", "accuracy", "steps", "history"):
        assert again[name] == finished[1][name], name


@pytest.mark.parametrize("change", ["model", "arguments", "classes"])
def test_another_model_is_not_resumed_and_the_run_stays(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, change: str
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    recipe = tiny_recipe(tmp_path, epochs=6)
    message = "weights of .*checkpoint-.* do not match the model"
    if change == "model":
        recipe = dataclasses.replace(recipe, model="mixer_nano_patch4_32", model_args={})
    elif change == "arguments":
        recipe = dataclasses.replace(recipe, model_args={**recipe.model_args, "num_blocks": 3})
    else:
        (tmp_path / "pictures" / "red").rename(tmp_path / "pictures" / "crimson")
        message = "classes of .*checkpoint-.* are blue, green, red; those of the data are blue, crimson, green"
    before = (run / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=rf"{message}(?s:.*)or choose another --output"):
        vision.train(recipe, run, resume=True)
    assert (run / "recipe.yaml").read_bytes() == before


def _course(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in metrics["history"]]


def test_averaged_weights_are_the_ones_kept(tmp_path: Path) -> None:
    metrics = vision.train(tiny_recipe(tmp_path, ema=0.9), tmp_path / "run")
    last = tmp_path / "run" / f"checkpoint-{metrics['steps']}"
    kept = load_file(tmp_path / "run" / "model.safetensors")
    averaged = {name.removeprefix("timm_model."): value for name, value in load_file(last / "ema.safetensors").items()}
    torch.testing.assert_close(kept, averaged, rtol=0, atol=0)
    for name, tensor in allmlp.load(last).state_dict().items():
        torch.testing.assert_close(tensor, kept[name], rtol=0, atol=0)
    assert not torch.equal(kept["head.weight"], load_file(last / "model.safetensors")["head.weight"])
    final = [entry for entry in metrics["history"] if "eval_loss" in entry][-1]
    assert final["eval_loss"] == pytest.approx(metrics["loss"], rel=1e-4)


def test_fine_tuning_replaces_a_head_of_another_size_and_says_so(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = finished
    two = tiny_recipe(tmp_path, start_from=str(run), model=None, model_args={}, img_size=None, epochs=1)
    for name in ("green",):
        for file in (tmp_path / "pictures" / name).iterdir():
            file.unlink()
        (tmp_path / "pictures" / name).rmdir()
    with caplog.at_level(logging.INFO):
        vision.train(two, tmp_path / "two")
    assert "tells 3 classes apart; a new one for 2 classes replaces it" in caplog.text
    model = allmlp.load(tmp_path / "two")
    assert model.head.out_features == 2
    assert len(model.blocks) == 2


def test_fine_tuning_goes_on_from_the_weights(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, metrics = finished
    recipe = tiny_recipe(tmp_path, start_from=str(run), model=None, model_args={}, img_size=None, epochs=1, lr=1e-6)
    assert vision.train(recipe, tmp_path / "more")["loss"] == pytest.approx(metrics["loss"], rel=0.3)


def test_the_model_to_start_from_is_gone_while_the_new_one_learns(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Any] = []
    gone: list[bool] = []

    def found(source: str) -> Any:
        start = find(source)
        starts.append(weakref.ref(start.model))
        return start

    def run(engine: vision.VisionEngine) -> Any:
        gc.collect()
        gone.extend(start() is None for start in starts)
        raise Interrupted("Seen.")

    find = vision.find_pretrained
    monkeypatch.setattr(vision, "find_pretrained", found)
    monkeypatch.setattr(vision.VisionEngine, "run", run)
    recipe = tiny_recipe(tmp_path, start_from=str(finished[0]), model=None, model_args={}, img_size=None)
    with pytest.raises(Interrupted, match="Seen"):
        vision.train(recipe, tmp_path / "run")
    assert gone == [True]


def test_fine_tuning_at_another_size_resamples_the_weights(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = finished
    settings = {"start_from": str(run), "model": None, "model_args": {"patch_kernel": (6, 4)}, "img_size": (12, 8)}
    recipe = tiny_recipe(tmp_path, **settings, max_steps=1, lr=1e-9)
    vision.train(recipe, tmp_path / "larger")
    expected = allmlp.load(run, img_size=(12, 8), patch_kernel=(6, 4)).state_dict()
    tuned = allmlp.load(tmp_path / "larger")
    torch.testing.assert_close(tuned.state_dict(), expected, rtol=0, atol=1e-6)
    assert tuple(tuned.pretrained_cfg["input_size"]) == (3, 12, 8)
    # The former grid, 3×2, is known though it is neither a square nor of the new one's proportions.
    back = tiny_recipe(tmp_path, **{**settings, "start_from": str(tmp_path / "larger"), "img_size": 16}, max_steps=1)
    vision.train(back, tmp_path / "back")
    assert allmlp.load(tmp_path / "back")(torch.randn(1, 3, 16, 16)).shape == (1, 3)


def test_weights_that_do_not_match_are_listed(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = finished
    recipe = tiny_recipe(tmp_path, start_from=str(run), model="mixer_nano_patch4_32", model_args={})
    with pytest.raises(UserError) as caught:
        vision.train(recipe, tmp_path / "run")
    first, *lists = str(caught.value).splitlines()
    assert "do not match the model" in first
    assert [line.split()[1] for line in lists] == ["missing:", "unexpected:", "of"]
    assert "blocks.0.norm1.weight" in lists[0]
    assert "blocks.0.sgu.weight" in lists[1]
    assert "stem.proj.weight [16, 3, 4, 4] instead of [128, 3, 4, 4]" in lists[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "gmpl_nano_patch4_32"}, r"no model 'gmpl_nano_patch4_32'\. Did you mean 'gmlp_nano_patch4_32'"),
        ({"model": None}, "name a model, or a run directory"),
        ({"data": None}, "name the data"),
        ({"img_size": 10}, r"10×10 pixels cannot be cut into patches of 4×4.*8×8 and 12×12"),
        ({"model_args": {"depht": 2}}, "cannot be made with these arguments: .*depht"),
        ({"start_from": "no/such/run"}, "There is no run directory no/such/run"),
        ({"model_args": {"in_chans": 2}}, "takes 2 channels"),
        ({"model_args": {"global_pool": ""}}, "gives maps, not classes"),
        ({"model_args": {"drop_path_rate": 0.1}}, "model_args sets drop_path_rate: that is what --drop-path is for"),
        ({"model_args": {"num_blocks": 0}}, "num_blocks must be a whole number from 1 on, got 0"),
        ({"model": "resmlp_12_224", "model_args": {"num_blocks": 2}}, "num_blocks is what its name stands for"),
    ],
)
def test_what_cannot_be_trained_is_said_clearly(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vision.train(tiny_recipe(tmp_path, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_share_the_cores_of_their_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_images(str(write_classes(tmp_path / "pictures", each=2)))
    assert vision.useful_workers(data) == 0
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for cores, processes, workers in ((12, 1, 12), (32, 1, 16), (32, 4, 8), (2, 8, 1)):
        monkeypatch.setattr(vision, "cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert vision.useful_workers(data) == workers


def test_a_grey_model_trains_and_loads(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, epochs=1, model_args={"num_blocks": 1, "embed_dim": 8, "in_chans": 1})
    vision.train(recipe, tmp_path / "run")
    assert allmlp.load(tmp_path / "run").pretrained_cfg["input_size"] == [1, 8, 8]


def test_layer_decay_lowers_the_rates_of_lower_layers(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, layer_decay=0.5)
    model = vision.build_model(recipe, *vision.planned_model(recipe)[:2], ["a", "b"])
    rate = {id(p): group["lr"] for group in vision.parameter_groups(model, recipe) for p in group["params"]}
    assert rate[id(model.head.weight)] == recipe.lr
    assert rate[id(model.stem.proj.weight)] < rate[id(model.blocks[0].proj_in.weight)] < recipe.lr
    decay = {id(p): group["weight_decay"] for group in vision.parameter_groups(model, recipe) for p in group["params"]}
    assert decay[id(model.blocks[0].sgu.bias)] == 0
    assert decay[id(model.blocks[0].sgu.weight)] == recipe.weight_decay


def test_other_classes_of_the_same_number_need_a_new_head() -> None:
    def made(names: list[str]) -> Any:
        model = timm.create_model("gmlp_nano_patch4_32", num_classes=2, num_blocks=1, embed_dim=8)
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
        return model

    model, weights = made(["crow", "dove"]), made(["cat", "dog"])
    fresh = model.head.weight.detach().clone()
    vision.start_from(model, weights, "there")
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.stem.proj.weight, weights.stem.proj.weight)


def test_settings_of_crop_and_mixing_arrive(tmp_path: Path) -> None:
    mixing = {"mixup": 0.3, "cutmix": 0.7, "mix_prob": 0.6, "mix_switch_prob": 0.2, "label_smoothing": 0.1}
    recipe = tiny_recipe(tmp_path, crop_pct=0.5, **mixing)
    model = vision.build_model(recipe, str(recipe.model), {**recipe.model_args, "img_size": 8}, ["a", "b"])
    assert model.pretrained_cfg["crop_pct"] == 0.5
    mix = vision.training_batches(recipe, load_images(str(recipe.data)), model.pretrained_cfg).mix
    found = (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob, mix.label_smoothing)
    assert found == tuple(mixing.values())
