"""Files and arguments that nobody meant to be read: broken, cut, written over. A few of each, always the same.

`python benchmarks/fuzz.py` takes as many as there is time for.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allmlp.cli import main
from allmlp.training.recipe import RECIPES
from tests.fuzzing import TARGETS, changed_settings, mutations

# Those that go through a library's slow beginnings take fewer.
EXAMPLES = {"conversion": 50, "configuration": 30, "weights": 40, "csv": 5, "parquet": 8}


def _bounded(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_broken_file_is_read_or_refused_by_name(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    assert all(target.run(content) for content in seeds), "mutations start from files that can be read"

    @_bounded(EXAMPLES.get(name, 120))
    @given(mutations(seeds))
    def attempt(content: bytes) -> None:
        target.run(content)

    attempt()


@pytest.mark.parametrize("number", [0, 1], ids=["images", "language"])
def test_a_configuration_may_say_anything(number: int) -> None:
    valid = json.loads(TARGETS["configuration"].seeds()[number])

    @_bounded(40)
    @given(changed_settings(valid))
    def attempt(config: object) -> None:
        TARGETS["configuration"].run(json.dumps(config).encode())

    attempt()


@pytest.mark.parametrize("task", RECIPES)
def test_a_recipe_may_say_anything(task: str) -> None:
    valid = {"task": task, **dataclasses.asdict(RECIPES[task]())}

    @_bounded(60)
    @given(changed_settings(valid))
    def attempt(recipe: object) -> None:
        TARGETS["recipe"].run(yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "replace"))

    attempt()


NUMBERS = st.sampled_from(["0", "1", "-1", "3", "1e3", "nan", "9" * 30, "9" * 5000, "x", "", "²"])
WORDS = st.one_of(
    NUMBERS,
    st.sampled_from(
        ["{here}/file", "{here}/folder", "{here}/missing", "{here}/recipe.yaml", "--", "-", "a=1", "=", "a=[1"]
    ),
    st.text(alphabet="ab{}[]*?=-\n\udcff", max_size=6),
)
OPTIONS = {
    "models": ["--json"],
    "info": ["--img-size", "--json"],
    "train": ["--lr", "--epochs", "--seed", "--img-size", "--model-args", "--recipe", "--task", "--from", "--strict"],
    "evaluate": ["--batch-size", "--stride", "--json"],
    "predict": ["--top-k", "--strict", "--json"],
    "generate": ["--prompt", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--beams"],
    "convert": ["--source", "--set", "--classes", "--tokenizer"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    places = draw(st.lists(WORDS, max_size=3))
    if command in ("train", "convert"):
        places += ["--output", "{here}/run"]
    for option in draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=3)):
        places += [option] if option in ("--json", "--strict") else [option, draw(WORDS)]
    # Data of another name would be looked for on the Hub.
    return [command, *(["./missing"] if command == "train" else []), *places]


def test_a_command_line_may_say_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe\0 no text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "recipe.yaml").write_text("model: [gmlp]\n")

    @_bounded(100)
    @given(command_lines())
    def attempt(arguments: list[str]) -> None:
        try:
            code = main([argument.replace("{here}", str(tmp_path)) for argument in arguments])
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr().err
        assert code in (0, 1, 2)
        assert (code == 1) == said.startswith("allmlp: ")
        assert (code == 2) == ("usage: allmlp" in said)

    attempt()
