"""Language training from recipe to run directory, and what a run directory knows."""

import functools
import gc
import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

import allmlp
from allmlp import training
from allmlp.checkpoints import pretrained, run_directory
from allmlp.data.text_stream import Place, TokenStream
from allmlp.data.tokenization import make_tokenizer
from allmlp.errors import Interrupted, UserError
from allmlp.language import GMLPForCausalLM, GMLPForMaskedLM, GMLPForSequenceClassification
from allmlp.training import language_evaluation
from allmlp.training.callbacks import Interruption
from allmlp.training.engine import Engine
from allmlp.training.language import build_model, parameter_groups, planned_config
from allmlp.training.language_evaluation import evaluate, generate, predict
from allmlp.training.language_report import evaluation_text
from allmlp.training.recipe import RECIPES, Recipe, make_recipe
from tests.data.texts import TEXT, labelled, write_table, write_text
from tests.language.tiny import tiny_model

SETTINGS: dict[str, Any] = {
    "model": "gmlp_nano",
    "model_args": {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48},
    "context": 16,
    "max_steps": 60,
    "batch_size": 16,
    "lr": 1e-2,
    "log_every": 10,
    "eval_every": 30,
    "precision": "fp32",
}


def recipe(folder: Path, task: str = "text-generation", **settings: Any) -> Recipe:
    data = settings.pop("data", None) or write_text(folder / "text.txt")
    return make_recipe({**SETTINGS, "data": data, **settings}, RECIPES[task])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run of a causal model, and its metrics."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    return folder / "run", training.train(recipe(folder, tokenizer="characters"), folder / "run")


def test_a_causal_run_learns_and_says_how_much(written) -> None:
    run, metrics = written
    assert metrics["nats_per_token"] < 1.5 < math.log(30)
    assert metrics["nats_per_character"] == pytest.approx(metrics["nats_per_token"])
    assert metrics["bits_per_byte"] == pytest.approx(metrics["nats_per_byte"] / math.log(2))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nats_per_token"]))
    assert metrics["predicted"] == metrics["tokens"] - 1
    assert (metrics["steps"], metrics["unit"]) == (60, "tokens")
    assert [entry["step"] for entry in metrics["history"] if "eval_loss" in entry] == [30, 60]
    assert metrics["history"][-1]["eval_loss"] == pytest.approx(metrics["nats_per_token"], rel=0.02)
    assert json.loads((run / "metrics.json").read_text()) == metrics
    for name in ("config.json", "model.safetensors", "recipe.yaml", "tokenizer.json", *metrics["report"]):
        assert (run / name).stat().st_size > 0
    assert "nats" in training.summary(metrics, run)


def test_evaluation_asks_the_model_for_logits_alone(tmp_path, monkeypatch) -> None:
    """Its own loss of all windows at once would take several times their memory, and a cache be of no use."""
    forward, given = GMLPForCausalLM.forward, []

    @functools.wraps(forward)
    def watched(self: GMLPForCausalLM, *arguments: Any, **named: Any) -> Any:
        if not self.training:
            given.append(named)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(GMLPForCausalLM, "forward", watched)
    training.train(recipe(tmp_path, max_steps=2, eval_every=1), tmp_path / "run")
    assert len(given) > 2
    # Samples of the report are written with a cache, which is asked for.
    assert not any("labels" in named or "use_cache" not in named for named in given)


def test_a_run_directory_loads_everywhere(written) -> None:
    run = written[0]
    models = [allmlp.load(run), AutoModelForCausalLM.from_pretrained(run), allmlp.load(run / "checkpoint-60")]
    assert AutoTokenizer.from_pretrained(run).model_max_length == 16
    ids = AutoTokenizer.from_pretrained(run)("line 1", return_tensors="pt").input_ids
    logits = [model.eval()(ids).logits for model in models]
    assert all(model.config.use_cache for model in models)
    assert all(type(model) is GMLPForCausalLM and not model.training for model in models)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    text = pipeline("text-generation", model=str(run), device="cpu")("line 1", max_new_tokens=5, do_sample=False)
    assert text[0]["generated_text"].startswith("line 1")


