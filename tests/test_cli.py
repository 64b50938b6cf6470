"""The command line as its users meet it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import allmlp
from allmlp import cli, training
from allmlp.checkpoints import conversion
from allmlp.cli import main
from allmlp.errors import Diverged, Interrupted, TrainingError
from allmlp.training import evaluation
from tests.checkpoints import originals
from tests.pictures import picture, write_classes

ROOT = Path(__file__).parents[1]
TINY = [
    *("--model", "gmlp_nano_patch4_32", "--model-args", "{num_blocks: 1, embed_dim: 16}", "--img-size", "8"),
    *("--epochs", "4", "--batch-size", "8", "--lr", "5e-3", "--crop", "padded", "--precision", "fp32"),
]


def _process(*arguments: str, **settings: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "allmlp", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
    )


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "from allmlp.cli import main\n"
        "for command in ([], ['train']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print({'torch', 'timm', 'transformers', 'numpy', 'datasets'} & set(sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.endswith("set()\n")
    for words in (
        "models",
        "evaluate",
        "--label-smoothing LABEL_SMOOTHING",
        "peak learning rate of AdamW (default: 0.001)",
    ):
        assert words in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_json_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a pipe on Windows, or in the C locale; what no encoding has is a file's name of other bytes."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    name = "\xd7-é-犬-\U0001f600-\udcff"
    monkeypatch.setattr(evaluation, "predict", lambda *arguments, **settings: [{"file": name, "classes": []}])
    monkeypatch.setattr(cli, "_reads_text", lambda options: False)
    assert main(["predict", "run", "picture.png", "--json"]) == 0
    stream.flush()
    assert json.loads(stream.buffer.getvalue().decode(encoding)) == [{"file": name, "classes": []}]


def test_a_process_without_output_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler may start it, with stdout closed."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["models", "gmlp_nano*"]) == 0


@pytest.mark.parametrize(
    "arguments",
    ["", "nonsense", "train", "train digits --schedule zigzag --output x", "info m --img-size a"],
)
def test_misuse_exits_with_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments.split())
    assert left.value.code == 2
    assert "usage: allmlp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "x.pth", "--output", ""], "--output: must name a directory, got an empty name"),
        (["train", "digits", "--output", " "], "--output: must name a directory, got an empty name"),
        (["convert", "", "--output", "y"], "CHECKPOINT: must name a checkpoint, got an empty name"),
        (["evaluate", "", "digits"], "RUN: must name a run directory, got an empty name"),
        (["predict", "", "x.png"], "RUN: must name a run directory, got an empty name"),
        (["generate", "", "--prompt", "x"], "RUN: must name a run directory, got an empty name"),
    ],
    ids=["convert to", "train to", "convert", "evaluate", "predict", "generate"],
)
def test_what_has_no_name_is_not_the_current_directory(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "vip_*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["model", "family", "parameters"]
    assert all(line.startswith("vip_") for line in lines[1:])
    assert main(["models", "vip_small_patch7_224", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert card["name"] == "vip_small_patch7_224"
    assert card["top1"] == 81.5
    assert main(["models", "transformer_*"]) == 1
    assert main(["models", "amlp_base"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:6] == [
        "amlp_base",
        "aMLP",
        "108.77M",
        "71.20G",
        "–",
        "3.95",
    ]


def test_info_shows_layers_at_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "gmlp_nano_patch4_32", "--img-size", "16x32"]) == 0
    assert "3 × 16 × 32" in capsys.readouterr().out
    assert main(["info", "gmlp_nano_patch4_32", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)
    assert layers["parameters"] == sum(row["parameters"] for row in layers["rows"]) == 602_090


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "gmpl_nano_patch4_32"], "Did you mean 'gmlp_nano_patch4_32'"),
        (["info", "gmlp_bsae"], "Did you mean 'gmlp_base'"),
        (["info", "gmlp_base", "--img-size", "32"], "gmlp_base cannot be made so: a language model has no image size"),
        (["info", "gmlp_nano_patch4_32", "--img-size", "33"], "the nearest sizes are 32×32 and 36×36"),
        (["train", "digits", "--output", "{tmp}/run", "--model", "gmpl_nano_patch4_32"], "Did you mean"),
        (["train", "{tmp}/none", "--output", "{tmp}/run", *TINY], "There is no file or folder"),
        (["train", "{tmp}", "--output", "{tmp}-run", *TINY], "is empty; images go into one folder per class"),
        (["train", "digits", "--output", "{tmp}/run", *TINY, "--lr", "fast"], "lr is 'fast'; it must be a number"),
        (["train", "digits", "--output", "{tmp}/run", "--recipe", "{tmp}/none.yaml"], "There is no recipe at"),
        (["train", "digits", "--output", "{tmp}/run", *TINY, "--img-size", "9"], "8×8 and 12×12"),
        (["train", "python-stdlib", "--output", "{tmp}/run", "--model", "gmlp_nanoo"], "Did you mean 'gmlp_nano'"),
        (["info", "mixer_nano_patch4_32.in1k"], "Invalid pretrained tag (in1k)"),
        (["info", "gmlp_small_patch16_224", "--img-size", "99999999904"], "gmlp_small_patch16_224 cannot be made so"),
        (["convert", "timm:mixer_b16_224", "--output", "{tmp}/run", "--set", "a=1"], "leave --source and --set out"),
        (["evaluate", "{tmp}", "digits"], "is no run directory: it has no config.json"),
        (["predict", "{tmp}/none", "a.png"], "There is no run directory"),
        (["evaluate", __file__, "digits"], "test_cli.py is a file, no run directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:50],
)
def test_bad_input_gets_one_message_and_exit_code_1(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert said.startswith("allmlp: ")


def test_train_evaluate_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = str(write_classes(tmp_path / "pictures", each=10)), str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text("lr: 1e-3\nlabel_smoothing: 0.1\n")
    assert (
        main(["train", data, "--output", run, *TINY, "--recipe", str(tmp_path / "recipe.yaml"), "--epochs", "6"]) == 0
    )
    answer = capsys.readouterr()
    assert "accuracy 100.00% on 6 held-out images" in answer.out
    assert f"run directory  {run}" in answer.out
    assert f"{run}/report/spatial_weights.png" in answer.out
    assert "epoch   6.0 of 6" in answer.err
    written = (Path(run) / "recipe.yaml").read_text()
    assert "lr: 0.005" in written, "a flag wins over the recipe"
    assert "label_smoothing: 0.1" in written

    assert main(["train", data, "--output", run, *TINY]) == 1
    assert "holds a run already" in capsys.readouterr().err

    assert main(["evaluate", run, data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    assert main(["evaluate", run]) == 0
    assert "(held out), 6 images\naccuracy 100.00%" in capsys.readouterr().out

    larger = ["--img-size", "16x12", "--patch-kernel", "8x6"]
    assert main(["evaluate", run, data, *larger, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    assert main(["evaluate", run, data, "--stride", "9"]) == 1
    assert "holds a model of images: leave --stride out" in capsys.readouterr().err
    assert main(["evaluate", run, data, "--img-size", "9"]) == 1
    assert "the nearest sizes are 8×8 and 12×12" in capsys.readouterr().err

    picture("green", 77).save(tmp_path / "new.png")
    (tmp_path / "broken.png").write_text("no image")
    files = [str(tmp_path / name) for name in ("new.png", "broken.png")]
    assert main(["predict", run, *files, "--top-k", "1", "--json"]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)[0]["predictions"][0]["label"] == "green"
    assert "warning: left out 1 of 2" in answer.err
    assert main(["predict", run, files[0], *larger, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["predictions"][0]["label"] == "green"
    assert main(["predict", run, *files, "--strict"]) == 1
    assert main(["predict", run, files[1]]) == 1
    assert main(["predict", run]) == 1
    assert main(["predict", run, files[0], "--text", "red"]) == 1

    more = str(tmp_path / "more")
    assert main(["train", data, "--output", more, "--from", run, "--epochs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_ctrl_c_leaves_a_checkpoint_that_resume_goes_on_from(tmp_path: Path) -> None:
    data, run = str(write_classes(tmp_path / "pictures", each=10)), tmp_path / "run"
    training = _process("train", data, "--output", str(run), *TINY, "--epochs", "100000", start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(training.pid, signal.SIGINT)
    _, said = training.communicate(timeout=120)
    assert training.returncode == 1
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("allmlp: Stopped after step ")
    assert f"go on with: allmlp train --resume --output {run}" in last
    step = int(last.split("step ")[1].split(" ")[0].replace(",", ""))
    assert (run / f"checkpoint-{step}" / "model.safetensors").is_file()

    epochs = str(step // 3 + 2)
    resumed = _process("train", "--resume", "--output", str(run), "--epochs", epochs, "--json")
    answer, said = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    assert f"going on from {run}/checkpoint-{step}" in said
    assert json.loads(answer)["epochs"] == int(epochs)


def test_whoever_stops_reading_gets_no_traceback() -> None:
    with _process("models") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


GOLDEN = ROOT / "tests" / "golden"


class TestConvert:
    def test_an_output_is_refused_before_anything_is_read(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read(path: object) -> Any:
            raise AssertionError("the checkpoint is read")

        monkeypatch.setattr(conversion, "read_checkpoint", read)
        checkpoint = tmp_path / "model.pth"
        checkpoint.touch()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").touch()
        for output, message in (("run", "holds a run already"), ("model.pth/run", "cannot be written to: ")):
            assert main(["convert", str(checkpoint), "--output", str(tmp_path / output)]) == 1
            assert message in capsys.readouterr().err
        for output in (["new/run"], ["run", "--overwrite"]):
            with pytest.raises(AssertionError, match="is read"):
                main(["convert", str(checkpoint), "--output", str(tmp_path / output[0]), *output[1:]])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "run"]
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]

    def test_an_image_model_becomes_a_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        checkpoint, run = str(GOLDEN / "deit_resmlp" / "checkpoint.pth"), str(tmp_path / "run")
        names = tmp_path / "names.txt"
        # As some editors save it, with a byte order mark.
        names.write_text("blue\ngreen\nred\n", encoding="utf-8-sig")
        assert main(["convert", checkpoint, "--output", run, "--classes", str(names)]) == 0
        assert json.loads((tmp_path / "run" / "config.json").read_text())["label_names"] == ["blue", "green", "red"]
        answer = capsys.readouterr().out
        assert "deit: ResMLP" in answer
        assert f"run directory  {run}" in answer
        pictures = write_classes(tmp_path / "pictures", each=2)
        assert main(["evaluate", run, str(pictures), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 6
        assert main(["predict", run, str(pictures), "--json"]) == 0
        labels = {each["label"] for entry in json.loads(capsys.readouterr().out) for each in entry["predictions"]}
        assert labels == {"blue", "green", "red"}
        assert main(["train", str(pictures), "--from", run, "--output", str(tmp_path / "more"), "--epochs", "1"]) == 0
        assert main(["convert", checkpoint, "--output", run]) == 1
        assert "holds a run already" in capsys.readouterr().err

    def test_an_empty_list_of_classes_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = tmp_path / "names.txt"
        names.touch()
        command = ["convert", str(GOLDEN / "deit_resmlp" / "checkpoint.pth"), "--output", str(tmp_path / "run")]
        assert main([*command, "--classes", str(names)]) == 1
        assert f"{names} is empty; it should name the model's classes" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_a_missing_fact_is_asked_for_and_taken(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = [
            "convert",
            str(GOLDEN / "lucidrains_causal_lm" / "checkpoint.pth"),
            "--output",
            str(tmp_path / "run"),
        ]
        assert main(command) == 1
        assert "does not store causal and gate_act" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert main([*command, "--set", "causal=true", "gate_act=none", "--set", "shift_tokens=0", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["model"] == "GMLPForCausalLM"
        assert answer["parameters"] == 34274
        assert answer["notes"] == []

    def test_a_language_model_of_bytes_becomes_a_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        original = originals.lucidrains_language(causal=True, num_tokens=256, seq_len=16).model
        torch.save({f"net.{name}": tensor for name, tensor in original.state_dict().items()}, tmp_path / "gmlp.pt")
        run, text = str(tmp_path / "run"), tmp_path / "text.txt"
        text.write_text("to be or not to be, " * 40)
        command = ["convert", str(tmp_path / "gmlp.pt"), "--output", run, "--set", "causal=true", "gate_act=none"]
        assert main([*command, "--tokenizer", "bytes"]) == 0
        assert main(["generate", run, "--prompt", "to be", "--max-new-tokens", "4", "--temperature", "0"]) == 0
        assert main(["evaluate", run, str(text)]) == 0
        capsys.readouterr()
        prompt = torch.tensor([list(b"to be or not")])
        with torch.no_grad():
            assert torch.allclose(allmlp.load(run)(prompt).logits, original.float()(prompt), atol=1e-4)
        more = ["train", str(text), "--from", run, "--output", str(tmp_path / "more"), "--max-steps", "1"]
        assert main([*more, "--batch-size", "2", "--precision", "fp32"]) == 0

    def test_a_source_is_checked(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        checkpoint = str(GOLDEN / "vip_small7" / "checkpoint.pth")
        command = ["convert", checkpoint, "--output", str(tmp_path / "run"), "--set", "img_size=56", "--source"]
        assert main([*command, "timm"]) == 1
        assert "no checkpoint of timm" in capsys.readouterr().err
        assert main([*command, "vip"]) == 0

    @pytest.mark.parametrize("fact", ["causal", "=true", "a=[1"])
    def test_a_fact_needs_a_name_and_a_value(self, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main(["convert", "x.pth", "--output", "y", "--set", fact])
        assert left.value.code == 2
        assert f"'{fact}'" in capsys.readouterr().err


def _two_processes(*program: str, restarts: int = 0) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, "--max-restarts", str(restarts), *program]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240, check=False)


# The second process is killed; after the restart every process writes down when it began.
FATEFUL = """
import os, signal, sys, time
from pathlib import Path

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
Path(sys.argv[1], f"began-{attempt}-{rank}").write_text(str(time.time()))
if (attempt, rank) == ("1", "0"):
    # The other one looks for it where it was before.
    time.sleep(3)

