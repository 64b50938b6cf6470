"""Segmentation and detection with the libraries people use, on drawn shapes, from random weights.

    python benchmarks/dense_prediction.py

trains three small models, two minutes on two cores, tests them on drawings they have not seen, and writes
benchmarks/results/dense_prediction.json, docs/figures/dense_prediction.png and the table of docs/dense_prediction.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import allmlp.vision  # noqa: F401 registers the models
from allmlp.benchmark import machine
from allmlp.benchmark.report import replace_part
from allmlp.files import write_json
from allmlp.training.report import STYLE, save

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dense_prediction.json"
PAGE = ROOT / "docs" / "dense_prediction.md"
FIGURE = ROOT / "docs" / "figures" / "dense_prediction.png"
SHAPES = {"ellipse": (210, 70, 60), "rectangle": (70, 170, 80), "triangle": (60, 90, 210)}
SIZE = 64
HELD_OUT = 200
SHOWN = 6


@dataclass(frozen=True)
class Drawing:
    """Shapes on a grey, noisy ground, and where they are.

    Attributes:
        image: `[3, size, size]`, in [0, 1].
        mask: `[size, size]`, 0 for the ground, else 1 + the shape's place in `SHAPES`.
        boxes: `[shapes, 4]`, left, top, right and bottom in pixels, right and bottom behind the last pixel.
        labels: `[shapes]`, as in the mask.
    """

    image: Tensor
    mask: Tensor
    boxes: Tensor
    labels: Tensor


def draw(seed: int, size: int = SIZE) -> Drawing:
    """One to three shapes that do not touch, each kind in shades of its own colour; one drawing a seed."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (size, size), tuple((rng.integers(20, 236) + rng.integers(-20, 21, 3)).tolist()))
    mask = Image.new("L", (size, size))
    boxes: list[tuple[int, ...]] = []
    labels = []
    for _ in range(rng.integers(1, 4)):
        width, height = rng.integers(size // 5, size // 2, 2)
        left, top = rng.integers(0, size - width), rng.integers(0, size - height)
        corners = (int(left), int(top), int(left + width), int(top + height))
        if any(_touch(corners, other) for other in boxes):
            continue
        label = int(rng.integers(1, 1 + len(SHAPES)))
        kind, colour = list(SHAPES.items())[label - 1]
        shade = tuple((np.array(colour) + rng.integers(-40, 41, 3)).tolist())
        x0, y0, x1, y1 = corners
        for canvas, fill in ((ImageDraw.Draw(picture), shade), (ImageDraw.Draw(mask), label)):
            if kind == "triangle":
                canvas.polygon([((x0 + x1) // 2, y0), (x1 - 1, y1 - 1), (x0, y1 - 1)], fill=fill)
            else:
                getattr(canvas, kind)((x0, y0, x1 - 1, y1 - 1), fill=fill)
        boxes.append(corners)
        labels.append(label)
    pixels = np.asarray(picture) + rng.normal(0, 12, (size, size, 3))
    return Drawing(
        image=torch.from_numpy(pixels.clip(0, 255) / 255).float().permute(2, 0, 1),
        mask=torch.from_numpy(np.array(mask)).long(),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def _touch(box: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two boxes overlap or lie less than two pixels apart."""
    return all(box[axis] < other[axis + 2] + 2 and other[axis] < box[axis + 2] + 2 for axis in (0, 1))


def drawings(start: int, count: int) -> list[Drawing]:
    """Drawings of the seeds from `start` on."""
    return [draw(seed) for seed in range(start, start + count)]


def images(batch: list[Drawing]) -> Tensor:
    """The images of some drawings, normalised as the models expect."""
    return (torch.stack([drawing.image for drawing in batch]) - 0.45) / 0.225


class Backbone(nn.Module):
    """A timm model's maps as torchvision's detectors take them, through torchvision's feature pyramid network."""

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({f"{level}": y for level, y in enumerate(self.body(x))})


class Segmentation:
    """A segmentation model: maps of class scores, trained on cross entropy and Dice, judged by mean IoU."""

    metric = "mean IoU"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.dice = smp.losses.DiceLoss("multiclass")

    def loss(self, batch: list[Drawing]) -> Tensor:
        scores, masks = self.model(images(batch)), torch.stack([drawing.mask for drawing in batch])
        return nn.functional.cross_entropy(scores, masks) + self.dice(scores, masks)

    def predict(self, batch: list[Drawing]) -> Tensor:
        """Masks."""
        return self.model(images(batch)).argmax(1)

    def score(self, held_out: list[Drawing]) -> float:
        metric = MulticlassJaccardIndex(1 + len(SHAPES))
        for batch in batches(held_out):
            metric.update(self.predict(batch), torch.stack([drawing.mask for drawing in batch]))
        return metric.compute().item()


class Detection:
    """A detector of torchvision, judged by average precision at an IoU of 0.5."""

    metric = "AP50"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, batch: list[Drawing]) -> Tensor:
        return sum(self.model([drawing.image for drawing in batch], [target(drawing) for drawing in batch]).values())

    def predict(self, batch: list[Drawing]) -> list[dict[str, Tensor]]:
        """Boxes, labels and scores of each drawing."""
        return self.model([drawing.image for drawing in batch])

    def score(self, held_out: list[Drawing]) -> float:
        metric = MeanAveragePrecision(iou_thresholds=[0.5])
        for batch in batches(held_out):
            metric.update(self.predict(batch), [target(drawing) for drawing in batch])
        return metric.compute()["map_50"].item()


def target(drawing: Drawing) -> dict[str, Tensor]:
    """What a detector should find, in torchvision's form."""
    return {"boxes": drawing.boxes, "labels": drawing.labels}


def batches(all_of: list[Drawing], size: int = 50) -> list[list[Drawing]]:
    """Drawings in batches."""
    return [all_of[start : start + size] for start in range(0, len(all_of), size)]


def unet() -> Segmentation:
    """smp's U-Net on AS-MLP."""
    return Segmentation(
        smp.Unet(
            "tu-asmlp_nano_patch2_32",
            encoder_weights=None,
            encoder_depth=3,
            decoder_channels=(64, 32, 16),
            classes=1 + len(SHAPES),
        )
    )


def fcos(body: nn.Module, channels: int = 64) -> Detection:
    """torchvision's FCOS on three maps of strides 4, 8 and 16."""
    backbone = Backbone(body, channels)
    anchors = AnchorGenerator(sizes=((4,), (8,), (16,)), aspect_ratios=((1.0,),) * 3)
    model = FCOS(backbone, 1 + len(SHAPES), min_size=SIZE, max_size=SIZE, anchor_generator=anchors)
    return Detection(model)


def fcos_pyramid() -> Detection:
    """On AS-MLP's own pyramid."""
    return fcos(timm.create_model("asmlp_nano_patch2_32", patch_size=4, features_only=True))


def fcos_column() -> Detection:
    """On gMLP, a plain column, through its simple feature pyramid."""
    return fcos(
        timm.create_model(
            "gmlp_nano_patch4_32", img_size=SIZE, features_only=True, out_indices=(0, 1, 2), pyramid_channels=64
        )
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, and for how many steps it is trained."""

    title: str
    short: str
    make: Callable[[], Segmentation | Detection]
    steps: int


SETTINGS = {
    "unet_asmlp": Setting(title="smp U-Net on AS-MLP's maps", short="U-Net\nAS-MLP", make=unet, steps=100),
    "fcos_asmlp": Setting(
        title="torchvision FCOS, FPN on AS-MLP's maps", short="FCOS\nAS-MLP", make=fcos_pyramid, steps=150
    ),
    "fcos_gmlp": Setting(
        title="torchvision FCOS, FPN on gMLP's simple feature pyramid", short="FCOS\ngMLP", make=fcos_column, steps=150
    ),
}


def train(task: Segmentation | Detection, steps: int, *, batch_size: int = 8, lr: float = 4e-3) -> list[float]:
    """Train on new drawings in every step (AdamW, one cycle) and leave the model in eval mode; the losses."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    losses = []
    task.model.train()
    for step in range(steps):
        loss = task.loss(drawings(HELD_OUT + step * batch_size, batch_size))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    task.model.eval()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    if not parser.parse_args().page:
        measure()
    replace_part(PAGE, "dense_prediction", "\n".join(table(json.loads(RESULTS.read_text(encoding="utf-8"))["models"])))


def measure() -> None:
    """Write the results and draw what the models find."""
    held_out = drawings(0, HELD_OUT)
    found: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        task = setting.make()
        start = time.perf_counter()
        losses = train(task, setting.steps)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            score = task.score(held_out)
            shown[name] = task.predict(held_out[:SHOWN])
        found[name] = {
            "title": setting.title,
            "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
            "steps": setting.steps,
            "seconds": round(seconds, 1),
            "metric": task.metric,
            "score": round(score, 4),
            "losses": [round(loss, 4) for loss in losses],
        }
        print(f"{setting.title}: {task.metric} {score:.3f} after {seconds:.0f} s", flush=True)
    facts = machine()
    facts["versions"] |= {
        name: version(name) for name in ("torchvision", "segmentation-models-pytorch", "torchmetrics")
    }
    write_json(RESULTS, {"machine": facts, "held_out": HELD_OUT, "models": found})
    with rc_context(STYLE):
        save(pictures(held_out[:SHOWN], shown), FIGURE)


def table(found: dict[str, Any]) -> list[str]:
    """The page's table, a line a model."""
    lines = ["| model | parameters | steps | training, s | held-out drawings |", "|---|---:|---:|---:|---:|"]
    for figures in found.values():
        score = f"{figures['metric']} **{figures['score']:.3f}**"
        counts = f"{figures['parameters']:,} | {figures['steps']} | {figures['seconds']:.0f}"
        lines.append(f"| {figures['title']} | {counts} | {score} |")
    return lines


def pictures(drawn: list[Drawing], shown: dict[str, Any]) -> Figure:
    """Held-out drawings, and below each what the models find in it."""
    figure = Figure(figsize=(1.25 * len(drawn), 1.32 * (1 + len(shown))), layout="constrained")
    grid = figure.subplots(1 + len(shown), len(drawn))
    for column, drawing in enumerate(drawn):
        for row, axes in enumerate(grid[:, column]):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if row == 0:
                axes.imshow(drawing.image.permute(1, 2, 0).numpy())
            else:
                _show(axes, drawing, list(shown.values())[row - 1][column])
            if column == 0:
                axes.set_ylabel(("drawing", *(SETTINGS[name].short for name in shown))[row])
    return figure


def _show(axes: Axes, drawing: Drawing, found: Tensor | dict[str, Tensor]) -> None:
    """A mask in the shapes' colours, or boxes of a score of at least one half around them."""
    colours = np.array([(235, 235, 235), *SHAPES.values()]) / 255
    if isinstance(found, Tensor):
        axes.imshow(colours[found.numpy()])
        return
    axes.imshow(drawing.image.permute(1, 2, 0).numpy(), alpha=0.45)
    kept = found["scores"] >= 0.5
    for (left, top, right, bottom), label in zip(found["boxes"][kept].tolist(), found["labels"][kept], strict=True):
        axes.add_patch(
            Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec=colours[label] * 0.8, lw=1.6)
        )


if __name__ == "__main__":
    main()
