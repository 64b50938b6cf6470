import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from allmlp.errors import UserError
from allmlp.language import GMLPConfig, GMLPForMaskedLM
from allmlp.language.configuration import VARIANTS

# Table 4 of the paper and its appendix, in millions.
PUBLISHED = {"gmlp_base": 130, "gmlp_large": 365, "gmlp_xlarge": 941, "amlp_base": 109, "amlp_large": 316}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_named_sizes_have_the_published_parameters(name, millions) -> None:
    with torch.device("meta"):
        model = GMLPForMaskedLM(GMLPConfig.named(name))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.01)


def test_every_variant_is_a_valid_configuration() -> None:
    for name in VARIANTS:
        assert GMLPConfig.named(name, num_hidden_layers=1).num_hidden_layers == 1


def test_defaults_are_the_papers_block() -> None:
    config = GMLPConfig()
    assert (config.hidden_act, config.gate_act, config.layer_norm_eps) == ("gelu", None, 1e-5)
    assert (config.position_embedding, config.token_shift, config.embedding_scale) == ("none", 0, 1.0)
    assert config.tie_word_embeddings
    assert not config.is_decoder


def test_auto_config_reads_what_was_saved(tmp_path) -> None:
    config = GMLPConfig.named("amlp_base", token_shift=1, gate_act="tanh", id2label={0: "no", 1: "yes", 2: "maybe"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GMLPConfig
    loaded.name_or_path = ""
    assert loaded.to_dict() == config.to_dict()


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no language model 'gmlp_bas'. Did you mean 'gmlp_base'"):
        GMLPConfig.named("gmlp_bas")
    with pytest.raises(UserError, match=r"has no field 'num_heads'. Did you mean 'num_spatial_heads'"):
        GMLPConfig.named("gmlp_base", num_heads=4)
    assert GMLPConfig.named("gmlp_base", num_labels=3).num_labels == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size must be at least 1, got 0"),
        ("token_shift", -1, "token_shift must be at least 0, got -1"),
        ("token_shift", 512, "token_shift must be below hidden_size, 512, got 512"),
        ("intermediate_size", 7, "must be even to be split in halves, got 7"),
        ("num_spatial_heads", 5, "must divide the gate's 1536 channels, got 5"),
        ("initializer_range", -0.1, "initializer_range must be at least 0"),
        ("layer_norm_eps", 0.0, "layer_norm_eps above 0, got 0.02 and 0.0"),
        ("survival_probability", 0, "must be above 0 and at most 1, got 0"),
        ("hidden_dropout", 1, "must be at least 0 and below 1, got 1"),
        ("gate_act", "tanhh", r"gate_act is 'tanhh', which transformers does not know. Did you mean 'tanh'"),
    ],
)
def test_bad_values_are_refused(field, value, message) -> None:
    with pytest.raises(UserError, match=message):
        GMLPConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("spatial_weight", "circulant"), ("hidden_size", "512")])
def test_bad_types_are_refused_by_transformers(field, value) -> None:
    with pytest.raises(StrictDataclassError, match=field):
        GMLPConfig(**{field: value})
