"""The models inside transformers, which wraps timm's: saved, loaded, in a pipeline, as a backbone."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    pipeline,
)

from tests.vision.nano import NANO

LABELS = ["cat", "dog", "owl"]


@pytest.fixture(params=NANO)
def name(request) -> str:
    return request.param


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def saved(name, tmp_path) -> tuple[torch.nn.Module, str]:
    """A model saved as transformers saves timm's, at another size than its own."""
    model = timm.create_model(name, num_classes=3, img_size=24).eval()
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": name,
            "model_args": {"img_size": 24},
            "num_classes": 3,
            "label_names": LABELS,
            "pretrained_cfg": {**model.pretrained_cfg, "label_names": None},
        }
    )
    wrapped = TimmWrapperForImageClassification(config)
    wrapped.timm_model.load_state_dict(model.state_dict())
    wrapped.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path)
    return model, str(tmp_path)


def test_saved_model_classifies_as_before(saved) -> None:
    model, directory = saved
    loaded = AutoModelForImageClassification.from_pretrained(directory)
    assert isinstance(loaded, TimmWrapperForImageClassification)
    assert loaded.supports_gradient_checkpointing
    assert loaded.config.id2label == dict(enumerate(LABELS))
    x = torch.randn(2, 3, 24, 24)
    out = loaded(x, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.logits, model(x), rtol=0, atol=0)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 2])))


def test_pipeline_answers_with_labels(saved, image) -> None:
    model, directory = saved
    answers = pipeline("image-classification", model=directory)(image)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    expected = model(transform(image)[None])[0].softmax(0)
    assert {answer["label"] for answer in answers} == set(LABELS)
    for answer in answers:
        assert answer["score"] == pytest.approx(expected[LABELS.index(answer["label"])].item(), abs=1e-5)


def test_hidden_states_are_the_feature_levels(saved) -> None:
    model, directory = saved
    x = torch.randn(2, 3, 24, 24)
    out = AutoModelForImageClassification.from_pretrained(directory)(x, output_hidden_states=True)
    for state, expected in zip(out.hidden_states, model.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_model_without_head_gives_features(saved) -> None:
    model, directory = saved
    x = torch.randn(2, 3, 24, 24)
    out = AutoModel.from_pretrained(directory)(x)
    torch.testing.assert_close(out.last_hidden_state, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(out.pooler_output, model.forward_features(x).mean((1, 2)))


def test_backbone(name) -> None:
    backbone = AutoBackbone.from_config(TimmBackboneConfig(backbone=name, use_pretrained_backbone=False))
    maps = backbone(torch.randn(1, 3, 32, 32)).feature_maps
    assert [y.shape[1] for y in maps] == list(backbone.channels)
