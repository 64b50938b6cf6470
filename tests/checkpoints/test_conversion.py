"""Every recorded original, and what is common to all sources."""

import json
import logging
import random
import re

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import allmlp
from allmlp.checkpoints import MissingFacts, conversion, run_directory
from allmlp.checkpoints.conversion import LAYOUTS, SOURCES, convert_checkpoint, convert_state_dict, write_run_directory
from allmlp.data.tokenization import make_tokenizer
from allmlp.errors import UserError
from tests.checkpoints import originals, parity
from tests.checkpoints.parity import GOLDEN, Case
from tests.tolerances import PARITY

CASES = [path.parent.name for path in sorted(GOLDEN.glob("*/case.json"))]


@pytest.mark.parametrize("name", CASES)
def test_no_weights_are_drawn_to_be_replaced(name: str) -> None:
    case = parity.golden(GOLDEN / name)
    before = torch.get_rng_state()
    found = case.convert()
    assert torch.equal(torch.get_rng_state(), before)
    found.architecture.build()
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_original_is_matched(name: str) -> None:
    case = parity.golden(GOLDEN / name)
    found, deviations = parity.deviations(case)
    assert found.layout.source == case.source
    for dtype, deviation in deviations.items():
        assert deviation <= PARITY[dtype], f"{deviation:.1e} in {dtype}"


def test_every_layout_is_measured_and_documented() -> None:
    measured: dict[str, list[float]] = {}
    for case in parity.cases():
        found, deviations = parity.deviations(case)
        measured.setdefault(parity.cells(found.layout), []).extend(deviations.values())
    rows = [line.strip("| ").rsplit(" | ", 2) for line in parity.documented()[2:]]
    assert [cells for cells, *_ in rows] == [parity.cells(layout) for layout in LAYOUTS]
    assert measured.keys() == {cells for cells, *_ in rows}
    for cells, *figures in rows:
        for dtype, figure in zip((torch.float64, torch.float32), figures, strict=True):
            assert float(figure) <= PARITY[dtype], cells


@pytest.fixture
def language() -> dict[str, torch.Tensor]:
    return originals.lucidrains_language(causal=True).model.state_dict()


FACTS = {"causal": True, "gate_act": None}


class TestFacts:
    def test_what_is_missing_is_listed_by_name(self, language: dict[str, torch.Tensor]) -> None:
        with pytest.raises(MissingFacts, match="causal and gate_act") as caught:
            convert_state_dict(language)
        assert caught.value.names == ("causal", "gate_act")
        with pytest.raises(MissingFacts) as caught:
            convert_state_dict(language, facts={"causal": True})
        assert caught.value.names == ("gate_act",)

    def test_a_missing_fact_names_the_file(self) -> None:
        path = GOLDEN / "lucidrains_masked_lm" / "checkpoint.pth"
        with pytest.raises(MissingFacts, match="lucidrains_masked_lm") as caught:
            allmlp.convert(path)
        assert caught.value.names == ("causal", "gate_act")

    def test_one_that_the_source_does_not_have_is_refused(self, language: dict[str, torch.Tensor]) -> None:
        with pytest.raises(UserError, match=r"no shift_size; what can be given is causal, gate_act, shift_tokens"):
            convert_state_dict(language, facts={**FACTS, "shift_size": 5})
        with pytest.raises(UserError, match="no causal; nothing has to be given"):
            allmlp.convert(GOLDEN / "jaketae_hidden_states" / "checkpoint.pth", causal=True)

    @pytest.mark.parametrize(
        ("fact", "value"),
        [("causal", "yes"), ("gate_act", "tnh"), ("gate_act", {}), ("shift_tokens", -1), ("shift_tokens", True)],
    )
    def test_a_value_that_makes_no_sense_is_refused(
        self, language: dict[str, torch.Tensor], fact: str, value: object
    ) -> None:
        with pytest.raises(UserError, match=rf"{fact} is {value!r}; it should be"):
            convert_state_dict(language, facts={**FACTS, fact: value})


