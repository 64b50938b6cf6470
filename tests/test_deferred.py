"""Imports that wait: neither too early, nor forgotten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import allmlp
from allmlp.deferred import import_after

FILES = {
    "host/__init__.py": "",
    "host/trigger.py": "from host import leaf",
    "host/leaf.py": "",
    # Imports the trigger halfway through itself, as transformers' modeling_utils does.
    "host/outer.py": "import host.trigger\nready = True",
    "host/broken.py": "import host.trigger\nraise RuntimeError('broken')",
    "follower.py": "import host.trigger\nfrom host.outer import ready as saw",
}


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is gone afterwards."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in FILES:
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_it_comes_after_the_outermost_import_of_the_package() -> None:
    finders = list(sys.meta_path)
    import_after("host.trigger", "follower")
    import host.leaf

    assert "follower" not in sys.modules
    import host.outer

    assert sys.modules["follower"].saw
    assert sys.meta_path == finders
    assert host.leaf.__spec__.loader.get_source("host.leaf") == ""


def test_a_trigger_that_is_there_already() -> None:
    import host.trigger  # noqa: F401

    import_after("host.trigger", "follower")
    assert "follower" in sys.modules


def test_an_import_that_fails_is_left_to_fail_and_the_next_counts() -> None:
    import_after("host.trigger", "follower")
    with pytest.raises(RuntimeError, match="broken"):
        import host.broken
    assert "follower" not in sys.modules
    import host.leaf
    import host.outer  # noqa: F401

    assert "follower" in sys.modules


MODELS_OF_BOTH = """
import timm
assert timm.create_model("gmlp_nano_patch4_32").num_classes == 10
from transformers import AutoConfig
assert AutoConfig.for_model("gmlp").model_type == "gmlp"
"""


@pytest.mark.parametrize("first", ["import allmlp", "import timm, allmlp"])
def test_both_libraries_know_the_models_in_a_program_of_a_package(first: str, tmp_path: Path) -> None:
    """As by `python -m project.train`, which imports the package before the program has its name."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "__init__.py").write_text(first)
    (tmp_path / "project" / "train.py").write_text(MODELS_OF_BOTH)
    command = [sys.executable, "-W", "ignore", "-m", "project.train"]
    path = os.pathsep.join([str(tmp_path), str(Path(allmlp.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr


def test_neither_library_is_loaded_before_it_is_needed() -> None:
    code = "import sys, allmlp, allmlp.cli; print({'torch', 'timm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == "set()\n"


FIRST_OF_ALL = """
import os, sys
import huggingface_hub, torch, torchvision  # what takes long, once for all
for room in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        import allmlp
        assert getattr(allmlp, room).__name__ == f"allmlp.{room}"
        import timm
        assert timm.is_model("gmlp_nano_patch4_32")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, room
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each room needs a process that has imported no other")
def test_any_room_may_be_imported_first() -> None:
    rooms = sorted(path.parent.name for path in Path(allmlp.__file__).parent.glob("*/__init__.py"))
    command = [sys.executable, "-W", "ignore", "-c", FIRST_OF_ALL, *rooms]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="no attribute 'room'"):
        getattr(allmlp, "room")  # noqa: B009


def test_transformers_knows_the_language_models_whatever_is_imported_first() -> None:
    code = """
import sys
import allmlp
import timm, transformers
assert "allmlp.language" not in sys.modules, "loaded before it is needed"
from transformers import BertModel
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("gmlp", vocab_size=8, num_hidden_layers=1, hidden_size=8, intermediate_size=16)
assert isinstance(AutoModelForCausalLM.from_config(config), allmlp.GMLPForCausalLM)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
