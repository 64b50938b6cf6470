"""Recipes: one home for names, defaults and help."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from allmlp.errors import UserError
from allmlp.training.recipe import (
    RECIPES,
    CausalRecipe,
    Recipe,
    VisionRecipe,
    make_recipe,
    read_settings,
    recipe_to_yaml,
    task_of,
)


def test_yaml_gives_the_recipe_back(tmp_path: Path) -> None:
    recipe = VisionRecipe(data="digits", model="m", img_size=(8, 16), lr=3e-4, strict=True)
    recipe = dataclasses.replace(recipe, model_args={"depth": 2, "eps": 1e-05, "act": "1e5"})
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    settings = read_settings(tmp_path / "recipe.yaml")
    assert settings.pop("task") == "image-classification"
    assert make_recipe(settings, VisionRecipe) == recipe


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"lr": "1e-3"}, "lr", 1e-3),
        ({"epochs": 3}, "epochs", 3.0),
        ({"batch_size": "32"}, "batch_size", 32),
        ({"img_size": "64"}, "img_size", 64),
        ({"img_size": "64x96"}, "img_size", (64, 96)),
        ({"img_size": [64, 96]}, "img_size", (64, 96)),
        ({"model_args": "{depth: 3}"}, "model_args", {"depth": 3}),
        ({"model_args": "{norm_eps: 1e-5, init_scale: -2.E+3}"}, "model_args", {"norm_eps": 1e-5, "init_scale": -2e3}),
        ({"auto_augment": None}, "auto_augment", None),
    ],
)
def test_text_from_the_command_line_and_yaml_becomes_the_fields_type(
    given: dict[str, object], field: str, value: object
) -> None:
    found = getattr(make_recipe(given, VisionRecipe), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"weight_decai": 0.1},
            "sets 'weight_decai', which image-classification does not know. Did you mean 'wei",
        ),
        ({"lr": "fast"}, "lr is 'fast'; it must be a number"),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"epochs": -1}, "epochs is -1.0; it must be positive"),
        ({"ema": 1}, "ema is 1.0; it must be at least 0 and below 1"),
        ({"min_lr": 1e-4, "schedule": "linear"}, "min_lr is for the cosine; the schedule linear has no such end"),
        ({"crop": "padded", "crop_scale": 0.3}, "crop_scale is for resized crops; crop is padded"),
        ({"mix_prob": 0.5}, "mix_prob is for mixup and cutmix; both are off"),
        ({"cutmix": 1, "mix_switch_prob": 0.3}, "mix_switch_prob is for mixup and cutmix together; one of them is off"),
        ({"min_lr": 0.5, "lr": 0.1}, "min_lr is 0.5; it must be at most lr, 0.1"),
        ({"batch_size": True}, "batch_size is True; it must be a whole number"),
        ({"compile": "maybe"}, "compile is 'maybe'; it must be true or false"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; it must be one of cosine, linear, constant"),
        ({"img_size": "8x8x8"}, "img_size is '8x8x8'; it must be a whole number or HEIGHTxWIDTH or nothing"),
        ({"img_size": 0}, "img_size is 0; it must be positive"),
        ({"model_args": "depth"}, "model_args is 'depth'; it must be a YAML mapping"),
        ({"hflip": 2}, "hflip is 2.0; it must be from 0 to 1"),
        ({"holdout": 1}, "holdout is 1.0; it must be above 0 and below 1"),
        ({"crop_pct": 0.05}, "crop_pct is 0.05; it must be from 0.1 to 1"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_recipe(given, VisionRecipe)
    assert message in str(caught.value)


def test_settings_that_have_an_effect_are_taken() -> None:
    given = {"crop_scale": 0.3, "mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.5, "mix_switch_prob": 0.3, "min_lr": 1e-5}
    recipe = make_recipe(given, VisionRecipe)
    assert {name: getattr(recipe, name) for name in given} == given
    assert make_recipe({"cutmix": 1, "mix_prob": 0.5}, VisionRecipe).mix_prob == 0.5


def test_a_tokenizer_is_named_or_trained() -> None:
    with pytest.raises(UserError, match="tokenizer characters and train_tokenizer exclude each other"):
        make_recipe({"tokenizer": "characters", "train_tokenizer": 300}, CausalRecipe)


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "must map hyper-parameters"), ("a: [", "is not valid YAML"), (None, "There is no")]
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path / "r.yaml")


def test_the_task_is_the_one_named() -> None:
    assert task_of({}) == task_of({"task": "image-classification"}) == "image-classification"
    with pytest.raises(UserError, match="There is no task 'image'"):
        task_of({"task": "image"})


@pytest.mark.parametrize("kind", RECIPES.values(), ids=RECIPES)
def test_every_field_has_help(kind: type[Recipe]) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(kind))


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_recipes_in_the_repository_open_with_their_command_and_are_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    opening = text.splitlines()[:12]
    for word in ("Command", "Score", "Hardware", "Time"):
        assert any(line.startswith(f"# {word}:") for line in opening), word
    settings = yaml.safe_load(text)
    make_recipe(settings, RECIPES[settings.pop("task", "image-classification")])
