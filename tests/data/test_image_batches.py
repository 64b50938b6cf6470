"""Batches: normalised, augmented by the seed, mixed."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

from allmlp.data import as_is
from allmlp.data.image_batches import ImageBatches, evaluation_transform, training_transform
from allmlp.data.labelled_images import LabelledImages
from allmlp.data.sampling import IGNORED
from allmlp.errors import UserError

CFG = {"input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
CFG["interpolation"] = "bicubic"


def _images(count: int = 12, size: int = 8) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return LabelledImages(sources=pixels, labels=np.arange(count) % 3, names=[f"image {i}" for i in range(count)])


def _training(**settings: object) -> ImageBatches:
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3, label_smoothing=0.1)
    transform = training_transform(CFG, crop="padded", auto_augment="rand-m9-mstd0.5-inc1")
    erase = RandomErasing(0.5, mode="pixel", device="cpu")
    arguments = {"mean": CFG["mean"], "std": CFG["std"], "mix": mix, "erase": erase, "seed": 5, **settings}
    return ImageBatches(_images(), transform, **arguments)


def test_evaluation_gives_normalised_pixels_as_they_are() -> None:
    images = _images()
    batches = ImageBatches(images, evaluation_transform(CFG), mean=CFG["mean"], std=CFG["std"])
    batch = batches.__getitems__([4, 7])
    expected = (images.sources[[4, 7]] / 255 - np.array(CFG["mean"])) / np.array(CFG["std"])
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert batch["labels"].tolist() == [1, 1]
    torch.testing.assert_close(batches[7]["pixel_values"], batch["pixel_values"][1])


def _assert_same(batch: dict[str, Any], other: dict[str, Any]) -> None:
    assert batch["names"] == other["names"]
    for name in ("pixel_values", "labels"):
        torch.testing.assert_close(batch[name], other[name], rtol=0, atol=0)


def test_augmentation_depends_on_seed_epoch_and_place_alone() -> None:
    batches = _training()
    first = batches.__getitems__([0, 1, 2, 3])
    torch.rand(7), np.random.rand(3)  # noqa: NPY002 what happens elsewhere changes nothing
    again = batches.__getitems__([0, 1, 2, 3])
    _assert_same(again, first)
    batches.set_epoch(1)
    assert not torch.equal(batches.__getitems__([0, 1, 2, 3])["pixel_values"], first["pixel_values"])
    assert not torch.equal(_training(seed=6).__getitems__([0, 1, 2, 3])["pixel_values"], first["pixel_values"])


def test_augmentation_leaves_the_global_random_states_alone() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), np.random.rand(2)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    _training().__getitems__([0, 1])
    torch.testing.assert_close(torch.rand(2), expected[0])
    np.testing.assert_array_equal(np.random.rand(2), expected[1])  # noqa: NPY002


def test_worker_processes_give_the_same_batches() -> None:
    loaders = [DataLoader(_training(), batch_size=4, num_workers=workers, collate_fn=as_is) for workers in (0, 2)]
    for alone, helped in zip(*loaders, strict=True):
        _assert_same(helped, alone)


def test_mixing_gives_shares_of_classes_and_spares_odd_batches() -> None:
    mixed = _training().__getitems__(range(6))["labels"]
    assert mixed.shape == (6, 3)
    torch.testing.assert_close(mixed.sum(1), torch.ones(6))
    assert _training().__getitems__(range(5))["labels"].tolist() == [0, 1, 2, 0, 1]


def test_mixing_depends_on_the_first_image_of_a_batch_alone() -> None:
    # Images 1 and 4 are of one class, so that equal shares give equal labels.
    one, other, elsewhere = (_training().__getitems__(batch)["labels"] for batch in ([0, 1], [0, 4], [3, 1]))
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert not torch.equal(elsewhere, one)


def test_augmentation_of_an_image_does_not_depend_on_its_batch() -> None:
    batches = _training(mix=None, erase=None)
    whole = batches.__getitems__([0, 1, 2, 3])
    torch.testing.assert_close(batches.__getitems__([2, 3])["pixel_values"], whole["pixel_values"][2:], rtol=0, atol=0)


def test_no_images_make_a_blank_one_that_does_not_count() -> None:
    batch = _training().__getitems__([])
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert batch["labels"].tolist() == [IGNORED]


def test_images_that_turn_out_broken_are_named_and_do_not_count() -> None:
    images = _images(4)
    sources = [images.sources[0], "/no/such/file.png", images.sources[2], images.sources[3]]
    broken = LabelledImages(sources=sources, labels=images.labels, names=images.names)
    settings = {"mean": CFG["mean"], "std": CFG["std"]}
    training = ImageBatches(broken, training_transform(CFG), seed=0, **settings)
    assert training.__getitems__([0, 1, 2])["labels"].tolist() == [0, 2]
    assert training.unreadable() == ["image 1"]
    with pytest.raises(UserError, match="image 1 cannot be read as an image: there is no such file"):
        ImageBatches(broken, training_transform(CFG), seed=0, strict=True, **settings).__getitems__([0, 1])
    alone = training.__getitems__([1])
    assert (alone["labels"].tolist(), alone["names"]) == ([IGNORED], [])
    assert alone["pixel_values"].shape == (1, 3, 8, 8)
    evaluation = ImageBatches(broken, evaluation_transform(CFG), **settings)
    assert evaluation.__getitems__([0, 1, 2])["labels"].tolist() == [0, IGNORED, 2]
    assert evaluation.unreadable() == ["image 1"]


def test_images_to_train_on_of_which_none_can_be_read_are_refused() -> None:
    broken = LabelledImages(sources=["/no/such.png"] * 3, labels=np.arange(3), names=["image 0", "image 1", "image 2"])
    training = ImageBatches(broken, training_transform(CFG), mean=CFG["mean"], std=CFG["std"], seed=0)
    assert training.__getitems__([2, 0])["labels"].tolist() == [IGNORED]
    with pytest.raises(UserError, match=r"None of the images to train on can be read, such as image 1\."):
        training.__getitems__([1])


def test_workers_report_what_they_found_broken() -> None:
    images = _images(4)
    sources = [*images.sources[:3], "/no/such/file.png"]
    broken = LabelledImages(sources=sources, labels=images.labels, names=images.names)
    batches = ImageBatches(broken, training_transform(CFG), mean=CFG["mean"], std=CFG["std"], seed=0)
    sizes = [len(batch["labels"]) for batch in DataLoader(batches, batch_size=2, num_workers=1, collate_fn=as_is)]
    assert sizes == [2, 1]
    assert batches.unreadable() == ["image 3"]


@pytest.mark.parametrize("crop", ["padded", "resized"])
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_training_crops_have_the_models_size(crop: str, size: tuple[int, int]) -> None:
    transform = training_transform({**CFG, "input_size": (3, *size)}, crop=crop, color_jitter=0.3)
    batches = ImageBatches(_images(size=20), transform, mean=CFG["mean"], std=CFG["std"], seed=0)
    assert batches.__getitems__([0, 1])["pixel_values"].shape == (2, 3, *size)


def test_a_grey_model_gets_one_channel() -> None:
    cfg = {**CFG, "input_size": (1, 8, 8), "mean": (0.5,), "std": (0.2,)}
    batches = ImageBatches(_images(), training_transform(cfg), mean=cfg["mean"], std=cfg["std"], seed=0)
    assert batches.__getitems__([0, 1])["pixel_values"].shape == (2, 1, 8, 8)


def test_strong_augmentation_survives_every_image() -> None:
    # A policy that timm draws with all bits posterised away.
    transform = training_transform(CFG, auto_augment="rand-m10-n8-inc1")
    batches = ImageBatches(_images(60), transform, mean=CFG["mean"], std=CFG["std"], seed=0)
    assert len(batches.__getitems__(range(60))["labels"]) == 60


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UserError, match="auto_augment is 'nonsense'"):
        training_transform(CFG, auto_augment="nonsense")


def test_a_padded_crop_shifts_each_side_by_an_eighth_of_it() -> None:
    (shift,) = [
        step
        for step in training_transform({**CFG, "input_size": (3, 8, 32)}, crop="padded").transforms
        if type(step).__name__ == "RandomCrop"
    ]
    assert (shift.size, shift.padding) == ((8, 32), (4, 1))


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1", "original", "3a", "augmix-m5-w3"])
def test_colours_are_jittered_beside_any_policy(policy: str | None) -> None:
    steps = training_transform(CFG, color_jitter=0.3, auto_augment=policy).transforms
    (jitter,) = [step for step in steps if type(step).__name__ == "ColorJitter"]
    assert jitter.brightness == (0.7, 1.3)
    steps = training_transform(CFG, auto_augment=policy).transforms
    assert "ColorJitter" not in [type(step).__name__ for step in steps]


def test_settings_of_the_augmentation_arrive() -> None:
    steps = {type(step).__name__: step for step in training_transform(CFG, crop_scale=0.4, hflip=0.125).transforms}
    assert steps["RandomHorizontalFlip"].p == 0.125
    assert steps["RandomResizedCropAndInterpolation"].scale == (0.4, 1.0)
