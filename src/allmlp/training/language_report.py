"""A language run's pictures and samples: how training went, what the spatial weights learnt, what the model writes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from allmlp.files import write_text
from allmlp.language import GMLPForCausalLM
from allmlp.tables import table
from allmlp.training.language_evaluation import unwritten
from allmlp.training.report import BLUE, ORANGE, STYLE, draw_confusion, label_end, save

_SAMPLE_TOKENS = 400


def write(directory: Path, metrics: Mapping[str, Any], model: Any, tokenizer: Any) -> list[Path]:
    """Draw everything there is to draw, and let a causal model write a sample.

    Args:
        directory: where the files go.
        metrics: the run's metrics with its history.
        model: the trained model.
        tokenizer: its tokenizer.

    Returns:
        The files written.
    """
    paths = [
        save(draw_losses(metrics["history"]), directory / "curves.png"),
        save(draw_token_weights(model), directory / "spatial_weights.png"),
    ]
    if isinstance(model, GMLPForCausalLM):
        paths.append(directory / "sample.txt")
        write_text(paths[-1], sample(model, tokenizer))
    return paths


def write_classification(
    directory: Path,
    history: Sequence[Mapping[str, float]],
    logits: Float[Tensor, "texts classes"],
    labels: Int[Tensor, " texts"],
    classes: Sequence[str],
) -> list[Path]:
    """Draw the course of training and what is confused."""
    return [
        save(draw_losses(history), directory / "curves.png"),
        save(draw_confusion(labels, logits.argmax(1), classes), directory / "confusion.png"),
    ]


def draw_losses(history: Sequence[Mapping[str, float]]) -> Figure:
    """Training and held-out loss over the steps."""
    trained = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    tested = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 3.6), layout="constrained")
        axes = figure.subplots()
        if trained:
            axes.plot(*zip(*trained, strict=True), color=BLUE, alpha=0.8, linewidth=1, label="training")
        if tested:
            axes.plot(*zip(*tested, strict=True), color=ORANGE, marker="o", ms=3, label="held out")
            label_end(axes, tested[-1], f"{tested[-1][1]:.4f}")
        axes.set(title="Loss (cross entropy, nats)", xlabel="step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.legend()
    return figure


def draw_token_weights(model: Any, layers: int = 8) -> Figure:
    """The spatial weights of evenly chosen layers, row = token written, column = token read; Toeplitz: by lag."""
    units = [block.sgu for block in model.model.layers]
    chosen = [round(place) for place in np.linspace(0, len(units) - 1, min(layers, len(units)))]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    with mpl.rc_context({**STYLE, "axes.grid": units[0].toeplitz}):
        figure = Figure(figsize=(2.3 * columns, 2.3 * rows + 0.4), layout="constrained")
        figure.suptitle("Spatial weights of the first head", x=0.01, ha="left", fontsize=10, fontweight="bold")
        for axes in figure.subplots(rows, columns, squeeze=False).flatten():
            axes.axis("off")
        for axes, index in zip(figure.axes, chosen, strict=False):
            unit = units[index]
            weight = unit.weight[0].detach().float().cpu()
            axes.axis("on")
            axes.set_title(f"block {index + 1}", fontsize=8, fontweight="normal", loc="center")
            axes.tick_params(labelsize=6)
            if unit.toeplitz:
                lags = np.arange(1 - unit.tokens, unit.tokens)
                kept = lags >= 0 if unit.causal else lags == lags
                axes.plot(lags[kept], weight.numpy()[kept], color=BLUE, linewidth=0.8)
                continue
            weight = (weight.tril() if unit.causal else weight).numpy()
            reach = float(np.abs(weight).max()) or 1.0
            norm = SymLogNorm(reach / 50, vmin=-reach, vmax=reach)
            axes.imshow(weight, cmap="RdBu_r", norm=norm, interpolation="nearest")
    return figure


@torch.inference_mode()
def sample(model: GMLPForCausalLM, tokenizer: Any, tokens: int = _SAMPLE_TOKENS) -> str:
    """A text that the model writes from a line end on, drawn with a seed of its own."""
    start = tokenizer("\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    if start.shape[1] == 0 or start[0, 0] == tokenizer.unk_token_id:
        start = torch.zeros(1, 1, dtype=torch.long)
    training = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        written = model.eval().generate(
            start.to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=unwritten(tokenizer),
            context_overflow="reprefill",
        )
    model.train(training)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def measures_text(measures: Mapping[str, Any], what: str) -> str:
    """A text's cross entropy as a table of units."""
    rows = [("per", "nats", "bits")]
    for unit in ("token", "character", "byte"):
        if f"nats_per_{unit}" in measures:
            rows.append((unit, f"{measures[f'nats_per_{unit}']:.4f}", f"{measures[f'bits_per_{unit}']:.4f}"))
    tokens = f"{what} tokens" if what else "tokens"
    head = f"{measures['predicted']:,} {tokens} predicted, perplexity {measures['perplexity']:.4g}"
    return f"{head}\n{table(rows, right=(1, 2))}"


def evaluation_text(found: Mapping[str, Any]) -> str:
    """What `evaluate` found, as text."""
    head = f"{found['run']} on {found['data']} ({found['part']})"
    if "per_class" not in found:
        return f"{head}\n{measures_text(found, '' if found['part'] == 'all' else found['part'])}"
    rows = [("class", "texts", "accuracy", "precision")]
    for name, figures in found["per_class"].items():
        rows.append((name, f"{figures['texts']:,}", f"{figures['accuracy']:.2%}", f"{figures['precision']:.2%}"))
    return f"{head}, {found['texts']:,} texts\naccuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}\n\n" + table(
        rows, right=(1, 2, 3)
    )
