"""What the Trainer calls, one by one."""

import os
import signal
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allmlp.training import callbacks
from allmlp.training.callbacks import (
    AveragedWeights,
    DataEpoch,
    EvaluationGivenUp,
    Interruption,
    Progress,
    TensorBoard,
)


def _state(**values: Any) -> Any:
    return types.SimpleNamespace(
        **{"is_world_process_zero": True, "global_step": 0, "max_steps": 10, "epoch": 0.0, **values}
    )


def _control() -> Any:
    return types.SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False, should_log=False)


def test_the_rate_leaves_evaluations_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now)
    progress, state, control = Progress("images", per_step=8), _state(), _control()
    progress.on_epoch_begin(None, state, control)
    for step in range(4):
        progress.on_step_begin(None, state, control)
        now += 0.5
        progress.count(8 if step < 3 else 4)
        control.should_evaluate = step == 1
        progress.on_step_end(None, state, control)
        if step == 1:
            now += 100
    progress.on_epoch_end(None, state, control)
    now += 100
    assert progress.seconds == 2.0
    assert progress.rate == 14.0


def test_an_evaluation_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("images", per_step=8)
    progress.on_log(None, _state(), _control(), logs={"loss": 0.5, "learning_rate": 0.1})
    arguments = types.SimpleNamespace(num_train_epochs=3, max_steps=-1)
    metrics = {"eval_loss": 0.25, "eval_accuracy": 0.875}
    progress.on_evaluate(arguments, _state(epoch=1.0, global_step=1234), _control(), metrics=metrics)
    parts = [part.strip() for part in capsys.readouterr().err.split("  ") if part.strip()]
    assert parts[:3] == ["epoch", "1.0 of 3", "step 1,234"]
    assert parts[3:] == ["loss 0.5000", "held-out loss 0.2500", "accuracy 87.50%", "0 images/s"]
    arguments.max_steps = 2000
    progress.on_evaluate(arguments, _state(epoch=1.0, global_step=1234), _control(), metrics=metrics)
    parts = [part.strip() for part in capsys.readouterr().err.split("  ") if part.strip()]
    assert parts[:3] == ["epoch", "1.0", "step 1,234 of 2,000"]


@pytest.mark.parametrize(("epoch", "told"), [(None, 0), (0.0, 0), (1.3333, 1), (2.0, 2), (2.9999999999, 3)])
def test_the_data_is_told_the_epoch_that_begins(epoch: float | None, told: int) -> None:
    data = types.SimpleNamespace(set_epoch=lambda value: setattr(data, "epoch", value))
    DataEpoch([data]).on_epoch_begin(None, _state(epoch=epoch), _control())
    assert data.epoch == told


def test_averaged_weights_follow_swap_and_come_back(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    averaged = AveragedWeights(decay=0.5)
    averaged.on_train_begin(None, _state(), _control(), model=model)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    averaged.on_step_end(None, _state(global_step=1000), _control(), model=model)
    live = model.weight.detach().clone()
    with averaged.swapped(model):
        torch.testing.assert_close(model.weight, start + 0.5)
    torch.testing.assert_close(model.weight, live, rtol=0, atol=0)

    averaged.save(tmp_path)
    again = AveragedWeights(decay=0.5, resume_from=tmp_path)
    again.on_train_begin(None, _state(), _control(), model=model)
    with again.swapped(model):
        torch.testing.assert_close(model.weight, start + 0.5)


def test_tied_weights_are_averaged_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    averaged = AveragedWeights(decay=0.5)
    averaged.on_train_begin(None, _state(), _control(), model=model)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    averaged.on_step_end(None, _state(global_step=1000), _control(), model=model)
    averaged.save(tmp_path)
    with averaged.swapped(model):
        torch.testing.assert_close(model[1].weight, start + 0.5)


_ARGUMENTS = types.SimpleNamespace(device=torch.device("cpu"), world_size=1, logging_steps=10)


def test_a_signal_asks_and_a_second_ctrl_c_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    interruption, control = Interruption(), _control()
    before = signal.getsignal(signal.SIGINT)
    with interruption.listening():
        interruption.on_step_end(_ARGUMENTS, _state(), control)
        interruption.on_prediction_step(_ARGUMENTS, _state(), control)
        assert not control.should_training_stop
        for _ in range(2):  # a launcher passes on what its process has heard already
            os.kill(os.getpid(), signal.SIGINT)
        now += 2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    control.should_evaluate = True
    interruption.on_step_end(_ARGUMENTS, _state(), control)
    assert interruption.asked == signal.SIGINT
    assert control.should_save
    assert control.should_training_stop
    assert not control.should_evaluate
    several = types.SimpleNamespace(device=torch.device("cuda"), world_size=2, logging_steps=10)
    for step, stops in ((9, False), (10, True)):
        control = _control()
        monkeypatch.setattr(callbacks, "largest_anywhere", lambda value, device: value)
        interruption.on_step_end(several, _state(global_step=step), control)
        assert control.should_training_stop is stops
    with pytest.raises(EvaluationGivenUp):
        interruption.on_prediction_step(_ARGUMENTS, _state(), control)


def test_a_model_that_cannot_be_traced_still_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("cannot be traced")

    model = Untraceable().train()
    with caplog.at_level("INFO"):
        board = TensorBoard(tmp_path, model, torch.ones(1))
    arguments = types.SimpleNamespace(output_dir=str(tmp_path), to_json_string=lambda: "{}")
    state = _state(is_hyper_param_search=False)
    board.on_train_begin(arguments, state, _control())
    board.on_train_end(arguments, state, _control())
    assert "TensorBoard gets no graph: cannot be traced" in caplog.text
    assert model.training


def test_the_average_follows_closely_at_first() -> None:
    model = nn.Linear(2, 1)
    averaged = AveragedWeights(decay=0.999)
    averaged.on_train_begin(None, _state(), _control(), model=model)
    with torch.no_grad():
        model.weight.add_(1)
    averaged.on_step_end(None, _state(global_step=8), _control(), model=model)
    live = model.weight.detach().clone()
    with averaged.swapped(model):
        # A decay of 1 − 8^(−2/3).
        torch.testing.assert_close(model.weight, live - 0.75)
