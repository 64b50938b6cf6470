"""Nothing in the library unpickles, evaluates or fetches code. What ruff's rules (S) know of this they check."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "allmlp"
# What a call has to say, by the name it goes by; None: it is not to be there.
CALLS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "kind.from_pretrained": ("use_safetensors", True),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def problems(text: str) -> Iterator[str]:
    """What in a source could run code that a file brings."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"calls {name}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("trust_remote_code", "False") != "False":
                yield f"{name} trusts"
            if name in CALLS and given.get(CALLS[name][0]) != str(CALLS[name][1]):
                yield f"{name} without {CALLS[name][0]}={CALLS[name][1]}"


def test_nothing_in_the_library_runs_what_a_file_brings() -> None:
    sources = sorted(SOURCE.rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    found = [f"{path.relative_to(SOURCE)}: {problem}" for path, text in texts.items() for problem in problems(text)]
    assert found == []
    everything = "\n".join(texts.values())
    assert all(f"{name}(" in everything for name in CALLS), "the calls that are checked are there"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=trust)",
    ],
)
def test_each_of_these_would_be_found(text: str) -> None:
    assert list(problems(text))
