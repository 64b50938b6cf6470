"""What a training survives, and what it says of the rest: kills, full disks, broken data, gradients of no number."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import allmlp
from allmlp import training
from allmlp.checkpoints import run_directory
from allmlp.checkpoints.training_checkpoints import STATE, checkpoints_in, last_checkpoint
from allmlp.data import images as image_data
from allmlp.data.image_batches import ImageBatches
from allmlp.errors import Diverged, Interrupted, TrainingError, UserError
from allmlp.files import UNFINISHED
from allmlp.training import faults, language, vision
from allmlp.training.callbacks import Interruption, Progress
from allmlp.training.engine import Engine
from allmlp.training.recipe import RECIPES, Recipe, make_recipe
from tests.data.texts import write_text
from tests.pictures import write_classes
from tests.training.tiny import tiny_recipe

# Everything with a state of its own: dropped blocks, mixing, erasing, averages, accumulation, processes for the data.
VISION = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "random_erasing": 0.2,
    "auto_augment": "rand-m5",
    "drop": 0.1,
    "drop_path": 0.1,
    "ema": 0.9,
    "accumulate": 2,
    "batch_size": 4,
    "workers": 2,
    "eval_every": 4,
    "epochs": 5,
}
LANGUAGE = {
    "model": "gmlp_nano",
    "context": 16,
    "precision": "fp32",
    "dropout": 0.1,
    "survival": 0.9,
    "ema": 0.9,
    "model_args": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32},
    "lr": 1e-2,
    "batch_size": 64,
    "max_steps": 15,
    "eval_every": 4,
}


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.report, "write", lambda *arguments: [])
    monkeypatch.setattr(language.language_report, "write", lambda *arguments: [])


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def _vision(folder: Path, **settings: Any) -> Recipe:
    return tiny_recipe(folder, **settings)


def _language(folder: Path, **settings: Any) -> Recipe:
    data = {"data": write_text(folder / "text.txt")}
    return make_recipe({**LANGUAGE, **data, **settings}, RECIPES["fill-mask"])


def _killed(recipe: Recipe, output: Path, where: Any, name: str, when: Callable[..., bool], resume: bool) -> None:
    """Train in a process that is killed when it calls `where.name` with arguments that `when` is true of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = os.fork()
    if not process:
        called = getattr(where, name)

        def deadly(*arguments: Any, **settings: Any) -> Any:
            if when(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return called(*arguments, **settings)

        setattr(where, name, deadly)
        try:
            training.train(recipe, output, resume=resume)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def _at(step: int) -> Callable[..., bool]:
    return lambda callback, arguments, state, *others: state.global_step == step


def _saving(step: int) -> Callable[..., bool]:
    return lambda engine, *others: engine.state.global_step == step


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def _leftovers(run: Path) -> list[str]:
    return [path.name for path in run.rglob(f"*{UNFINISHED}*")]


@pytest.mark.parametrize(
    ("make", "settings", "finish"),
    [(_vision, VISION, (run_directory, "save_classifier")), (_language, {}, (run_directory, "save_language"))],
    ids=["vision", "language"],
)
def test_a_training_killed_again_and_again_ends_with_the_same_weights(
    tmp_path: Path, make: Any, settings: dict[str, Any], finish: tuple[Any, str]
) -> None:
    recipe, run = make(tmp_path, **settings), tmp_path / "parts"
    whole = training.train(recipe, tmp_path / "whole")
    last = whole["steps"]
    assert last == 15

    _killed(recipe, run, Progress, "on_step_end", _at(2), resume=False)
    assert last_checkpoint(run) is None
    _killed(recipe, run, Progress, "on_step_end", _at(6), resume=True)
    assert last_checkpoint(run) == run / "checkpoint-4"
    # Weights and optimiser are written, the rest is not.
    _killed(recipe, run, Engine, "_save_rng_state", _saving(8), resume=True)
    assert _leftovers(run)
    assert last_checkpoint(run) == run / "checkpoint-4"
    assert allmlp.load(run / "checkpoint-4")
    # A new checkpoint is complete, an old one is about to be removed.
    _killed(recipe, run, shutil, "rmtree", lambda path, *_: str(path).endswith(".removed"), resume=True)
    assert _leftovers(run)
    assert all(map(allmlp.load, checkpoints_in(run)))
    # All is learnt, nothing written.
    _killed(recipe, run, *finish, lambda *arguments: run in map(Path, filter(_is_path, arguments)), resume=True)
    assert last_checkpoint(run) == run / f"checkpoint-{last}"
    assert not (run / "config.json").exists()

    resumed = training.train(recipe, run, resume=True)
    torch.testing.assert_close(_weights(run), _weights(tmp_path / "whole"), rtol=0, atol=0)
    assert resumed["steps"] == last
    assert resumed["best"] == whole["best"]
    assert not _leftovers(run)


def _is_path(argument: Any) -> bool:
    return isinstance(argument, (str, Path))


@pytest.mark.parametrize("where", ["on_step_end", "on_prediction_step"])
def test_a_scheduler_gets_a_checkpoint_at_once(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = _language(tmp_path, max_steps=8), tmp_path / "run"
    whole = training.train(recipe, tmp_path / "whole")
    called = getattr(Interruption, where)

    def ask(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        called(self, args, state, control, **others)

    with monkeypatch.context() as patched:
        patched.setattr(Interruption, where, ask)
        with pytest.raises(Interrupted) as caught:
            training.train(recipe, run)
    assert str(caught.value).startswith(f"Stopped after step 4 of 8. {run}/checkpoint-4 holds everything")
    assert caught.value.by_scheduler
    resumed = training.train(recipe, run, resume=True)
    torch.testing.assert_close(_weights(run), _weights(tmp_path / "whole"), rtol=0, atol=0)
    assert resumed["nats_per_token"] == whole["nats_per_token"]


@contextlib.contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


@pytest.mark.parametrize("room", [0.5, 1.5], ids=["for no weights", "for no optimiser"])
def test_a_full_disk_leaves_the_last_checkpoint(room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = _language(tmp_path, max_steps=8), tmp_path / "run"
    save = Engine._save_checkpoint

    def save_where_there_is_no_room(self: Engine, *arguments: Any) -> None:
        first = run / "checkpoint-4" / "model.safetensors"
        with _files_of_at_most(int(room * first.stat().st_size)) if first.exists() else contextlib.nullcontext():
            save(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "_save_checkpoint", save_where_there_is_no_room)
        with pytest.raises(TrainingError, match=r"cannot be written to: .* MiB are free\. .*checkpoint-4 holds"):
            training.train(recipe, run)
    assert last_checkpoint(run) == run / "checkpoint-4"
    assert allmlp.load(run / "checkpoint-4")
    assert not _leftovers(run)
    assert training.train(recipe, run, resume=True)["steps"] == 8


def _spoil(monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    """Make one picture's pixels no numbers, of those whose names hold a text."""
    read = ImageBatches.__getitems__

    def spoiling(self: ImageBatches, indices: Any) -> dict[str, Any]:
        batch = read(self, indices)
        for place, name in enumerate(batch["names"]):
            if self.seed is not None and spoilt in name:
                batch["pixel_values"][place] = torch.nan
        return batch

    monkeypatch.setattr(ImageBatches, "__getitems__", spoiling)


def test_a_loss_that_is_no_number_stops_and_names_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = tiny_recipe(tmp_path, accumulate=2, batch_size=4, eval_every=1, lr=0.01, warmup=0), tmp_path / "run"
    names = sorted(str(path) for path in (tmp_path / "pictures").rglob("*.png"))
    spoilt = None
    read = ImageBatches.__getitems__
    seen: list[str] = []

    def spoiling(self: ImageBatches, indices: Any) -> dict[str, Any]:
        nonlocal spoilt
        batch = read(self, indices)
        if self.seed is not None:
            seen.extend(batch["names"])
            # The fourth batch is the second half of the second step.
            if len(seen) == 16:
                batch["pixel_values"][2] = torch.nan
                spoilt = batch["names"]
        return batch

    monkeypatch.setattr(ImageBatches, "__getitems__", spoiling)
    with pytest.raises(Diverged) as caught:
        training.train(recipe, run)
    assert spoilt is not None
    assert set(spoilt) < set(names)
    assert str(caught.value).startswith("The loss of step 2 is nan (learning rate 0.00")
    assert f"Its batch: {', '.join(spoilt)}. Try a lower --lr" in str(caught.value)
    assert f"{run}/checkpoint-1 holds everything" in str(caught.value)
    (line,) = (run / "nan.jsonl").read_text().splitlines()
    assert json.loads(line) | {"learning_rate": 0} == {"step": 2, "learning_rate": 0, "loss": "nan", "examples": spoilt}


def test_a_batch_without_names_is_not_listed(tmp_path: Path) -> None:
    divergence, nan = faults.Divergence(tmp_path, skip=False), torch.tensor(torch.nan)
    divergence.steps.append(faults.Step(number=3, learning_rate=0.1, norm=nan, losses=[nan], names=[[]]))
    with pytest.raises(Diverged, match=r"^The loss of step 3 is nan \(learning rate 0\.1\)\. Try a lower --lr"):
        divergence.look()


def test_steps_without_a_finite_gradient_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _spoil(monkeypatch, "red/03")
    recipe = tiny_recipe(tmp_path, nan="skip", epochs=4, holdout=0.1)
    metrics = training.train(recipe, tmp_path / "run")
    skipped = metrics["skipped_steps"]
    assert len(skipped) == 4, "one step an epoch has the picture"
    assert caplog.text.count("skipped: The loss of step") == 4
    assert all(torch.isfinite(tensor).all() for tensor in _weights(tmp_path / "run").values())
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert all(loss == loss for loss in losses)
    assert [entry["grad_norm"] for entry in metrics["history"] if entry["step"] in skipped and "loss" in entry] == [
        0
    ] * 4

    monkeypatch.setattr(faults, "PATIENCE", 3)
    _spoil(monkeypatch, "")
    with pytest.raises(Diverged, match=r"step 3 .* So it was with the 2 steps before it\. There is no checkpoint"):
        training.train(recipe, tmp_path / "all")


def test_a_gradient_can_be_no_number_where_the_loss_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = vision.VisionEngine.compute_loss

    def steep(self: Any, *arguments: Any, **settings: Any) -> Any:
        loss = compute(self, *arguments, **settings)
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    monkeypatch.setattr(vision.VisionEngine, "compute_loss", steep)
    with pytest.raises(Diverged, match=r"^The gradient of step 1 is (nan|inf) .* and 19 more, listed in "):
        training.train(tiny_recipe(tmp_path, batch_size=24), tmp_path / "run")


def _in_a_worker(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    read, parent = ImageBatches.__getitems__, os.getpid()

    def acting(self: ImageBatches, indices: Any) -> dict[str, Any]:
        if os.getpid() != parent and self.epoch == 1:
            act()
        return read(self, indices)

    monkeypatch.setattr(ImageBatches, "__getitems__", acting)


def test_a_worker_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_a_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        TrainingError,
        match=r"A process that prepares data \(pid \d+\) (is killed by signal: Killed|exited unexpectedly)\. ",
    ):
        training.train(tiny_recipe(tmp_path, workers=1), tmp_path / "run")


def test_a_worker_hands_its_message_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("This cannot be: not so.")

    _in_a_worker(monkeypatch, fail)
    with pytest.raises(UserError, match=r"^This cannot be: not so\.$"):
        training.train(tiny_recipe(tmp_path, workers=1), tmp_path / "run")


def test_a_picture_that_breaks_off_is_left_out_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As with data larger than memory, of which only the headers are read at first.
    monkeypatch.setattr(image_data, "MEMORY_LIMIT", 0)
    recipe = tiny_recipe(tmp_path)
    broken = tmp_path / "pictures" / "red" / "03.png"
    broken.write_bytes(broken.read_bytes()[:200])
    metrics = training.train(recipe, tmp_path / "run")
    assert metrics["unreadable_images"] == [str(broken)]
    with pytest.raises(UserError, match=r"^\S*red/03\.png cannot be read as an image: "):
        training.train(tiny_recipe(tmp_path, strict=True), tmp_path / "strict")


def test_a_picture_alone_in_its_batch_may_be_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_data, "MEMORY_LIMIT", 0)
    write_classes(tmp_path / "pictures" / "train", each=2)
    write_classes(tmp_path / "pictures" / "val", each=1)
    broken = tmp_path / "pictures" / "train" / "red" / "01.png"
    broken.write_bytes(broken.read_bytes()[:200])
    metrics = training.train(tiny_recipe(tmp_path, batch_size=1, epochs=1, mixup=0.2), tmp_path / "run")
    assert (metrics["steps"], metrics["unreadable_images"]) == (6, [str(broken)])
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert sorted(losses)[0] == 0
    assert sorted(losses)[1] > 0.1


def test_a_held_out_picture_that_breaks_off_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_data, "MEMORY_LIMIT", 0)
    write_classes(tmp_path / "pictures" / "train", each=4)
    write_classes(tmp_path / "pictures" / "val", each=2)
    broken = tmp_path / "pictures" / "val" / "red" / "01.png"
    broken.write_bytes(broken.read_bytes()[:200])
    metrics = training.train(tiny_recipe(tmp_path, epochs=1), tmp_path / "run")
    assert (metrics["images"], metrics["unreadable_images"]) == (5, [str(broken)])
    assert f"left out 1 of {tmp_path / 'pictures'} that cannot be read: {broken}" in caplog.text
    with pytest.raises(UserError, match=rf"^{broken} cannot be read as an image: "):
        training.train(tiny_recipe(tmp_path, epochs=1, strict=True), tmp_path / "strict")


def test_the_best_checkpoint_is_never_rotated_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.5, 0.9, 0.7, 0.6])
    monkeypatch.setattr(vision, "_metrics", lambda prediction: {"accuracy": next(accuracies), "top5": 1.0})
    run = tmp_path / "run"
    metrics = training.train(tiny_recipe(tmp_path, epochs=4, keep=1), run)
    assert metrics["best"] == {"checkpoint": "checkpoint-6", "accuracy": 0.9}
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-6", "checkpoint-12"]
    state = json.loads((run / "checkpoint-12" / STATE).read_text())
    assert state["best_model_checkpoint"] == str(run / "checkpoint-6")


def test_a_resumed_run_says_what_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    language.train(_language(tmp_path, max_steps=4), run)
    language.train(_language(tmp_path, max_steps=5, lr=0.5), run, resume=True)
    assert "going on with other hyper-parameters: max_steps 4 → 5, lr 0.01 → 0.5" in caplog.text


def test_a_damaged_checkpoint_is_named_file_by_file(tmp_path: Path) -> None:
    recipe, run = _vision(tmp_path, max_steps=2, ema=0.9), tmp_path / "run"
    training.train(recipe, run)
    checkpoint = last_checkpoint(run)
    files = [path for path in checkpoint.iterdir() if path.suffix in (".json", ".pt", ".pth", ".safetensors")]
    assert len(files) >= 5
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{path.name} cannot be read: .* Remove .*{checkpoint.name} to go on from"):
            training.train(recipe, run, resume=True)
        path.write_bytes(whole)
    training.train(recipe, run, resume=True)


def test_steps_that_are_skipped_now_and_then_end_nothing(tmp_path: Path) -> None:
    watch = faults.Divergence(tmp_path, skip=True)
    for number in range(faults.PATIENCE + 5):
        for norm in (float("nan"), 1.0):
            loss = torch.tensor(norm)
            step = faults.Step(number=number, learning_rate=0.1, norm=loss, losses=[loss], names=[[]])
            watch.steps.append(step)
            assert watch.look() == (norm != 1.0)


def test_a_second_training_is_kept_out_of_a_run_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = "import sys; from allmlp.files import only_writer\nwith only_writer(sys.argv[1]): print(flush=True), input()"
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(UserError, match="is being written by another process"):
            training.train(_vision(tmp_path), run, overwrite=True)
        first.kill()
    assert [path.name for path in run.iterdir()] == [".lock"]
    training.train(_vision(tmp_path), run)
    assert not (run / ".lock").exists()