class TestRecognition:
    def test_prefixes_of_wrapping_modules_are_taken_off(self, language: dict[str, torch.Tensor]) -> None:
        wrapped = {f"module.net.{name}": tensor for name, tensor in language.items()}
        assert convert_state_dict(wrapped, facts=FACTS).layout.source == "lucidrains"

    def test_one_prefix_too_many_is_not_taken_off(self) -> None:
        weights = torch.load(GOLDEN / "jaketae_image" / "checkpoint.pth")
        assert "model.0.norm.weight" in weights
        assert convert_state_dict({f"model.{name}": weights[name] for name in weights}).layout.source == "jaketae"

    def test_a_source_that_is_named_is_checked(self, language: dict[str, torch.Tensor]) -> None:
        assert convert_state_dict(language, "lucidrains", FACTS).layout.source == "lucidrains"
        assert convert_checkpoint(GOLDEN / "as_mlp_shift5" / "checkpoint.pth", "as_mlp").layout.source == "as-mlp"
        with pytest.raises(UserError, match="no checkpoint of timm: its weights have the names of lucidrains"):
            convert_state_dict(language, "timm", FACTS)
        with pytest.raises(UserError, match=r"no source 'lucidrain', only timm, .*Did you mean 'lucidrains'"):
            convert_state_dict(language, "lucidrain", FACTS)
        with pytest.raises(UserError, match="no source '3', only timm"):
            convert_state_dict(language, 3, FACTS)  # type: ignore[arg-type]

    def test_other_weights_are_refused_with_what_is_known(self) -> None:
        with pytest.raises(UserError, match=", ".join(SOURCES)):
            convert_state_dict({"conv1.weight": torch.zeros(2, 2)})

    @pytest.mark.parametrize("name", CASES)
    def test_one_layout_alone_claims_a_checkpoint(self, name: str) -> None:
        contents = conversion.read_checkpoint(next((GOLDEN / name).glob("checkpoint.*")))
        tensors = conversion.unwrap(contents, LAYOUTS).tensors
        assert sum(layout.recognises(tensors) for layout in LAYOUTS) == 1


class TestEveryTensorCounts:
    def test_one_too_many_is_named(self, language: dict[str, torch.Tensor]) -> None:
        with pytest.raises(UserError, match=r"1 not used by the architecture: layers\.1\.gamma"):
            convert_state_dict({**language, "layers.1.gamma": torch.zeros(8)}, facts=FACTS)

    def test_one_too_few_is_named(self, language: dict[str, torch.Tensor]) -> None:
        del language["to_logits.1.bias"]
        with pytest.raises(UserError, match=r"1 missing: lm_head\.bias"):
            convert_state_dict(language, facts=FACTS)
        del language["to_logits.0.bias"], language["to_logits.0.weight"]
        with pytest.raises(UserError, match=r"1 missing: to_logits\.0"):
            convert_state_dict(language, facts=FACTS)

    def test_a_block_too_few_is_named(self, language: dict[str, torch.Tensor]) -> None:
        weights = originals.timm_gmlp(depth=3).model.state_dict()
        with pytest.raises(UserError, match=r"'blocks\.1' are missing"):
            convert_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.")})

    def test_a_shape_that_fits_nothing_is_named(self, language: dict[str, torch.Tensor]) -> None:
        name = "layers.1.fn.fn.fn.proj_out.weight"
        with pytest.raises(UserError, match=r"model\.layers\.1\.proj_out\.weight \[8, 15\] instead of \[8, 16\]"):
            convert_state_dict({**language, name: language[name][:, :-1]}, facts=FACTS)

    def test_a_transposed_weight_is_not_taken(self, language: dict[str, torch.Tensor]) -> None:
        name = "layers.0.fn.fn.fn.proj_out.weight"
        with pytest.raises(UserError, match=r"of another shape"):
            convert_state_dict({**language, name: language[name].T}, facts=FACTS)


