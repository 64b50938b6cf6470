"""Parameter and multiply-add counts of every registered model, against published.toml."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from allmlp.catalogue import ModelCard, is_language, layer_table, list_models
from allmlp.language.configuration import VARIANTS
from tests import models_page

CARDS = list_models()


def printed(figure: str) -> tuple[float, float]:
    """A figure as a paper prints it ("4.4G"), and half a unit of its last digit."""
    digits, scale = figure[:-1], {"M": 1e6, "G": 1e9}[figure[-1]]
    decimals = len(digits.partition(".")[2])
    return float(digits) * scale, 0.5 * 10**-decimals * scale


def test_the_catalogue_lists_exactly_the_registered_models():
    registered = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("allmlp.")}
    assert {card.name for card in CARDS if not is_language(card.name)} == registered
    assert {card.name for card in CARDS if is_language(card.name)} == VARIANTS.keys()
    assert len(CARDS) == len(registered) + len(VARIANTS)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_counts(card: ModelCard):
    table = layer_table(card.name)
    assert table.parameters == card.parameters
    assert table.macs == card.macs
    if card.published_parameters:
        value, rounding = printed(card.published_parameters)
        assert abs(card.parameters - value) <= 0.01 * value + rounding
    if card.published_macs:
        value, rounding = printed(card.published_macs)
        assert abs(card.macs - value) <= 0.03 * value + rounding
    if card.name.endswith("_32"):
        assert card.parameters <= 700_000


# Counts that the original code gives to the last digit.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gmlp_tiny_patch16_224", 5_867_328),
        ("gmlp_small_patch16_224", 19_422_656),
        ("gmlp_base_patch16_224", 73_075_392),
        ("mixer_small_patch16_224", 18_528_264),
        ("mixer_small_patch32_224", 19_104_624),
        ("mixer_base_patch16_224", 59_880_472),
        ("mixer_base_patch32_224", 60_293_428),
        ("mixer_large_patch16_224", 208_196_168),
        ("mixer_large_patch32_224", 206_939_264),
        ("mixer_huge_patch14_224", 432_350_952),
        ("resmlp_12_patch16_224", 15_350_872),
        ("resmlp_24_patch16_224", 30_020_680),
        ("resmlp_36_patch16_224", 44_690_488),
        ("vip_medium_patch7_224", 55_272_488),
    ],
)
def test_exact_parameter_counts(name: str, parameters: int):
    assert next(card for card in CARDS if card.name == name).parameters == parameters


def test_layer_table_of_the_one_layer_gmlp():
    """The model of the field's best-known walk-through: its torchsummary table, row for row."""
    table = layer_table("gmlp_small_patch16_224", 256, num_blocks=1, mlp_ratio=4, final_norm=False)
    assert [(row.type, row.output, row.parameters) for row in table.rows] == [
        ("Conv2d", (256, 16, 16), 196_864),
        ("LayerNorm", (256, 256), 512),
        ("Linear", (256, 1024), 263_168),
        ("LayerNorm", (256, 512), 1_024),
        ("SpatialGatingUnit", (256, 512), 65_792),
        ("Linear", (256, 256), 131_328),
        ("Linear", (1000,), 257_000),
    ]
    assert table.parameters == 915_688
    assert "915,688" in str(table).splitlines()[-1]


@pytest.mark.parametrize("name", ["volo_d1_224", "coat_lite_mini", "crossvit_9_240"])
def test_all_work_of_a_model_is_counted_once(name: str):
    """Blocks in lists that are not called, layers called from several places, outputs that are lists."""
    table = layer_table(name)
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.empty(1, *table.input))
    assert table.macs == counter.get_total_flops() // 2
    assert min(row.macs for row in table.rows) >= 0


def test_layer_table_at_another_size():
    assert layer_table("vit_tiny_patch16_224", 256).input == (3, 256, 256)
    assert layer_table("gmlp_small_patch16_224", 256).input == (3, 256, 256)
    assert layer_table("asmlp_tiny_patch4_224", (160, 224)).input == (3, 160, 224)


def test_layer_table_of_a_language_model():
    table = layer_table("gmlp_nano", vocab_size=100, max_position_embeddings=32)
    assert table.input == (32,)
    assert table.rows[0].type == "Embedding"
    assert table.rows[-1].output == (32, 100)
    # The head is the embedding.
    assert (table.rows[-1].parameters, table.rows[-1].macs) == (0, 32 * 128 * 100)
    with pytest.raises(ValueError, match="a language model has no image size"):
        layer_table("gmlp_nano", 64)


def test_layer_table_of_a_size_no_patch_grid_fits():
    with pytest.raises(ValueError, match="nearest sizes are 240×240 and 256×256"):
        layer_table("gmlp_small_patch16_224", 250)


def test_patterns():
    assert [card.name for card in list_models("vip_*14*")] == ["vip_small_patch14_224"]
    assert list_models("nothing_*") == []


def test_the_models_page_is_the_catalogue():
    assert models_page.PAGE.read_text(encoding="utf-8") == models_page.page()
