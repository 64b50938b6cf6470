"""A vision run's pictures: how training went, what is confused, what is predicted, what the spatial weights learnt."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from allmlp.checkpoints.timm_models import TimmModel
from allmlp.data.image_batches import ImageBatches
from allmlp.data.labelled_images import LabelledImages, decode
from allmlp.files import atomic_path
from allmlp.training.evaluation import confusion

INK, BLUE, ORANGE, GREEN, RED = "#1f2933", "#2f6fb0", "#d9822b", "#3a9a5b", "#c23b3b"
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
}
SPATIAL_WEIGHTS = re.compile(
    r"blocks\.(\d+)\.(sgu\.weight|mlp_channels\.gate\.proj\.weight|linear_tokens\.weight|mlp_tokens\.fc1\.weight)"
)
"""The parameters that mix positions: of gMLP (timm's too), ResMLP and Mixer."""
SAMPLES = 8


def write(
    directory: Path,
    history: Sequence[dict[str, float]],
    logits: Float[Tensor, "images classes"],
    labels: Int[Tensor, " images"],
    held_out: ImageBatches,
    model: TimmModel,
) -> list[Path]:
    """Draw everything there is to draw.

    Args:
        directory: where the pictures go, and a few held-out images under `samples/`.
        history: the Trainer's log.
        logits: the model's logits for the held-out images that could be read.
        labels: their classes.
        held_out: the held-out images.
        model: the trained model; its `pretrained_cfg` has the classes' names.

    Returns:
        The pictures written.
    """
    classes = model.pretrained_cfg["label_names"]
    images = held_out.images
    if held_out.broken.any():
        images = images.subset((~held_out.broken).nonzero().flatten().numpy())
    write_samples(directory / "samples", images, classes)
    figures = {
        "curves": draw_curves(history, (logits.argmax(1) == labels).double().mean().item()),
        "confusion": draw_confusion(labels, logits.argmax(1), classes),
        "predictions": draw_predictions(images, logits, labels, classes),
        "spatial_weights": draw_spatial_weights(model),
    }
    return [save(figure, directory / f"{name}.png") for name, figure in figures.items() if figure is not None]


def save(figure: Figure, path: Path) -> Path:
    """Write a picture all at once."""
    with mpl.rc_context(STYLE), atomic_path(path) as temporary:
        figure.savefig(temporary)
    return path


def draw_curves(history: Sequence[dict[str, float]], final: float) -> Figure:
    """Loss and accuracy over the epochs; the final accuracy, measured in float32, is written at the end."""
    trained = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    tested = [entry for entry in history if "eval_loss" in entry]
    epochs = [entry["epoch"] for entry in tested]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        if trained:
            left.plot(*zip(*trained, strict=True), color=BLUE, alpha=0.8, linewidth=1, label="training")
        marker = "o" if len(epochs) <= 40 else None
        left.plot(epochs, [e["eval_loss"] for e in tested], color=ORANGE, marker=marker, ms=3, label="held out")
        left.set(title="Loss (cross entropy, nats)", xlabel="epoch")
        left.margins(y=0.08)
        left.set_ylim(bottom=0)
        left.legend()
        accuracy = [100 * entry["eval_accuracy"] for entry in tested]
        right.plot(epochs, accuracy, color=ORANGE, marker=marker, ms=3, label="top 1")
        if any(entry["eval_top5"] < 1 for entry in tested):
            right.plot(epochs, [100 * e["eval_top5"] for e in tested], color=GREEN, linewidth=1, label="top 5")
            right.legend(loc="lower right")
        if accuracy:
            label_end(right, (epochs[-1], accuracy[-1]), f"{final:.2%}")
        right.set(title="Accuracy on held-out images (%)", xlabel="epoch")
        for axes in (left, right):
            axes.set_xlim(left=0)
            whole = bool(epochs) and epochs[-1] >= 1
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, min_n_ticks=1))
    return figure


def label_end(axes: Any, point: tuple[float, float], text: str) -> None:
    """Write beside a curve's last point, where no curve is."""
    axes.annotate(text, point, xytext=(6, 0), ha="left", va="center", textcoords="offset points")


def draw_confusion(true: Int[Tensor, " images"], predicted: Int[Tensor, " images"], classes: Sequence[str]) -> Figure:
    """What each class is taken for, as shares of the class; of many classes those most confused."""
    n = len(classes)
    counts = confusion(true, predicted, n).double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shown = torch.arange(n)
    if n > 30:
        wrong = shares.clone().fill_diagonal_(0)
        shown = (wrong.sum(0) + wrong.sum(1)).topk(30).indices.sort().values
    percent = 100 * shares[shown][:, shown].numpy()
    names = [_short(classes[int(index)], 18) for index in shown]
    size = 3.2 + 0.33 * len(names)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(size + 0.6, size), layout="constrained")
        axes = figure.subplots()
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(percent):
            if round(value, 1) > 0 and len(names) <= 30:
                text = f"{value:.0f}" if value >= 1 else "<1"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if value > 55 else INK)
        long = max(map(len, names)) > 4
        axes.set_xticks(range(len(names)), names, rotation=45 * long, ha="right" if long else "center")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        title = f"Confusion, % of each class ({counts.diagonal().sum() / counts.sum():.2%} right)"
        axes.set(title=title if n <= 30 else f"{title}\nthe 30 classes most confused of {n}")
        axes.set(xlabel="predicted", ylabel="true class")
    return figure