def test_a_checkpoint_is_a_run_too(written, tmp_path) -> None:
    run = written[0]
    checkpoint = str(run / "checkpoint-60")
    assert evaluate(checkpoint)["nats_per_token"] == evaluate(str(run))["nats_per_token"]
    settings = {"max_new_tokens": 5, "seed": 1}
    assert generate(checkpoint, ["line"], **settings) == generate(str(run), ["line"], **settings)
    assert (run / "checkpoint-60/tokenizer.json").read_text() == (run / "tokenizer.json").read_text()
    go_on = recipe(tmp_path, model=None, model_args={}, start_from=checkpoint, max_steps=1)
    assert training.train(go_on, tmp_path / "again")["steps"] == 1


def test_a_checkpoint_has_the_weights_that_were_evaluated(tmp_path) -> None:
    metrics = training.train(recipe(tmp_path, ema=0.9, max_steps=4, eval_every=4), tmp_path / "run")
    found = evaluate(str(tmp_path / "run/checkpoint-4"))
    assert found["nats_per_token"] == pytest.approx(metrics["nats_per_token"], rel=1e-6)
    averaged, last = (
        allmlp.load(tmp_path / "run/checkpoint-4"),
        load_file(tmp_path / "run/checkpoint-4/model.safetensors"),
    )
    assert torch.equal(averaged.lm_head.weight, averaged.model.embed_tokens.weight)
    assert not torch.equal(averaged.model.norm.weight, last["model.norm.weight"])


def test_other_tokens_are_no_way_on(written, tmp_path) -> None:
    shutil.copytree(written[0], tmp_path / "run")
    # As many characters as before, one of them another.
    other = write_text(tmp_path / "other.txt", TEXT.replace("q", "ß"))
    settings = {"tokenizer": "characters", "data": other, "max_steps": 70}
    with pytest.raises(UserError, match=r"The tokens of .*checkpoint-60 are others than those of the data: '[qß]' is"):
        training.train(recipe(tmp_path, **settings), tmp_path / "run", resume=True)


def test_evaluation_gives_the_runs_own_score(written, tmp_path) -> None:
    run, metrics = written
    found = evaluate(str(run))
    assert found["part"] == "held out"
    for name in ("nats_per_token", "bits_per_character", "perplexity", "tokens"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-5)
    assert evaluate(str(run), batch_size=1)["nats_per_token"] == pytest.approx(found["nats_per_token"], rel=1e-5)
    closer = evaluate(str(run), stride=4)
    assert closer["predicted"] == found["predicted"]
    assert closer["nats_per_token"] < found["nats_per_token"]
    other = evaluate(str(run), write_text(tmp_path / "other.txt", TEXT[:3000] + "üü"))
    assert (other["part"], other["unknown"]) == ("all", 2)
    (tmp_path / "empty").mkdir()
    for name in "ab":
        write_text(tmp_path / "empty" / f"{name}.txt", "")
    assert "bits_per_character" not in evaluate(str(run), str(tmp_path / "empty"))
    assert "held out tokens predicted, perplexity" in evaluation_text(found)
    assert f"\n{other['predicted']:,} tokens predicted, perplexity" in evaluation_text(other)


def test_a_toeplitz_model_is_evaluated_in_the_trainings_windows(tmp_path) -> None:
    args = {**SETTINGS["model_args"], "spatial_weight": "toeplitz", "max_position_embeddings": 8}
    metrics = training.train(recipe(tmp_path, model_args=args, context=24, max_steps=2), tmp_path / "run")
    found = evaluate(str(tmp_path / "run"))
    assert found["context"] == 24
    assert found["nats_per_token"] == pytest.approx(metrics["nats_per_token"], rel=1e-5)


def test_generate_writes_what_a_seed_says(written) -> None:
    run = str(written[0])
    prompts = ["line 1", "the quick"]
    first = generate(run, prompts, max_new_tokens=6, seed=1)
    assert first == generate(run, prompts, max_new_tokens=6, seed=1)
    assert [entry["prompt"] for entry in first] == prompts
    assert all(1 <= entry["tokens"] <= 6 and entry["text"] for entry in first)
    for settings in ({"temperature": 0}, {"temperature": 1, "seed": 3}):
        alone = generate(run, prompts[:1], max_new_tokens=10, **settings)
        assert generate(run, prompts, max_new_tokens=10, **settings)[0] == alone[0]
    assert [entry["tokens"] for entry in generate(run, ["the quick", "t"], max_new_tokens=99, temperature=0)] == [7, 15]
    assert len(generate(run, ["line"], max_new_tokens=50, temperature=0)[0]["text"]) == 12
    longer = generate(run, ["line"], max_new_tokens=50, temperature=0, context_overflow="reprefill")
    assert len(longer[0]["text"]) == 50
    assert len(generate(run, ["line"], max_new_tokens=5, temperature=0, beams=3)[0]["text"]) == 5
    assert generate(run, ["line"], max_new_tokens=5, temperature=1, beams=3)[0]["tokens"] == 5