from allmlp.cli import main
from allmlp.training.callbacks import Progress

step_end = Progress.on_step_end

def fateful(self, args, state, control, **others):
    if (attempt, rank, state.global_step) == ("0", "1", 5):
        Path(sys.argv[1], "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    step_end(self, args, state, control, **others)

Progress.on_step_end = fateful
sys.exit(main(sys.argv[2:]))
"""


def test_two_processes_train_one_model_though_one_of_them_dies(tmp_path: Path) -> None:
    data, run = str(write_classes(tmp_path / "pictures", each=10)), tmp_path / "run"
    command = ["train", data, *TINY, "--batch-size", "4", "--ema", "0.9", "--output"]
    done = _two_processes("-m", "allmlp", *command, str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out images") == 1
    assert done.stderr.count("epoch   4.0 of 4") == 1
    assert json.loads((run / "metrics.json").read_text())["steps"] == 12
    assert len(list((run / "tensorboard").iterdir())) == 1

    (tmp_path / "fateful.py").write_text(FATEFUL)
    parts = tmp_path / "parts"
    done = _two_processes(str(tmp_path / "fateful.py"), str(tmp_path), *command, str(parts), restarts=1)
    assert done.returncode == 0, done.stderr
    assert f"allmlp: Lost process 1 of 0 to 1. {parts}/checkpoint-3 holds everything" in done.stderr
    assert f"going on from {parts}/checkpoint-3" in done.stderr
    killed, *began = (float((tmp_path / name).read_text()) for name in ("killed", "began-1-0", "began-1-1"))
    assert max(began) - killed < 60, "all processes have ended within a minute"
    weights = [load_file(place / "model.safetensors") for place in (run, parts)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Interrupted("Stopped.", by_scheduler=True), 0),
        (Interrupted("Stopped."), 1),
        (Diverged("No number."), 1),
        (TrainingError("No room."), 1),
    ],
    ids=["SIGTERM", "Ctrl-C", "diverged", "fault"],
)
def test_what_ends_a_training_is_told_once(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(training, "train", fail)
    command = ["train", "digits", "--model", "gmlp_nano_patch4_32", "--output", str(tmp_path)]
    assert main(command) == code
    assert capsys.readouterr().err == f"allmlp: {error}\n"
    monkeypatch.setenv("RANK", "1")
    assert main(command) == code
    assert capsys.readouterr().err == (f"allmlp: {error}\n" if type(error) is TrainingError else "")


def test_flags_win_over_a_recipe_and_a_recipe_over_the_runs_own(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: digits\nmodel: gmlp_nano_patch4_32\nlr: 0.1\nseed: 7\n")
    (tmp_path / "other.yaml").write_text("lr: 0.2\nepochs: 3\n")
    given = ["train", "--output", str(tmp_path), "--resume", "--recipe", str(tmp_path / "other.yaml"), "--epochs", "4"]
    recipe = cli._recipe(cli._parser().parse_args(given))
    assert (recipe.seed, recipe.lr, recipe.epochs) == (7, 0.2, 4)


def test_options_of_evaluate_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(cli, "_reads_text", lambda options: False)
    monkeypatch.setattr(evaluation, "accuracy_text", lambda found: "")
    monkeypatch.setattr(evaluation, "evaluate", lambda run, data, **given: asked.update(given) or {})
    flags = "--img-size 8 --patch-kernel 4 --batch-size 2 --strict --image-column a --label-column b"
    assert main(["evaluate", "run", "data", *flags.split()]) == 0
    sizes = {"img_size": 8, "patch_kernel": 4, "batch_size": 2}
    assert asked == {**sizes, "strict": True, "image_column": "a", "label_column": "b"}
