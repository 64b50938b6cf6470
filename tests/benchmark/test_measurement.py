"""A measurement from a setting to the file, the table and the page."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from g_mlp_pytorch import gMLP

from allmlp.benchmark import (
    FLOOR,
    OURS,
    Result,
    Setting,
    checkouts,
    example,
    machine,
    measure,
    peers,
    peers_of,
    read_results,
    result_table,
    settings,
    write_page,
    write_results,
)
from allmlp.benchmark.measurement import compare
from allmlp.errors import UserError
from allmlp.language.configuration import VARIANTS
from allmlp.timing import time_in_turn

NANO = "gmlp_nano_patch4_32"


@pytest.mark.parametrize("task", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_network_and_floor(task: str, dtype: str) -> None:
    ours, floor = measure(Setting(model=NANO, task=task, dtype=dtype, batch_size=2), rounds=2)
    assert (ours.contender, floor.contender) == (OURS, FLOOR)
    assert ours.ratio == 1
    assert 0 < floor.ratio < 1
    assert ours.milliseconds > 0
    assert ours.peak_bytes > 0
    assert (ours.kept_bytes is not None) == (task == "training")


def test_every_compiled_network_runs_compiled(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """All networks have one `forward`, which torch compiles so often and then runs as it is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for dtype in ("float32", "bfloat16"):
            measure(Setting(model=NANO, dtype=dtype, batch_size=2, compiled=True), rounds=1)


def test_peer_with_the_same_weights() -> None:
    results = measure(Setting(model="resmlp_12_patch16_224", batch_size=1), rounds=1)
    assert [result.contender for result in results] == [OURS, FLOOR, "timm"]
    assert results[2].difference < 1e-10


@pytest.mark.parametrize("task", ["inference", "training"])
def test_text(task: str, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    def build() -> gMLP:
        return gMLP(num_tokens=64, dim=128, depth=8, seq_len=64, attn_dim=32, causal=True)

    monkeypatch.setitem(VARIANTS["amlp_nano"], "vocab_size", 64)
    (base,) = peers_of("amlp_base")
    monkeypatch.setattr(peers, "PEERS", [replace(base, model="amlp_nano", build=build)])
    results = measure(Setting(model="amlp_nano", task=task, batch_size=1), rounds=1)
    assert [result.contender for result in results] == [OURS, FLOOR, "g-mlp-pytorch"]
    assert results[2].difference < 1e-10
    if task == "training":
        assert results[0].kept_bytes < 0.75 * results[2].kept_bytes


def test_text_without_a_peer() -> None:
    ours, floor = measure(Setting(model="gmlp_nano", batch_size=1), rounds=1)
    assert (ours.contender, floor.contender) == (OURS, FLOOR)


def test_different_networks_are_not_timed() -> None:
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="the networks differ"):
        compare(timm.create_model(NANO).eval(), timm.create_model(NANO).eval(), example(NANO, 1))