def draw_predictions(
    images: LabelledImages,
    logits: Float[Tensor, "images classes"],
    labels: Int[Tensor, " images"],
    classes: Sequence[str],
    columns: int = 8,
) -> Figure:
    """Held-out images with what the model says: some evenly chosen, then the mistakes it is surest of."""
    probability, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    surest = wrong[probability[wrong].argsort(descending=True)][:columns]
    evenly = torch.linspace(0, len(labels) - 1, min(3 * columns, len(labels))).round().long()
    sections = [("Held-out images", evenly), ("Surest mistakes", surest)]
    sections = [(title, chosen) for title, chosen in sections if len(chosen)]
    rows = [math.ceil(len(chosen) / columns) for _, chosen in sections]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.25 * columns, 1.6 * sum(rows) + 0.35 * len(rows)), layout="constrained")
        parts = figure.subfigures(len(sections), 1, height_ratios=rows, squeeze=False)
        for part, count, (title, chosen) in zip(parts[:, 0], rows, sections, strict=True):
            part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
            grid = part.subplots(count, columns, squeeze=False).flatten()
            for axes in grid:
                axes.axis("off")
            for axes, index in zip(grid, chosen.tolist(), strict=False):
                image = decode(images.sources[index])
                axes.imshow(image, interpolation="nearest" if max(image.size) <= 64 else "antialiased")
                right = predicted[index] == labels[index]
                said = f"{_short(classes[int(predicted[index])])} {probability[index]:.0%}"
                caption = said if right else f"{said}\nis {_short(classes[int(labels[index])])}"
                axes.set_title(
                    caption, color=INK if right else RED, fontsize=7, fontweight="normal", loc="center", pad=3
                )
    return figure


def draw_spatial_weights(model: TimmModel, layers: int = 6, columns: int = 12) -> Figure | None:
    """Rows of the matrices that mix positions, each laid out as the image's grid of patches; None where there are none.

    gMLP and ResMLP: what an output position (framed) takes from every position. Mixer: what a hidden unit takes, the
    strongest units first.
    """
    matrices = _spatial_matrices(model)
    if not matrices:
        return None
    shown = [matrices[round(place)] for place in np.linspace(0, len(matrices) - 1, min(layers, len(matrices)))]
    (height, width), per_position = shown[0][2:]
    cell = 0.8
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(columns * cell + 1.1, len(shown) * cell * height / width + 0.75), layout="constrained")
        figure.suptitle(
            "Spatial weights: what an output position (framed) takes from each patch"
            if per_position
            else "Token-mixing weights: what a hidden unit takes from each patch, the strongest first",
            x=0.01,
            ha="left",
            fontsize=10,
            fontweight="bold",
        )
        grid = figure.subplots(len(shown), columns, squeeze=False)
        for line, (block, matrix, (height, width), per_position) in zip(grid, shown, strict=True):
            chosen = _chosen_rows(matrix, columns, per_position)
            reach = float(np.quantile(np.abs(matrix[chosen]), 0.995)) or 1.0
            for axes in line:
                axes.axis("off")
            for axes, row in zip(line, chosen, strict=False):
                axes.imshow(matrix[row].reshape(height, width), cmap="RdBu_r", norm=TwoSlopeNorm(0, -reach, reach))
                if per_position:
                    corner = (row % width - 0.5, row // width - 0.5)
                    axes.add_patch(mpl.patches.Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=0.9))
            line[0].text(
                -0.15, 0.5, f"block {block + 1}", transform=line[0].transAxes, ha="right", va="center", fontsize=8
            )
    return figure


def write_samples(directory: Path, images: LabelledImages, classes: Sequence[str]) -> None:
    """A few held-out images as files named after their class, to try `allmlp predict` on."""
    directory.mkdir(parents=True, exist_ok=True)
    for index in np.linspace(0, len(images) - 1, min(SAMPLES, len(images))).round().astype(int).tolist():
        # Names of files end at 255 bytes; a letter takes up to four, and what is being written has a longer name.
        name = re.sub(r"[^\w-]+", "_", classes[int(images.labels[index])])[:40]
        image = decode(images.sources[index])
        with atomic_path(directory / f"{name}_{index}.png") as temporary:
            image.save(temporary)


def _spatial_matrices(model: TimmModel) -> list[tuple[int, np.ndarray, tuple[int, int], bool]]:
    """(block, matrix [rows, patches], patch grid, whether its rows are positions) for each layer that has one."""
    found = []
    grid = getattr(getattr(model, "stem", None), "grid_size", None) or (0, 0)
    for name, parameter in model.named_parameters():
        match = SPATIAL_WEIGHTS.fullmatch(name)
        if match is None:
            continue
        matrix = parameter.detach().float().cpu().numpy()
        matrix = matrix[0] if matrix.ndim == 3 else matrix
        if matrix.shape[1] == math.prod(grid):
            found.append((int(match[1]), matrix, grid, match[2] != "mlp_tokens.fc1.weight"))
    return found


def _chosen_rows(matrix: np.ndarray, count: int, per_position: bool) -> list[int]:
    count = min(count, len(matrix))
    if per_position:
        return np.linspace(0, len(matrix) - 1, count + 2).round().astype(int)[1:-1].tolist()
    return np.argsort(-np.linalg.norm(matrix, axis=1), kind="stable")[:count].tolist()


def _short(name: str, length: int = 12) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
