"""Run directories as strangers send them: configurations that would load other things, or claim more than there is."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import allmlp
from allmlp.checkpoints import run_directory
from allmlp.checkpoints.conversion import convert_state_dict
from allmlp.checkpoints.description import CONFIG_BYTES, at_most, check_model_args
from allmlp.data.tokenization import load_tokenizer
from allmlp.errors import UserError
from allmlp.language import GMLPForCausalLM
from tests.checkpoints.parity import GOLDEN
from tests.language.tiny import tiny_config

SMALL = {"num_blocks": 1, "embed_dim": 8, "img_size": 8}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **SMALL)
    wrapped = run_directory.classifier(model, "gmlp_nano_patch4_32", SMALL, ["a", "b", "c"])
    run_directory.save_classifier(wrapped, tmp_path)
    return tmp_path


@pytest.fixture
def language(tmp_path: Path) -> Path:
    run_directory.save_language(tmp_path, GMLPForCausalLM(tiny_config()))
    return tmp_path


def change(run: Path, part: str | None = None, **changes: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    (config if part is None else config[part]).update(changes)
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name",
    ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict"],
)
def test_a_configuration_has_timm_load_nothing(images: Path, name: str) -> None:
    change(images, "model_args", **{name: str(images / "other.pth")})
    with pytest.raises(UserError, match=rf"{images} .*'{name}' is no argument of an architecture"):
        allmlp.load(images)


def test_what_a_configuration_has_transformers_load_is_left_out(language: Path) -> None:
    before = allmlp.load(language).state_dict()
    change(
        language,
        auto_map={"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"},
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
    )
    (language / "code.py").write_text("raise SystemExit('run')")
    torch.testing.assert_close(allmlp.load(language).state_dict(), before, rtol=0, atol=0)


# PEFT asks transformers for this under its former name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_applied_where_it_is_asked_for_alone(language: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = torch.tensor([[1, 2, 3]])
    before = allmlp.load(language)(ids).logits
    settings = LoraConfig(r=2, target_modules=["proj_in"], init_lora_weights=False)
    adapted = get_peft_model(allmlp.load(language), settings).eval()
    expected = adapted(ids).logits
    assert not torch.allclose(expected, before)
    # As a stranger may send it.
    adapted.save_pretrained(language)
    with pytest.raises(UserError, match=rf"{language} holds an adapter .*\(adapter_config\.json\).*PeftModel"):
        allmlp.load(language)
    apart = language / "adapter"
    apart.mkdir()
    for path in list(language.glob("adapter_*")):
        path.rename(apart / path.name)
    assert torch.equal(allmlp.load(language)(ids).logits, before)
    asked_for = PeftModel.from_pretrained(allmlp.load(language), str(apart)).eval()
    assert torch.equal(asked_for(ids).logits, expected)


def test_weights_that_are_no_safetensors_are_not_looked_for(language: Path) -> None:
    (language / "model.safetensors").rename(language / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        allmlp.load(language)


def test_code_that_a_tokenizer_names_is_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gmlp"}))
    with pytest.raises(UserError, match=r"is no tokenizer.*custom code"):
        load_tokenizer(tmp_path)
    assert not mark.exists()


class TestClaims:
    """More than a machine has would be taken if it were not refused at once."""

    @pytest.fixture(autouse=True)
    def _quick(self) -> Any:
        start = time.process_time()
        yield
        assert time.process_time() - start < 5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"embed_dim": 2**18}, "do not match the model"),
            ({"num_blocks": 2**20}, "more than [0-9,]+ weights"),
            ({"num_blocks": 2**40}, "numbers may be 1,048,576 at most"),
            ({"img_size": 2**20}, "do not match the model|cannot be made"),
        ],
    )
    def test_of_an_image_classifier(self, images: Path, arguments: dict[str, int], message: str) -> None:
        change(images, "model_args", **arguments)
        with pytest.raises(UserError, match=message):
            allmlp.load(images)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": 2**20, "intermediate_size": 2**20}, "do not match the model"),
            ({"max_position_embeddings": 2**30}, "do not match the model"),
            ({"num_hidden_layers": 2**40}, "more than [0-9,]+ weights"),
        ],
    )
    def test_of_a_language_model(self, language: Path, changes: dict[str, int], message: str) -> None:
        change(language, **changes)
        with pytest.raises(UserError, match=message):
            allmlp.load(language)

    def test_of_a_checkpoint(self) -> None:
        weights = torch.load(GOLDEN / "jaketae_hidden_states" / "checkpoint.pth")
        weights["embed.weight"] = torch.zeros(2, 2**20)
        weights["model.0.channel_proj1.weight"] = torch.zeros(2**20, 2)
        with pytest.raises(UserError, match="do not match the model"):
            convert_state_dict(weights)

    def test_of_a_number_in_a_name(self) -> None:
        weights = torch.load(GOLDEN / "jaketae_hidden_states" / "checkpoint.pth")
        weights |= {f"model.{10**12}.norm.weight": torch.ones(2), f"model.{'9' * 5000}.norm.bias": torch.ones(2)}
        with pytest.raises(UserError, match="are missing"):
            convert_state_dict(weights)

    def test_of_toeplitz_weights(self) -> None:
        weights = torch.load(GOLDEN / "lucidrains_0_1_4_toeplitz_lm" / "checkpoint.pth")
        for name in [name for name in weights if ".sgu." in name and "norm" not in name]:
            weights[name] = torch.zeros(1, 2**20)
        with pytest.raises(UserError, match=r"1,048,576 positions; multiplied out"):
            convert_state_dict(weights, None, {"causal": True, "gate_act": "none"})


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"num_classes": "3"}, "num_classes is '3'; it must be a whole number"),
        (None, {"label_names": ["a"]}, "1 label_names for 3 classes"),
        (None, {"label_names": 3}, "label_names is 3"),
        (None, {"architecture": 1}, "architecture is 1; it must be a model's name"),
        (None, {"architecture": "hf-hub:someone/model"}, "There is no model 'hf-hub:someone/model'"),
        (None, {"architectures": 5}, "architectures is 5"),
        (None, {"pretrained_cfg": None}, "pretrained_cfg is None"),
        ("pretrained_cfg", {"input_size": [3, 10**6, 10**6]}, "input_size is .*each from 1 to 8192"),
        ("pretrained_cfg", {"crop_pct": 1e-9}, "crop_pct is 1e-09; it must be a share from 0.1 to 1"),
        ("pretrained_cfg", {"std": [0, 1, 1]}, "cannot be 0"),
        ("pretrained_cfg", {"mean": [0.5]}, "mean has 1 numbers for 3 channels"),
        ("pretrained_cfg", {"mean": [float("nan")] * 3}, "it must be a list of numbers"),
        ("pretrained_cfg", {"interpolation": "best"}, "it must be one of nearest"),
    ],
)
def test_entries_that_make_no_sense_are_named(
    images: Path, part: str | None, changes: dict[str, Any], message: str
) -> None:
    change(images, part, **changes)
    with pytest.raises(UserError, match=message) as caught:
        allmlp.load(images)
    assert str(images) in str(caught.value)


def test_classes_of_texts_are_numbered(language: Path) -> None:
    change(language, id2label={"0": "a", "2": "b"})
    with pytest.raises(UserError, match=r"config\.json: id2label is .*names by number, from 0 on"):
        allmlp.load(language)


def test_files_that_are_no_configuration(images: Path) -> None:
    (images / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        allmlp.load(images)
    (images / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        allmlp.load(images)
    (images / "config.json").write_text(" " * (CONFIG_BYTES + 1))
    with pytest.raises(UserError, match=r"config\.json is no configuration: it has more than 16,777,216 bytes"):
        allmlp.load(images)


def test_arguments_of_an_architecture_are_taken() -> None:
    check_model_args({"img_size": (224, 192), "drop_path_rate": 0.1, "global_pool": "", "mlp_ratio": 4})


def test_weights_are_counted_while_they_are_made() -> None:
    with at_most(4):
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="more than 3 weights"), at_most(3):
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(9)))


def test_what_other_threads_make_is_not_counted() -> None:
    made = []
    with at_most(1):
        thread = threading.Thread(target=lambda: made.append(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))))
        thread.start()
        thread.join()
    assert made
