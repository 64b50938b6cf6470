"""The Trainer from a recipe."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from allmlp import training
from allmlp.checkpoints.training_checkpoints import last_checkpoint
from allmlp.errors import UserError
from allmlp.training import engine
from allmlp.training.engine import chosen_precision, prepare_output, training_arguments
from allmlp.training.recipe import VisionRecipe, read_settings
from tests.training.tiny import tiny_recipe

NO_MODEL = torch.nn.Identity()


def test_the_recipe_reaches_the_trainer(tmp_path: Path) -> None:
    recipe = VisionRecipe(
        epochs=7, batch_size=3, accumulate=2, lr=0.5, warmup=0.25, clip=2.0, precision="fp32", seed=9, eval_every=5
    )
    arguments = training_arguments(recipe, tmp_path, workers=2)
    assert arguments.num_train_epochs == 7
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 2)
    assert (arguments.learning_rate, arguments.max_grad_norm, arguments.seed) == (0.5, 2.0, 9)
    assert arguments.get_warmup_steps(100) == 25
    assert (arguments.eval_steps, arguments.save_steps, arguments.eval_strategy) == (5, 5, "steps")
    assert arguments.dataloader_num_workers == 2
    assert not arguments.bf16


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({}, "cosine"), ({"min_lr": 1e-5}, "cosine_with_min_lr"), ({"schedule": "constant"}, "constant_with_warmup")],
)
def test_schedules(tmp_path: Path, settings: dict[str, object], kind: str) -> None:
    assert training_arguments(VisionRecipe(**settings), tmp_path).lr_scheduler_type == kind


def test_precision_is_bf16_only_where_the_processor_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for able, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"amx_bf16": able}, raising=False)
        assert chosen_precision("auto") == expected
    assert chosen_precision("bf16") == "bf16"
    assert chosen_precision("fp32") == "fp32"


def test_a_run_directory_in_use_is_not_touched_without_being_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("mine")
    for place, names in ((tmp_path, "config.json"), (tmp_path / "weights", "model.safetensors")):
        with pytest.raises(UserError, match=rf"holds a run already: {names}\. .*--resume.*--overwrite"):
            training.train(VisionRecipe(data="no/such/data"), place)
    for place in (tmp_path, tmp_path / "runs" / "new"):
        with pytest.raises(UserError, match=r"lies in the data, .*, and would become part of it: choose another"):
            training.train(VisionRecipe(data=str(tmp_path)), place, overwrite=True)
    assert (tmp_path / "config.json").read_text() == "{}"
    assert prepare_output(tmp_path, VisionRecipe(lr=0.5), NO_MODEL, resume=False, overwrite=True) is None
    assert not (tmp_path / "config.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert read_settings(tmp_path / "recipe.yaml")["lr"] == 0.5


def test_only_complete_checkpoints_are_resumed(tmp_path: Path) -> None:
    for step, files in (
        (5, ("trainer_state.json", engine.AVERAGED)),
        (10, ("trainer_state.json", engine.AVERAGED)),
        (15, ("trainer_state.json",)),
        (20, ()),
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            path = tmp_path / f"checkpoint-{step}" / name
            path.write_bytes(b"{}" if path.suffix == ".json" else save({"weight": torch.zeros(1)}))

    def resumed(output: Path, recipe: VisionRecipe) -> Path | None:
        return prepare_output(output, recipe, NO_MODEL, resume=True, overwrite=False)

    assert resumed(tmp_path, VisionRecipe()) == tmp_path / "checkpoint-15"
    assert resumed(tmp_path, VisionRecipe(ema=0.9)) == tmp_path / "checkpoint-10"
    assert resumed(tmp_path / "new", VisionRecipe()) is None


def test_a_resumed_training_holds_out_what_it_held_out(tmp_path: Path) -> None:
    started = VisionRecipe(data="digits", seed=3, max_steps=20)
    prepare_output(tmp_path, started, NO_MODEL, resume=False, overwrite=False)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10, "epoch": 0.5}')
    before = (tmp_path / "recipe.yaml").read_text()
    for changes in ({"seed": 4}, {"holdout": 0.5, "seed": 3}):
        other = VisionRecipe(data="digits", max_steps=20, **changes)
        with pytest.raises(UserError, match=r"held out would be mixed: (seed 3 → 4|holdout 0.2 → 0.5)\.\nGo on with"):
            prepare_output(tmp_path, other, NO_MODEL, resume=True, overwrite=False)
    assert (tmp_path / "recipe.yaml").read_text() == before
    faster = VisionRecipe(data="digits", seed=3, max_steps=20, lr=0.5)
    prepare_output(tmp_path, faster, NO_MODEL, resume=True, overwrite=False)
    assert read_settings(tmp_path / "recipe.yaml")["lr"] == 0.5


@pytest.mark.parametrize("length", [{"max_steps": 10}, {"epochs": 0.5}])
def test_what_trains_no_step_is_no_recipe(tmp_path: Path, length: dict[str, float]) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10, "epoch": 0.5}')
    for lr in (0.25, 0.5):
        recipe = VisionRecipe(data="digits", lr=lr, **length)
        prepare_output(tmp_path, recipe, NO_MODEL, resume=True, overwrite=False)
    assert read_settings(tmp_path / "recipe.yaml")["lr"] == 0.25


def test_the_best_checkpoint_has_the_least_loss_or_the_highest_accuracy(tmp_path: Path) -> None:
    for best, greater in (("loss", False), ("accuracy", True)):
        arguments = training_arguments(VisionRecipe(), tmp_path, best=best)
        assert (arguments.metric_for_best_model, arguments.greater_is_better) == (best, greater)


def test_the_rate_at_the_end_reaches_the_schedule(tmp_path: Path) -> None:
    assert training_arguments(VisionRecipe(min_lr=1e-5), tmp_path).lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_the_recipe_reaches_the_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def adamw(parameters: object, **given: object) -> None:
        raise Seen(given)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    chosen = {"beta1": 0.8, "beta2": 0.95, "adam_eps": 1e-6, "weight_decay": 0.3, "lr": 0.5}
    with pytest.raises(Seen) as seen:
        training.train(tiny_recipe(tmp_path, **chosen), tmp_path / "run")
    (given,) = seen.value.args
    assert [given[name] for name in ("betas", "eps", "weight_decay", "lr")] == [(0.8, 0.95), 1e-6, 0.3, 0.5]


def test_steps_of_another_size_are_not_gone_on_with(tmp_path: Path) -> None:
    output = tmp_path / "run"
    training.train(tiny_recipe(tmp_path, epochs=1), output)
    before = (output / "recipe.yaml").read_text()
    for other, product in (({"batch_size": 16}, "16 × 1 × 1"), ({"accumulate": 2}, "8 × 2 × 1")):
        with pytest.raises(
            UserError, match=rf"took 8 images and would take 16 \(.*: {product}\)\. Choose --batch-size"
        ):
            training.train(tiny_recipe(tmp_path, epochs=2, **other), output, resume=True)
    assert (output / "recipe.yaml").read_text() == before
    metrics = training.train(tiny_recipe(tmp_path, epochs=2, batch_size=4, accumulate=2), output, resume=True)
    assert (metrics["epochs"], metrics["steps"]) == (2, 6)


def test_more_processes_take_larger_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.train(tiny_recipe(tmp_path, epochs=1), tmp_path / "run")
    monkeypatch.setattr(engine, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"took 8 images and would take 16 \(.*: 8 × 1 × 2\)"):
        prepare_output(tmp_path / "run", tiny_recipe(tmp_path), NO_MODEL, resume=True, overwrite=False)


def test_the_rate_told_is_the_recipe_s_where_lower_layers_have_less(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, epochs=1, layer_decay=0.5, lr=2e-3, schedule="constant", warmup=0)
    metrics = training.train(recipe, tmp_path / "run")
    assert {entry["learning_rate"] for entry in metrics["history"] if "learning_rate" in entry} == {2e-3}


def test_the_speed_counts_what_a_short_batch_holds(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, epochs=2, batch_size=20)
    metrics = training.train(recipe, tmp_path / "run")
    state = json.loads((last_checkpoint(tmp_path / "run") / "trainer_state.json").read_text())
    assert metrics["steps"] == 4
    # Of the 30 pictures a fifth is held out.
    assert state["stateful_callbacks"]["Progress"]["attributes"]["learnt"] == 2 * 24


def test_a_training_shorter_than_the_time_between_two_losses_has_one(tmp_path: Path) -> None:
    metrics = training.train(tiny_recipe(tmp_path, epochs=1, log_every=50), tmp_path / "run")
    assert [entry["step"] for entry in metrics["history"] if "loss" in entry] == [3]