def damaged(weights: dict[str, torch.Tensor], name: str, damage: str) -> dict[str, torch.Tensor]:
    """The weights with one of them missing, misnamed or misshapen."""
    if damage == "renamed":
        return {key if key != name else key.replace("0", "7") + "x": tensor for key, tensor in weights.items()}
    tensor = weights[name]
    shapes = {
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0, 4),
        "vector": torch.zeros(5),
        "five": torch.zeros(2, 3, 2, 3, 2),
        "short": tensor[:-1],
        "long": torch.cat([tensor, tensor]),
    }
    rest = {key: value for key, value in weights.items() if key != name}
    return rest if damage == "missing" else {**rest, name: shapes[damage]}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("damage", ["missing", "renamed", "scalar", "empty", "vector", "five", "short", "long"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(name: str, damage: str) -> None:
    facts = json.loads((GOLDEN / name / "case.json").read_text())["facts"]
    if name.startswith("as_mlp"):
        facts = {"shift_size": 5}
    (path,) = (GOLDEN / name).glob("checkpoint.*")
    weights = conversion.unwrap(conversion.read_checkpoint(path), LAYOUTS).tensors
    # What a version does not use or does not have, and vocabularies of any size.
    free = re.compile(r"sgu\.proj|circulant|positional|embed\.weight|^0\.weight")
    for weight in random.Random(name + damage).sample([key for key in sorted(weights) if not free.search(key)], 4):
        with pytest.raises(UserError):
            convert_state_dict(damaged(weights, weight, damage), facts=facts)


class TestResult:
    @pytest.mark.parametrize(
        ("given", "result"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_weights_keep_all_their_digits(self, given: torch.dtype, result: torch.dtype) -> None:
        weights = {name: tensor.to(given) for name, tensor in originals.timm_gmlp().model.state_dict().items()}
        model = convert_state_dict(weights).model
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {result}
        assert torch.equal(model.head.weight, weights["head.weight"].to(result))

    def test_notes_are_said(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            allmlp.convert(GOLDEN / "lucidrains_masked_lm" / "checkpoint.pth", causal=False, gate_act="none")
        assert "shift_tokens is not stored; 0 is assumed." in caplog.text


def loaded_again(case: Case, directory: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a conversion and of the run directory it was written to."""
    found = case.convert()
    write_run_directory(found, directory)
    before = parity.output_of(found.model, case.input)
    if hasattr(found.model.config if hasattr(found.model, "config") else None, "is_decoder"):
        return before, parity.output_of(AutoModelForCausalLM.from_pretrained(directory).eval(), case.input)
    return before, parity.output_of(allmlp.load(directory), case.input)


class TestRunDirectory:
    @pytest.mark.parametrize("name", ["vip_small7", "as_mlp_shift5", "google_mixer", "lucidrains_causal_lm"])
    def test_it_gives_the_model_back(self, name: str, tmp_path) -> None:
        before, after = loaded_again(parity.golden(GOLDEN / name), str(tmp_path / "run"))
        assert torch.equal(before, after)

    @pytest.mark.parametrize("name", ["vip_small7", "as_mlp_shift5", "google_mixer", "deit_resmlp", "timm_gmlp"])
    def test_it_loads_at_another_size(self, name: str, tmp_path) -> None:
        found = parity.golden(GOLDEN / name).convert()
        write_run_directory(found, tmp_path / "run")
        patch_size = found.model.stem.patch_size
        size = 4 * patch_size[0], 6 * patch_size[1]
        loaded = allmlp.load(tmp_path / "run", img_size=size)
        found.model.set_input_size(size)
        torch.testing.assert_close(loaded.state_dict(), found.model.state_dict(), rtol=0, atol=0)
        assert loaded(torch.randn(1, 3, *size)).shape == (1, found.model.num_classes)

    def test_images_are_prepared_as_the_source_does(self, tmp_path) -> None:
        write_run_directory(parity.golden(GOLDEN / "timm_gmlp").convert(), tmp_path / "run", classes=list("abcdefghi"))
        model = allmlp.load(tmp_path / "run")
        assert tuple(model.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
        assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
        assert model.pretrained_cfg["label_names"] == list("abcdefghi")

    def test_a_run_is_not_overwritten_by_accident(self, tmp_path) -> None:
        found = parity.golden(GOLDEN / "timm_gmlp").convert()
        write_run_directory(found, tmp_path / "run")
        with pytest.raises(UserError, match="holds a run already"):
            write_run_directory(found, tmp_path / "run")
        write_run_directory(found, tmp_path / "run", overwrite=True)

    def test_weights_alone_are_not_replaced_unasked(self, tmp_path) -> None:
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(b"a user's own")
        found = parity.golden(GOLDEN / "timm_gmlp").convert()
        with pytest.raises(UserError, match=r"holds a run already: model\.safetensors\. Choose another --output"):
            write_run_directory(found, tmp_path)
        assert weights.read_bytes() == b"a user's own"
        assert list(tmp_path.iterdir()) == [weights]

    def test_averages_of_a_former_run_are_not_loaded_for_the_new_one(self, tmp_path) -> None:
        found = parity.golden(GOLDEN / "timm_gmlp").convert()
        write_run_directory(found, tmp_path)
        former = load_file(tmp_path / "model.safetensors")
        save_file({name: tensor + 1 for name, tensor in former.items()}, tmp_path / "ema.safetensors")
        assert torch.equal(allmlp.load(tmp_path).head.weight, former["head.weight"] + 1)
        write_run_directory(found, tmp_path, overwrite=True)
        assert torch.equal(allmlp.load(tmp_path).head.weight, former["head.weight"])

    @pytest.mark.parametrize("former", ["checkpoint-7", "recipe.yaml"])
    def test_a_training_that_has_not_ended_is_a_run(self, tmp_path, former: str) -> None:
        (tmp_path / former).mkdir()
        found = parity.golden(GOLDEN / "timm_gmlp").convert()
        with pytest.raises(UserError, match="holds a run already"):
            write_run_directory(found, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [former]

    def test_what_lies_beside_no_run_stays(self, tmp_path) -> None:
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "thesis.tex").touch()
        write_run_directory(parity.golden(GOLDEN / "timm_gmlp").convert(), tmp_path, overwrite=True)
        assert (tmp_path / "report" / "thesis.tex").exists()

    def test_a_former_tokenizer_does_not_serve_the_new_model(self, tmp_path) -> None:
        found = parity.golden(GOLDEN / "lucidrains_causal_lm").convert()
        write_run_directory(found, tmp_path / "run", tokenizer=make_tokenizer("bytes", []))
        assert (tmp_path / "run" / "tokenizer.json").exists()
        write_run_directory(found, tmp_path / "run", overwrite=True)
        written = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert written == ["config.json", "generation_config.json", "model.safetensors"]
        write_run_directory(parity.golden(GOLDEN / "timm_gmlp").convert(), tmp_path / "run", overwrite=True)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]

    @pytest.mark.parametrize("causal", [True, False])
    def test_a_model_ends_texts_as_its_tokenizer_does(self, causal: bool, tmp_path) -> None:
        weights = originals.lucidrains_language(causal=causal, num_tokens=258).model.state_dict()
        tokenizer = make_tokenizer("bytes", [])
        end = tokenizer.eos_token_id
        assert end is not None
        found = convert_state_dict(weights, facts={**FACTS, "causal": causal})
        write_run_directory(found, tmp_path / "run", tokenizer=tokenizer)
        for file in ["config.json", *(["generation_config.json"] if causal else [])]:
            written = json.loads((tmp_path / "run" / file).read_text())
            assert (written["pad_token_id"], written["eos_token_id"]) == (end, end), file
        model = allmlp.load(tmp_path / "run")
        assert model.config.eos_token_id == end
        if causal:
            with torch.no_grad():
                # From now on it says nothing else.
                model.lm_head.bias[end] += 1e4
            written = model.generate(torch.tensor([list(b"ab")]), max_new_tokens=5, do_sample=False)
            assert written.tolist() == [[*b"ab", end]]

    @pytest.mark.parametrize("name", ["timm_gmlp", "lucidrains_causal_lm"])
    def test_without_room_the_former_run_stays(self, tmp_path, monkeypatch, name) -> None:
        found = parity.golden(GOLDEN / name).convert()
        write_run_directory(found, tmp_path / "run")
        (tmp_path / "run" / "metrics.json").write_text("{}")
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

        def no_room(*arguments: object, **settings: object) -> None:
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")

        with monkeypatch.context() as patched:
            patched.setattr(run_directory, "save_file", no_room)
            patched.setattr(type(found.model), "save_pretrained", no_room, raising=False)
            with pytest.raises(UserError, match=r"run cannot be written to: .*No space left"):
                write_run_directory(found, tmp_path / "run", overwrite=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
        write_run_directory(found, tmp_path / "run", overwrite=True)
        assert not (tmp_path / "run" / "metrics.json").exists()

    def test_names_have_to_fit(self, tmp_path) -> None:
        with pytest.raises(UserError, match="9 classes, but there are 2 names"):
            write_run_directory(parity.golden(GOLDEN / "timm_gmlp").convert(), tmp_path / "run", classes=["a", "b"])
        with pytest.raises(UserError, match="One of the classes' names is blank"):
            write_run_directory(
                parity.golden(GOLDEN / "timm_gmlp").convert(), tmp_path / "run", classes=[*"abcdefgh", " "]
            )
        language = parity.golden(GOLDEN / "lucidrains_causal_lm").convert()
        for classes in (["a"], []):
            with pytest.raises(UserError, match="no classes to be named"):
                write_run_directory(language, tmp_path / "run", classes=classes)
        with pytest.raises(UserError, match="9 classes, but there are 0 names"):
            write_run_directory(parity.golden(GOLDEN / "timm_gmlp").convert(), tmp_path / "run", classes=[])
        assert not (tmp_path / "run").exists()

    def test_names_may_stand_for_several_classes(self, tmp_path, caplog) -> None:
        found = parity.golden(GOLDEN / "timm_gmlp").convert()
        write_run_directory(found, tmp_path / "run", classes=["crane", *"bcdefgh", "crane"])
        assert "more than one class is called crane" in caplog.text
        assert allmlp.load(tmp_path / "run").pretrained_cfg["label_names"].count("crane") == 2

    def test_a_model_without_head_is_kept(self, tmp_path) -> None:
        weights = {n: t for n, t in originals.timm_gmlp().model.state_dict().items() if not n.startswith("head.")}
        found = convert_state_dict(weights)
        write_run_directory(found, tmp_path / "run")
        x = torch.randn(1, 3, 6, 6)
        assert torch.equal(allmlp.load(tmp_path / "run")(x), found.model(x))
        assert found.model(x).shape == (1, 8)

    def test_timm_builds_it_from_the_configuration(self, tmp_path) -> None:
        found = parity.golden(GOLDEN / "vip_small7").convert()
        write_run_directory(found, tmp_path / "run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
        assert {n: t.shape for n, t in model.state_dict().items()} == {
            n: t.shape for n, t in found.model.state_dict().items()
        }


def test_a_trainer_s_file_is_read_whole(tmp_path) -> None:
    weights = originals.timm_resmlp().model.state_dict()
    average = {f"module.{name}": tensor + 1 for name, tensor in weights.items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 3, "state_dict": weights, "state_dict_ema": average, "optimizer": {"state": {}}}, path)
    found = convert_checkpoint(path)
    assert torch.equal(found.model.head.weight, weights["head.weight"] + 1)
    assert found.notes == (
        "The averaged weights under 'state_dict_ema.module' are taken, not 'state_dict'.",
        "Left aside: 'epoch', 'optimizer'.",
        "img_size is not stored; 6×6 pixels is assumed.",
        "act_layer is not stored; gelu is assumed.",
        "How images were prepared is not stored; mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225) are assumed.",
    )


def test_weights_out_of_a_run_say_that_it_knows_more(tmp_path) -> None:
    run = tmp_path / "run"
    write_run_directory(convert_state_dict(originals.timm_mixer().model.state_dict()), run)
    assumed = "How images were prepared is not stored; mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5) are assumed."
    for path in (run / "model.safetensors", run):
        *_, note = convert_checkpoint(path).notes
        assert note.startswith(f"{assumed} {run} is a run directory, which says how: use it")
    (tmp_path / "apart").mkdir()
    apart = (run / "model.safetensors").rename(tmp_path / "apart" / "model.safetensors")
    assert convert_checkpoint(apart).notes[-1] == assumed
    # Another project's.
    (apart.parent / "config.json").write_text('{"architecture": "mixer_b16_224"}')
    assert convert_checkpoint(apart).notes[-1] == assumed
