"""Segmentation and detection libraries on our features, and benchmarks/dense_prediction.py in short."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import allmlp
from tests.scripts import script

ROOT = Path(__file__).parents[2]
benchmark = script("dense_prediction")


@pytest.mark.parametrize("decoder", [smp.Unet, smp.UPerNet])
def test_smp_takes_the_pyramid_of_as_mlp(decoder) -> None:
    model = decoder("tu-asmlp_tiny_patch4_224", encoder_weights=None, classes=3).train()
    assert model.encoder.out_channels == [3, 0, 96, 192, 384, 768]
    scores = model(torch.randn(2, 3, 64, 96))
    assert scores.shape == (2, 3, 64, 96)
    scores.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def anchors(levels: int) -> AnchorGenerator:
    return AnchorGenerator(tuple((8 * 2**level,) for level in range(levels)), ((0.5, 1.0, 2.0),) * levels)


def faster_rcnn(backbone: nn.Module, levels: int, **arguments) -> nn.Module:
    pool = MultiScaleRoIAlign([str(level) for level in range(levels)], output_size=3, sampling_ratio=2)
    return FasterRCNN(backbone, 4, rpn_anchor_generator=anchors(levels), box_roi_pool=pool, **arguments)


def retinanet(backbone: nn.Module, levels: int, **arguments) -> nn.Module:
    return RetinaNet(backbone, 4, anchor_generator=anchors(levels), **arguments)


def fcos(backbone: nn.Module, levels: int, **arguments) -> nn.Module:
    points = AnchorGenerator(tuple((8 * 2**level,) for level in range(levels)), ((1.0,),) * levels)
    return FCOS(backbone, 4, anchor_generator=points, **arguments)


BODIES = {
    "asmlp_nano_patch2_32": {"feature_norms": True},
    "s2mlpv2_nano_patch2_32": {},
    "s2mlp_nano_patch4_32": {"pyramid_channels": 16},
    "gmlp_nano_patch4_32": {"pyramid_channels": 16, "img_size": (64, 96)},
    "vip_nano_patch4_32": {"pyramid_channels": 16, "img_size": (64, 96), "segments": (1,) * 4},
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("detector", [faster_rcnn, retinanet, fcos])
def test_torchvision_detectors_train_on_our_maps(name: str, detector: Callable[..., nn.Module]) -> None:
    """A family of a fixed size gets its images at that size, a shift family at the detector's, which vary."""
    body = timm.create_model(name, features_only=True, **BODIES[name])
    levels = len(body.feature_info.channels())
    size = {"fixed_size": (96, 64)} if "img_size" in BODIES[name] else {"min_size": 48, "max_size": 96}
    model = detector(benchmark.Backbone(body, 32), levels, **size).train()
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 40)]
    targets = [{"boxes": torch.tensor([[5.0, 6, 30, 35]]), "labels": torch.tensor([label])} for label in (1, 3)]
    loss = sum(model(images, targets).values())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad.isfinite().all() for parameter in body.parameters())
    with torch.no_grad():
        found = model.eval()(images)
    assert [image.keys() for image in found] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.parametrize("features", [{}, {"feature_norms": True}, {"pyramid_channels": 8}], ids=str)
def test_a_classifiers_weights_come_in_from_a_file(features, tmp_path) -> None:
    classifier = timm.create_model("asmlp_nano_patch2_32", num_classes=5).eval()
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    backbone = timm.create_model(
        "asmlp_nano_patch2_32", features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **features
    )
    images = torch.randn(1, 3, 32, 32)
    for y, expected in zip(
        backbone.model.forward_intermediates(images, intermediates_only=True),
        classifier.forward_intermediates(images, intermediates_only=True),
        strict=True,
    ):
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_drawings_are_exact() -> None:
    drawings = benchmark.drawings(0, 200)
    assert {len(drawing.boxes) for drawing in drawings} == {1, 2, 3}
    assert {label for drawing in drawings for label in drawing.labels.tolist()} == {1, 2, 3}
    for drawing in drawings:
        covered = torch.zeros_like(drawing.mask, dtype=torch.bool)
        for box, label in zip(drawing.boxes.int().tolist(), drawing.labels.tolist(), strict=True):
            left, top, right, bottom = box
            part = drawing.mask[top:bottom, left:right]
            assert set(part.unique().tolist()) <= {0, label}
            # The shape reaches all four sides of its box.
            filled = part == label
            assert all(side.any() for side in (filled[0], filled[-1], filled[:, 0], filled[:, -1]))
            covered[top:bottom, left:right] = True
        assert not drawing.mask[~covered].any()
    assert torch.equal(benchmark.draw(3).image, drawings[3].image)


@pytest.mark.parametrize(("make", "steps", "least"), [("unet", 30, 0.6), ("fcos_pyramid", 40, 0.2)])
def test_a_few_steps_teach_most_of_it(make: str, steps: int, least: float) -> None:
    """The benchmark in short. Untrained, mean IoU and AP50 are below 0.1."""
    task = getattr(benchmark, make)()
    losses = benchmark.train(task, steps)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    with torch.no_grad():
        assert task.score(benchmark.drawings(0, 50)) > least


def test_documented_figures_are_the_measured_ones() -> None:
    found = json.loads(benchmark.RESULTS.read_text())["models"]
    least = {"mean IoU": 0.9, "AP50": 0.7}
    assert {figures["metric"] for figures in found.values()} == least.keys()
    assert all(figures["score"] >= least[figures["metric"]] for figures in found.values())
    assert sum(figures["seconds"] for figures in found.values()) < 300
    assert "\n".join(["", *benchmark.table(found), ""]) in benchmark.PAGE.read_text()


def test_documented_examples_run() -> None:
    page = (ROOT / "docs" / "dense_prediction.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) >= 3
    exec("\n".join(examples), {"allmlp": allmlp})
