"""What the Trainer calls while it runs: progress on the screen, averaged weights, TensorBoard's graph, interruption."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from allmlp.checkpoints.training_checkpoints import AVERAGED
from allmlp.distributed import is_first_process, largest_anywhere
from allmlp.errors import first_line

_log = logging.getLogger(__name__)


class Progress(TrainerCallback, ExportableState):
    """A bar where somebody watches, and one line per evaluation everywhere.

    How long the training has taken, and for what, is saved with its checkpoints, for one that goes on.

    Args:
        unit: what is counted, such as `images`.
        per_step: how many of them a full optimiser step takes.
    """

    def __init__(self, unit: str, per_step: int):
        self.unit, self.per_step = unit, per_step
        self.bar: tqdm | None = None
        self.loss: float | None = None
        self.seconds = 0.0
        self.learnt = 0
        self.since: float | None = None

    @property
    def rate(self) -> float:
        """What is learnt from per second, evaluations and checkpoints left out."""
        return self.learnt / self.seconds if self.seconds else 0.0

    def count(self, learnt: int) -> None:
        """Count what a batch holds: the last one of an epoch is short."""
        self.learnt += learnt

    def pause(self) -> None:
        """Stop the clock until the next step begins."""
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def state(self) -> dict[str, Any]:
        self.pause()
        attributes = {"seconds": self.seconds, "learnt": self.learnt, "per_step": self.per_step}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        former = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.seconds, self.learnt = former["seconds"], former["learnt"]
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit=" steps", leave=False, disable=None)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
        # A training that is shorter than the time between two losses has one too.
        control.should_log = control.should_log or state.global_step >= state.max_steps
        if control.should_evaluate or control.should_save:
            self.pause()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pause()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = logs["loss"]
            if self.bar is not None:
                self.bar.set_postfix(loss=f"{self.loss:.3f}", lr=f"{logs['learning_rate']:.1e}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        parts = [f"epoch {state.epoch:5.1f} of {args.num_train_epochs:g}", f"step {state.global_step:,}"]
        if args.max_steps > 0:
            parts = [f"epoch {state.epoch:5.1f}", f"step {state.global_step:,} of {args.max_steps:,}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts.append(f"held-out loss {metrics['eval_loss']:.4f}")
        if "eval_accuracy" in metrics:
            parts.append(f"accuracy {metrics['eval_accuracy']:.2%}")
        parts.append(f"{self.rate:,.0f} {self.unit}/s")
        tqdm.write("  ".join(parts), file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pause()
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class DataEpoch(TrainerCallback):
    """Tells the training data, and the order it is taken in, which epoch begins.

    Args:
        parts: what has `set_epoch`.
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts = parts

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self.parts:
            part.set_epoch(int((state.epoch or 0) + 1e-6))


class AveragedWeights(TrainerCallback):
    """An exponential moving average of the weights, saved with every checkpoint.

    Of sharded weights each process averages its own shards. timm's ModelEmaV3 goes through the whole state, where tied
    weights stand twice and would move twice a step, and deep-copies the model, which cannot be done once it is sharded.

    Args:
        decay: the average's decay per optimiser step; it starts lower and rises to this (timm's warm-up).
        resume_from: a checkpoint to take the average from.
    """

    def __init__(self, decay: float, resume_from: Path | None = None):
        self.decay, self.resume_from = decay, resume_from
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average = {name: tensor.clone() for name, tensor in _weights(model).items()}
        if self.resume_from is not None:
            for name, tensor in load_file(self.resume_from / AVERAGED).items():
                _fill(self.average[name], tensor)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # timm's warm-up.
        decay = min(self.decay, 1 - state.global_step ** (-2 / 3))
        live = [_local(tensor) for tensor in _weights(model).values()]
        average = [_local(tensor) for tensor in self.average.values()]
        fractions = [tensor.is_floating_point() for tensor in average]
        torch._foreach_lerp_(list(compress(average, fractions)), list(compress(live, fractions)), 1 - decay)
        for averaged, tensor, is_fraction in zip(average, live, fractions, strict=True):
            if not is_fraction:
                averaged.copy_(tensor)

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint; all processes take part in gathering what is sharded."""
        whole = {name: _whole(tensor).contiguous() for name, tensor in self.average.items()}
        if is_first_process():
            save_file(whole, checkpoint / AVERAGED)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; once more puts them back."""
        for name, live in _weights(model).items() if self.average else ():
            kept = live.clone()
            live.copy_(self.average[name])
            self.average[name].copy_(kept)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's state, tied weights once."""
    names = {name for part in (model.named_parameters(), model.named_buffers()) for name, _ in part}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _fill(tensor: Tensor, whole: Tensor) -> None:
    """Put a whole tensor into one that may be sharded."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(whole)


class TensorBoard(TensorBoardCallback):
    """The Trainer's scalars, and the model's graph.

    Args:
        directory: where the events go.
        module: the module to draw.
        example: an input of it.
        resumed_at: the step from which older events are void.
    """

    def __init__(self, directory: Path, module: nn.Module, example: Tensor, resumed_at: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=resumed_at) if is_first_process() else None
        super().__init__(self.writer)
        # Now, while the model is whole: once it is sharded, no process can run it alone.
        if self.writer is not None:
            self._draw(self.writer, module, example)

    @staticmethod
    def _draw(writer: Any, module: nn.Module, example: Tensor) -> None:
        training = module.training
        device = next(module.parameters()).device
        try:
            with warnings.catch_warnings(), torch.no_grad():
                # Drawing traces the model, which torch calls deprecated and the models' shape checks make it mention.
                warnings.simplefilter("ignore")
                writer.add_graph(module.eval(), example.to(device))
        # A model that cannot be traced still trains.
        except Exception as error:
            _log.info("TensorBoard gets no graph: %s", first_line(error))
        finally:
            module.train(training)


class Interruption(TrainerCallback):
    """Ends training at the next step with a checkpoint when a process of it is asked to stop (Ctrl-C or SIGTERM).

    Attributes:
        asked: the signal by which any of the processes has been asked, as far as they have told each other; else 0.
    """

    def __init__(self) -> None:
        self.asked = self.heard = 0
        self.since = 0.0
        self.process = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block a signal asks for an orderly end; a second Ctrl-C ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.signal(number, self._hear) for number in signals}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            # A process that prepares data inherits this; it ends when it is told to, not at Ctrl-C.
            if number == signal.SIGTERM:
                sys.exit()
            return
        if not self.heard:
            self.heard, self.since = number, time.monotonic()
            again = "; Ctrl-C once more stops at once" if number == signal.SIGINT else ""
            _log.warning("stopping after this step and saving a checkpoint%s", again)
        # Launchers pass on what their processes have heard already.
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    def _ask(self, device: torch.device) -> bool:
        # One process may have heard a signal that another has not yet.
        self.asked = largest_anywhere(self.heard, device)
        return bool(self.asked)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Several accelerators are waited for only where the loss is logged, and they are waited for anyway.
        due = args.world_size == 1 or args.device.type == "cpu" or state.global_step % args.logging_steps == 0
        if due and self._ask(args.device):
            # The time until a scheduler loses patience is for saving.
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._ask(args.device):
            raise EvaluationGivenUp

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            # The checkpoint is there already.
            control.should_evaluate = False
            control.should_save = False


class EvaluationGivenUp(Exception):
    """An evaluation in the middle of a training ended early, since the training is asked to stop."""