def test_missing_peers_are_named() -> None:
    reasons: list[str] = []
    measure(Setting(model="vip_small_patch7_224", batch_size=1), rounds=1, skipped=reasons.append)
    assert reasons == ["VisionPermutator needs a checkout of its repository: --peer-path VisionPermutator=DIRECTORY"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"ASMLP": "."}, "no peer 'ASMLP' is measured from a checkout. Did you mean 'AS-MLP'"),
        ({"AS-MLP": "nowhere"}, "the checkout of AS-MLP is no directory: nowhere"),
    ],
)
def test_wrong_checkouts(named: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checkouts(named)


def test_a_directory_that_is_no_checkout(tmp_path: Path) -> None:
    setting = Setting(model="asmlp_tiny_patch4_224", batch_size=1)
    reasons: list[str] = []
    measure(setting, peer_paths={"AS-MLP": tmp_path}, rounds=1, skipped=reasons.append)
    assert reasons == [f"{tmp_path} is no checkout of AS-MLP: it has no models/as_mlp.py"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            Setting(model="nothing"),
            "There is no model 'nothing'; `allmlp models` lists them",
        ),
        (Setting(model=NANO, dtype="int8"), "dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_wrong_settings(setting: Setting, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(setting)


def test_all_combinations() -> None:
    found = settings(["a", "b"], tasks=["inference"], dtypes=["float32", "bfloat16"], batch_sizes=[1, 32])
    assert len(set(found)) == len(found) == 8


def _results() -> list[Result]:
    setting = Setting(model="vip_small_patch7_224", task="training", batch_size=8)
    return [
        Result(setting=setting, contender=OURS, milliseconds=100.0, ratio=1.0, peak_bytes=5, kept_bytes=60),
        Result(setting=setting, contender=FLOOR, milliseconds=80.0, ratio=0.8),
        Result(setting=setting, contender="peer", milliseconds=150.0, ratio=1.5, peak_bytes=9, kept_bytes=100),
    ]


def test_results_survive_the_file(tmp_path: Path) -> None:
    write_results(tmp_path / "sub" / "r.json", _results(), machine())
    results, facts = read_results(tmp_path / "sub" / "r.json")
    assert results == _results()
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": {}, "results": [{"model": "m", "x": 1}]}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match="no file of benchmark results"):
        read_results(tmp_path / "r.json")


def test_table() -> None:
    heading, row = result_table(_results())
    assert dict(zip(heading, row, strict=True)) == {
        "model": "vip_small_patch7_224",
        "setting": "training, float32, batch 8",
        "allmlp ms": "100.0",
        "over floor": "1.25",
        "peer": "peer",
        "peer / allmlp": "1.50",
        "memory / peer's": "0.60 kept",
    }


def test_page_is_written_between_its_lines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- benchmark eager -->\nold\n<!-- end eager -->\nafter\n")
    write_page(page, "eager", _results(), machine())
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark eager -->\n\n| model |")
    assert text.endswith("<!-- end eager -->\nafter\n")
    assert "old" not in text
    assert "| 1.50 | 0.60 kept |" in text
    assert (tmp_path / "speed_eager.svg").read_text().count("1.50×") == 1
    with pytest.raises(UserError, match="has no lines"):
        write_page(page, "engines", _results(), machine())


def test_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("allmlp.timing.time.perf_counter", lambda: clock[0])
    # What a call in front of the timed one takes does not matter.
    speed = iter([1.0, 1.0, *(5.0, 1.0) * 2, *(5.0, 10.0) * 2, *(5.0, 1.0) * 2])

    def takes(seconds: float):
        def run() -> None:
            clock[0] += seconds * next(speed)

        return run

    times = time_in_turn({"a": takes(1.0), "b": takes(3.0)}, rounds=3, warmup=1)
    assert times["a"].ratio == 1
    assert times["b"].ratio == pytest.approx(3)
    assert times["b"].milliseconds == pytest.approx(3000)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from allmlp.cli import main

    file = tmp_path / "r.json"
    assert main(["benchmark", NANO, "--batch-size", "1", "2", "--rounds", "1", "--output", str(file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(result["contender"], result["batch_size"]) for result in answer["results"]] == [
        (OURS, 1),
        (FLOOR, 1),
        (OURS, 2),
        (FLOOR, 2),
    ]
    assert len(read_results(file)[0]) == 4
    other = tmp_path / "other.json"
    assert main(["benchmark", NANO, "nothing", "--output", str(other)]) == 1
    assert not other.exists()
    assert main(["benchmark", "resnet18"]) == 1
    with pytest.raises(SystemExit):
        main(["benchmark", NANO, "--rounds", "0"])
    with pytest.raises(SystemExit):
        main(["benchmark", NANO, "--batch-size", "many"])
    assert "must be a whole number from 1 on, got 'many'" in capsys.readouterr().err


def test_results_are_not_lost_with_their_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that cannot be written is said before anything is measured; a disk that fills up costs the file alone."""
    from allmlp.cli import main

    measured: list[Setting] = []

    def measure(setting: Setting, **_: object) -> list[Result]:
        measured.append(setting)
        return [Result(setting=setting, contender=OURS, milliseconds=1.0, ratio=1.0)]

    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("allmlp.benchmark.measure", measure)
    assert main(["benchmark", NANO, "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip() == f"allmlp: Is a directory: {tmp_path}"
    assert not measured
    monkeypatch.setattr("allmlp.benchmark.write_results", full)
    assert main(["benchmark", NANO, "--output", str(tmp_path / "r.json")]) == 1
    out, err = capsys.readouterr()
    assert NANO in out
    assert err.strip() == f"allmlp: No space left on device: {tmp_path / 'r.json'}"