def test_generate_refuses_in_a_sentence(written) -> None:
    run = str(written[0])
    for prompts, settings, message in (
        (["line", ""], {}, "Prompt 2 is empty"),
        (["l€"], {}, "does not know '€' in the prompt 'l€'"),
        (["the quick brown fox"], {}, "the prompt has 19 tokens and leaves no room in the model's context of 16"),
        (["line"], {"temperature": -1.0}, "temperature and top_k must be at least 0"),
        (["line"], {"temperature": 1e-9}, "temperature must be 0 or at least 1e-6, got 1e-09"),
        (["line"], {"seed": -1}, "seed must be a whole number from 0"),
        (["\ud800"], {}, "The prompt .* is not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            generate(run, prompts, **settings)


def test_a_run_whose_tokenizer_neither_pads_nor_masks(written, tmp_path) -> None:
    run = shutil.copytree(written[0], tmp_path / "run")
    own = AutoTokenizer.from_pretrained(run)
    for ends in ({"eos_token": own.eos_token}, {}):
        for file in run.glob("*token*.json"):
            file.unlink()
        bare = PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer, unk_token=own.unk_token, **ends)
        bare.save_pretrained(run)
        assert bare.pad_token is None
        found = generate(str(run), ["line"], max_new_tokens=5, temperature=0)
        assert (found[0]["tokens"], len(found[0]["text"])) == (5, 5)
    settings = {"model": None, "model_args": {}, "start_from": str(run), "max_steps": 1}
    with pytest.raises(UserError, match=r"The tokenizer in .*/run has no mask token"):
        training.train(recipe(tmp_path, "fill-mask", **settings), tmp_path / "masked")
    data = write_table(tmp_path / "rows.csv", labelled())
    with pytest.raises(UserError, match="the tokenizer has neither padding nor an end of text"):
        training.train(recipe(tmp_path, "text-classification", data=data, **settings), tmp_path / "classes")


def test_a_masked_run_learns(tmp_path) -> None:
    settings = {"max_steps": 150, "tokenizer": "characters", "mask_share": 0.3, "batch_size": 32}
    metrics = training.train(recipe(tmp_path, "fill-mask", **settings), tmp_path / "run")
    assert metrics["nats_per_token"] < 2.4 < math.log(30)
    assert "nats_per_byte" not in metrics
    assert type(allmlp.load(tmp_path / "run")) is GMLPForMaskedLM
    found = evaluate(str(tmp_path / "run"))
    assert found["nats_per_token"] == pytest.approx(metrics["nats_per_token"], rel=1e-5)
    with pytest.raises(UserError, match="holds a model for fill-mask; it does not write text"):
        generate(str(tmp_path / "run"), ["a"])


@pytest.mark.parametrize("causal", [False, True])
def test_a_classifier_of_texts_learns(tmp_path, causal) -> None:
    data = write_table(tmp_path / "rows.parquet", labelled(80))
    sizes = {**SETTINGS["model_args"], "is_decoder": causal}
    settings = recipe(tmp_path, "text-classification", data=data, model_args=sizes, max_steps=40)
    metrics = training.train(settings, tmp_path / "run")
    assert metrics["accuracy"] > 0.9
    assert metrics["per_class"]["animals"]["texts"] == 4
    assert (tmp_path / "run/report/confusion.png").is_file()
    assert "accuracy" in training.summary(metrics, tmp_path / "run")
    model = allmlp.load(tmp_path / "run")
    assert type(model) is GMLPForSequenceClassification
    assert model.config.id2label == {0: "animals", 1: "plants"}
    classify = pipeline("text-classification", model=str(tmp_path / "run"), device="cpu")
    assert classify("oak elm ivy")[0]["label"] == "plants"
    found = evaluate(str(tmp_path / "run"))
    assert found["accuracy"] == metrics["accuracy"]
    assert "animals" in evaluation_text(found)
    (tmp_path / "a.txt").write_text("fox dog cat")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "lines.txt").write_bytes(b"oak\r\nelm\r\nivy")
    of_file, of_text = predict(str(tmp_path / "run"), [str(tmp_path / "lines.txt")], ["oak\r\nelm\r\nivy"])
    assert of_file["predictions"] == of_text["predictions"]
    (tmp_path / "lines.txt").unlink()
    with pytest.raises(UserError, match="tells classes of whole texts: leave --stride out"):
        evaluate(str(tmp_path / "run"), stride=3)
    told = predict(str(tmp_path / "run"), [str(tmp_path)], ["oak elm ivy", ""], top_k=1)
    assert [Path(entry["file"]).name for entry in told[:2]] == ["a.txt", "b.txt"]
    assert told[0]["predictions"][0]["label"] == "animals"
    assert told[1]["error"] == "not UTF-8"
    assert told[2]["text"] == "oak elm ivy"
    assert told[2]["predictions"][0]["label"] == "plants"
    assert told[2]["predictions"][0]["probability"] == pytest.approx(classify("oak elm ivy")[0]["score"], abs=1e-5)
    for files, texts, settings, message in (
        ([], [], {}, "Nothing to predict"),
        (["none.txt"], [], {}, "There is no file none.txt"),
        ([str(tmp_path / "run" / "report")], [], {}, "holds no .txt file"),
        ([str(tmp_path / "b.txt")], [], {"strict": True}, "b.txt is not UTF-8"),
        ([], ["\ud800"], {}, "is not UTF-8"),
        ([], ["a"], {"top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(UserError, match=message):
            predict(str(tmp_path / "run"), files, texts, **settings)
    named = dict(zip(("review", "subject"), labelled(80).values(), strict=True))
    elsewhere = write_table(tmp_path / "named.csv", named)
    columns = {"text_column": "review", "label_column": "subject"}
    assert evaluate(str(tmp_path / "run"), elsewhere, **columns)["accuracy"] > 0.9
    with pytest.raises(UserError, match="--label-column"):
        evaluate(str(tmp_path / "run"), elsewhere)
    write_table(tmp_path / "other.csv", {"text": ["a"] * 4, "label": ["stones", "plants"] * 2})
    with pytest.raises(UserError, match="has classes that the model does not know: stones"):
        evaluate(str(tmp_path / "run"), str(tmp_path / "other.csv"))


def test_fine_tuning_starts_from_the_weights_and_the_tokenizer(written, tmp_path) -> None:
    run, metrics = written
    former = load_file(run / "model.safetensors")
    go_on = recipe(tmp_path, model=None, model_args={}, start_from=str(run), max_steps=1, lr=1e-9, warmup=0.0)
    again = training.train(go_on, tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again/model.safetensors").items():
        torch.testing.assert_close(tensor, former[name], rtol=0, atol=1e-6)
    assert again["nats_per_token"] == pytest.approx(metrics["nats_per_token"], rel=1e-4)
    data = write_table(tmp_path / "rows.csv", labelled())
    settings = {"model": None, "model_args": {}, "start_from": str(run), "data": data, "max_steps": 1, "lr": 1e-9}
    training.train(recipe(tmp_path, "text-classification", **settings), tmp_path / "classes")
    tuned = load_file(tmp_path / "classes/model.safetensors")
    assert {name for name in tuned if name not in former} == {"score.weight", "score.bias"}
    torch.testing.assert_close(tuned["model.norm.weight"], former["model.norm.weight"], rtol=0, atol=1e-6)
    assert (tmp_path / "classes/tokenizer.json").read_text() == (run / "tokenizer.json").read_text()


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_the_model_to_start_from_is_gone_while_the_new_one_learns(written, tmp_path, monkeypatch, task) -> None:
    starts, gone = [], []

    def found(source: str) -> Any:
        start = find(source)
        starts.append(weakref.ref(start.model))
        return start

    def run(engine: Engine) -> Any:
        gc.collect()
        gone.extend(start() is None for start in starts)
        raise Interrupted("Seen.")

    find = pretrained.find_pretrained
    monkeypatch.setattr(pretrained, "find_pretrained", found)
    monkeypatch.setattr(Engine, "run", run)
    settings = {"model": None, "model_args": {}, "start_from": str(written[0]), "max_steps": 1}
    if task == "text-classification":
        settings["data"] = write_table(tmp_path / "rows.csv", labelled())
    with pytest.raises(Interrupted, match="Seen"):
        training.train(recipe(tmp_path, task, **settings), tmp_path / "run")
    assert gone == [True]


def test_a_stopped_training_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    whole = training.train(recipe(tmp_path, max_steps=20, eval_every=10), tmp_path / "whole")

    def stop_at_ten(self: Interruption, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 10:
            control.should_training_stop = True

    settings = recipe(tmp_path, max_steps=20, eval_every=10)
    with monkeypatch.context() as patched:
        patched.setattr(Interruption, "on_step_end", stop_at_ten)
        with pytest.raises(Interrupted, match=r"Stopped after step 10 of 20"):
            training.train(settings, tmp_path / "parts")
    deeper = recipe(tmp_path, max_steps=20, model_args={**SETTINGS["model_args"], "num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"weights of .*checkpoint-10 do not match the model.\n.*missing"):
        training.train(deeper, tmp_path / "parts", resume=True)
    rest = training.train(settings, tmp_path / "parts", resume=True)
    assert rest["nats_per_token"] == whole["nats_per_token"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_stream_goes_on_where_it_was(workers: int, tmp_path, monkeypatch) -> None:
    for split, first in (("train", 0), ("val", 40)):
        texts = [f"document {first + number} of them, {'x' * (number % 7)}" for number in range(40)]
        write_table(tmp_path / "shards" / f"{split}-0.parquet", {"text": texts})
    settings = {"data": str(tmp_path / "shards"), "streaming": True, "max_steps": 20, "eval_every": 10}
    settings |= {"batch_size": 2, "accumulate": 2, "workers": workers}
    whole = training.train(recipe(tmp_path, **settings), tmp_path / "whole")

    def stop_at_ten(self: Interruption, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 10:
            control.should_training_stop = True

    with monkeypatch.context() as patched:
        patched.setattr(Interruption, "on_step_end", stop_at_ten)
        with pytest.raises(Interrupted):
            training.train(recipe(tmp_path, **settings), tmp_path / "parts")
    places = json.loads((tmp_path / "parts/checkpoint-10/stream_0.json").read_text())
    assert [(reader, readers) for reader, readers, *_ in places] == [(i, max(workers, 1)) for i in range(len(places))]
    assert len(places) == max(workers, 1)
    given: list[list[Place]] = []
    go_on = TokenStream.go_on
    with monkeypatch.context() as patched:
        patched.setattr(TokenStream, "go_on", lambda self, *how: given.append(how) or go_on(self, *how))
        rest = training.train(recipe(tmp_path, **settings), tmp_path / "parts", resume=True)
    assert given == [(20, [Place(*place) for place in places])]
    assert rest["nats_per_token"] == whole["nats_per_token"]
    former, now = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(former[name], now[name]) for name in former)


def test_biases_and_norms_do_not_decay(tmp_path) -> None:
    settings = recipe(tmp_path, weight_decay=0.1)
    model = build_model(settings, planned_config(settings, None, make_tokenizer("bytes", [])), None)
    groups = parameter_groups(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    still = {names[id(parameter)] for parameter in groups[1]["params"]}
    assert all(name.endswith("bias") or "norm" in name for name in still)
    assert {"model.layers.0.sgu.bias", "model.layers.0.sgu.norm.weight", "model.norm.bias"} <= still
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_what_cannot_be_trained_is_refused(written, tmp_path) -> None:
    run = str(written[0])
    for settings, message in (
        ({"model": "gmlp_nanoo"}, "no language model 'gmlp_nanoo'. Did you mean 'gmlp_nano'"),
        ({"model": None}, "name a model, or a run directory to start from"),
        ({"model_args": {"num_spatial_heads": 5}}, "num_spatial_heads must divide the gate's 256 channels, got 5"),
        ({"model_args": {"hiden_size": 64}}, r"model_args sets 'hiden_size', .* Did you mean 'hidden_size'"),
        ({"model_args": {"output_hidden_states": True}}, "model_args sets 'output_hidden_states', which no model has"),
        ({"model_args": {"eos_token_id": 5}}, "model_args sets eos_token_id: that is what the tokenizer says"),
        ({"model_args": {"initializer_range": -1.0}}, "initializer_range must be at least 0"),
        ({"model": None, "start_from": run, "model_args": {"num_hidden_layers": 1}}, r"do not fit .* model.layers.1"),
        ({"model_args": {"hidden_size": "wide"}}, "The model cannot be made so: .*hidden_size"),
        ({"model_args": {"vocab_size": 100}}, "a vocabulary of 100, the tokenizer 258 tokens: leave vocab_size away"),
        ({"context": 100_000}, "the text has .* tokens, too few for windows of 100000"),
        ({"model": None, "start_from": run, "train_tokenizer": 300, "model_args": {}}, "a tokenizer trained anew"),
        ({"model": None, "start_from": run, "tokenizer": "bytes", "model_args": {}}, "bytes has 256 tokens, the model"),
        ({"model": None, "start_from": run, "context": 40, "model_args": {}}, "context of 40 tokens is longer than"),
        ({"start_from": run}, "has its own size: leave --model away"),
        ({"tokenizer": "./nothing"}, "is no tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            training.train(recipe(tmp_path, **{"max_steps": 1, **settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_that_do_not_fit_together_are_refused(written, tmp_path) -> None:
    run = written[0]
    copy = tmp_path / "copy"
    run_directory.save_language(copy, allmlp.load(run))
    with pytest.raises(UserError, match="has no tokenizer beside the model"):
        generate(str(copy), ["a"])
    make_tokenizer("bytes", []).save_pretrained(copy)
    with pytest.raises(UserError, match=r"has 258 tokens, the model a vocabulary of .*: they do not belong together"):
        evaluate(str(copy), write_text(tmp_path / "a.txt"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"do not match the model.\n.*missing"):
        allmlp.load(copy)
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        allmlp.load(copy)


def test_settings_of_drawing_arrive(written, monkeypatch) -> None:
    asked, draw = {}, GMLPForCausalLM.generate

    def generating(self: Any, *given: Any, **settings: Any) -> Any:
        asked.update(settings)
        return draw(self, *given, **settings)

    monkeypatch.setattr(GMLPForCausalLM, "generate", generating)
    generate(str(written[0]), ["line"], max_new_tokens=2, temperature=0.5, top_k=3, top_p=0.25)
    assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (0.5, 3, 0.25)


def test_tokens_that_stand_for_no_text_are_not_written(tmp_path) -> None:
    tokenizer = make_tokenizer("bytes", [])
    model = tiny_model(GMLPForCausalLM, vocab_size=258, tie_word_embeddings=False, lm_head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.mask_token_id] = 1e4
    run_directory.save_language(tmp_path, model, tokenizer)
    (found,) = generate(str(tmp_path), ["ab"], max_new_tokens=3, temperature=0)
    assert found["text"]
    assert "mask" not in found["text"]


def test_texts_are_measured_on_what_the_runs_own_seed_held_out(tmp_path, monkeypatch) -> None:
    data = write_table(tmp_path / "texts.csv", labelled())
    model = tiny_model(GMLPForSequenceClassification, vocab_size=258, id2label={0: "animals", 1: "plants"})
    run_directory.save_language(tmp_path / "run", model, make_tokenizer("bytes", []))
    settings = {"task": "text-classification", "data": data, "model": "gmlp_nano", "seed": 3, "holdout": 0.3}
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(settings))
    asked, load = {}, language_evaluation.load_labelled_texts
    monkeypatch.setattr(
        language_evaluation, "load_labelled_texts", lambda data, **given: asked.update(given) or load(data, **given)
    )
    evaluate(str(tmp_path / "run"))
    assert (asked["seed"], asked["holdout"]) == (3, 0.3)


def test_rates_reach_the_configuration() -> None:
    settings = make_recipe({"model": "gmlp_nano", "survival": 0.8, "dropout": 0.2}, RECIPES["text-generation"])
    config = planned_config(settings, None, make_tokenizer("bytes", []))
    assert (config.survival_probability, config.hidden_dropout) == (0.8, 0.2)
