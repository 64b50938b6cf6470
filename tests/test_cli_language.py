"""The command line's language commands as their users meet them."""

import json
from pathlib import Path

import pytest

from allmlp.cli import main
from tests.data.texts import labelled, write_table, write_text

TINY = [
    *("--model", "gmlp_nano", "--model-args", "{num_hidden_layers: 1, hidden_size: 16, intermediate_size: 32}"),
    *("--context", "16", "--max-steps", "20", "--batch-size", "8", "--lr", "1e-2", "--precision", "fp32"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    data = write_text(folder / "text.txt")
    assert main(["train", data, *TINY, "--tokenizer", "characters", "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_text_is_learnt_where_the_model_reads_text(run, capsys) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["task"] == "text-generation"
    assert "task: text-generation" in (run / "recipe.yaml").read_text()
    assert main(["train", str(run.parent / "text.txt"), *TINY, "--output", str(run)]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_evaluate_answers_in_text_and_json(run, capsys) -> None:
    assert main(["evaluate", str(run)]) == 0
    assert "tokens predicted, perplexity" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--stride", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] > 0
    assert main(["evaluate", str(run), "--stride", "17"]) == 1
    assert "allmlp: the stride must be from 1 to the context of 16, got 17" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--img-size", "32", "--strict"]) == 1
    assert "holds a model of text: leave --img-size and --strict out" in capsys.readouterr().err
    assert main(["predict", str(run), "--text", "line"]) == 1
    assert "holds a model for text-generation; it tells no classes" in capsys.readouterr().err


def test_generate_writes_behind_each_prompt(run, capsys) -> None:
    command = ["generate", str(run), "--prompt", "line", "--max-new-tokens", "5", "--temperature", "0"]
    assert main([*command, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert main([*command, "--prompt", "fox"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("line" + entry["text"])
    assert "\n\nfox" in out
    assert main([*command[:4], "--max-new-tokens", "99", "--temperature", "0"]) == 0
    assert "warning: generation stops at the model's context of 16 tokens" in capsys.readouterr().err
    found = []
    for seed in ("1", "2", "3"):
        assert main([*command[:6], "--beams", "3", "--seed", seed]) == 0
        found.append(capsys.readouterr().out)
    assert len(set(found)) == 1
    assert main(["generate", str(run), "--prompt", "€"]) == 1
    assert capsys.readouterr().err.startswith("allmlp: The model in")


def test_tasks_are_chosen_and_told(tmp_path, capsys) -> None:
    data = write_table(tmp_path / "rows.csv", labelled())
    run = tmp_path / "run"
    assert main(["train", data, "--task", "text-classification", *TINY, "--output", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "text-classification"
    assert main(["evaluate", str(run)]) == 0
    assert "plants" in capsys.readouterr().out
    assert main(["predict", str(run), data]) == 1
    assert "rows.csv is a table, not a text" in capsys.readouterr().err
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert main(["predict", str(run), str(tmp_path / "b.txt"), "--text", "oak elm ivy", "--top-k", "1"]) == 0
    answer = capsys.readouterr()
    assert answer.out.startswith("oak elm ivy  ")
    assert "warning: left out 1 of 2" in answer.err
    assert main(["predict", str(run), "--text", "oak", "--img-size", "8"]) == 1
    assert "holds a model of text: leave --img-size out" in capsys.readouterr().err
    # The run's own task goes on.
    assert main(["train", data, "--from", str(run), "--max-steps", "1", "--output", str(tmp_path / "next")]) == 0
    assert "task: text-classification" in (tmp_path / "next/recipe.yaml").read_text()


def test_hyper_parameters_of_another_task_are_refused(tmp_path, capsys) -> None:
    data = write_text(tmp_path / "text.txt")
    assert main(["train", data, *TINY, "--crop", "padded", "--output", str(tmp_path / "run")]) == 1
    assert "sets 'crop', which text-generation does not know" in capsys.readouterr().err


def test_help_tells_defaults_task_by_task(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert "(default:0.2forimage-classification;0.1fortext-generation,fill-mask,text-classification)" in shown
    assert "--mask-share" in shown
