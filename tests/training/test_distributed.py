"""The same training on one process and on two: real processes that meet as two nodes do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import allmlp
from allmlp import training
from allmlp.training.recipe import RECIPES, Recipe, make_recipe, recipe_to_yaml
from tests.training.tiny import tiny_recipe

ROOT = Path(__file__).parents[2]
LANGUAGE = {
    "model": "gmlp_nano",
    "model_args": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32},
    "context": 16,
    "epochs": 1,
    "log_every": 1,
    "precision": "fp32",
    "workers": 0,
    "holdout": 0.3,
    "ema": 0.9,
}


def _environment() -> dict[str, str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "LOCAL"))}
    return {**cleared, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _settings(recipe: Recipe) -> dict[str, Any]:
    settings = yaml.safe_load(recipe_to_yaml(recipe))
    return {"task": settings.pop("task"), "recipe": settings}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories of trainings on one process (`alone_*`) and of the same on two nodes of one process each."""
    folder = tmp_path_factory.mktemp("distributed")
    text = folder / "text.txt"
    text.write_text("".join(f"{i * i} is the square of {i}.\n" for i in range(40)))
    # Of 24 images the last batch of an epoch holds 4.
    images = {"ema": 0.9, "hflip": 0.5}
    language = {**LANGUAGE, "data": str(text)}
    alone = {
        "alone_images": _settings(tiny_recipe(folder, **images, batch_size=10)),
        "alone_text": {"task": "text-generation", "recipe": {**language, "batch_size": 8}},
    }
    together = {
        "ddp": _settings(tiny_recipe(folder, **images, batch_size=5)),
        "ddp_accumulating": _settings(tiny_recipe(folder, **images, batch_size=1, accumulate=5)),
        "text": {"task": "text-generation", "recipe": {**language, "batch_size": 4}},
        "fsdp": _settings(tiny_recipe(folder, **images, batch_size=5, fsdp=True)),
        "text_fsdp": {
            "task": "text-generation",
            "recipe": {**language, "batch_size": 2, "accumulate": 2, "fsdp": True},
        },
    }
    for name, job in alone.items():
        training.train(make_recipe(job["recipe"], RECIPES[job["task"]]), folder / name)
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({str(folder / name): job for name, job in together.items()}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "allmlp", "--rdzv-endpoint", f"127.0.0.1:{_port()}"]
    command += ["--local-addr", "127.0.0.1"]
    command += [str(Path(__file__).with_name("processes.py")), str(jobs)]
    nodes = [
        subprocess.Popen(command, env=_environment(), cwd=folder, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=240)
        assert node.returncode == 0, errors
    return folder


def _course(run: Path) -> dict[str, list[float]]:
    history = json.loads((run / "metrics.json").read_text())["history"]
    keys = ("loss", "eval_loss", "eval_accuracy", "grad_norm")
    return {key: [entry[key] for entry in history if key in entry] for key in keys}


@pytest.mark.parametrize(
    ("alone", "together"),
    [
        ("alone_images", "ddp"),
        ("alone_images", "ddp_accumulating"),
        ("alone_images", "fsdp"),
        ("alone_text", "text"),
        ("alone_text", "text_fsdp"),
    ],
)
def test_two_processes_take_the_same_course_as_one(runs: Path, alone: str, together: str) -> None:
    expected, found = _course(runs / alone), _course(runs / together)
    assert len(expected["loss"]) >= 6
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=2e-4), key
    weights, same = (load_file(runs / name / "model.safetensors") for name in (alone, together))
    torch.testing.assert_close(same, weights, rtol=2e-3, atol=2e-4)


def test_the_run_directory_of_a_sharded_training_is_like_any_other(runs: Path) -> None:
    names = {path.name for path in (runs / "alone_images").iterdir()}
    assert {path.name for path in (runs / "fsdp").iterdir()} == names
    model = allmlp.load(runs / "fsdp")
    assert not any("DTensor" in type(parameter.data).__name__ for parameter in model.parameters())
    assert list((runs / "fsdp").glob("checkpoint-*/pytorch_model_fsdp_0/*.distcp")), "no sharded checkpoint"
