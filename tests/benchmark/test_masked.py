"""benchmarks/masked.py in short."""

from allmlp.data.text import load_text
from tests.scripts import script

benchmark = script("masked")


def test_a_masked_model_learns_and_is_measured(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 60, encoding="utf-8")
    data = load_text(str(text), tokenizer_name="characters")
    learnt = benchmark.learn(benchmark.models(data.tokenizer)["gMLP"], data, lr=1e-3, steps=1)
    assert [step for step, _ in learnt["curve"]] == [1]
    assert 0 < learnt["nats"] < 10
