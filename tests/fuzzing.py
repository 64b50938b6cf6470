"""Everything that reads files, as functions of their bytes, with valid files as seeds: they are to take any others.

A target reads the file and either succeeds or raises a `UserError` that names it. Anything else is a mistake of allmlp:
another exception, a hang, memory beyond what is stated. `tests/test_fuzzing.py` gives the targets a few mutations each,
`benchmarks/fuzz.py` as many as there is time for.
"""

import functools
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.conversion import convert_checkpoint
from allmlp.checkpoints.reading import read_checkpoint
from allmlp.data.image_sources import table
from allmlp.data.labelled_images import decode
from allmlp.data.text_sources import find_texts
from allmlp.data.tokenization import load_tokenizer
from allmlp.errors import UserError
from allmlp.training.recipe import RECIPES, make_recipe, read_settings, task_of
from tests.strange_pictures import legal

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
SMALL = {"num_blocks": 1, "embed_dim": 8, "img_size": 8}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader of files.

    Attributes:
        name: the file that it is given.
        seeds: valid contents.
        read: reads the file, which lies in a folder of its own.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[Path], Any]

    def run(self, content: bytes) -> bool:
        """Read a file of this content; whether it could be read.

        Raises:
            AssertionError: if the refusal does not name the file.
        """
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # The libraries beneath may complain about what they still read.
            warnings.simplefilter("ignore")
            path = Path(folder) / self.name
            path.write_bytes(content)
            try:
                self.read(path)
            except UserError as error:
                if str(path.parent) not in str(error):
                    raise AssertionError(f"the file is not named: {error}") from error
                return False
            return True


def _checkpoints() -> list[bytes]:
    contents = []
    for settings in ({}, {"_use_new_zipfile_serialization": False}):
        buffer = io.BytesIO()
        torch.save({"state_dict": WEIGHTS, "epoch": 3, "args": [0.5, None]}, buffer, **settings)
        contents.append(buffer.getvalue())
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, **{name: tensor.numpy() for name, tensor in WEIGHTS.items()})
        contents.append(buffer.getvalue())
    return [*contents, save(WEIGHTS)]


def _golden() -> list[bytes]:
    """The smallest checkpoints of other projects, and one written as safetensors, whose header is easy to change."""
    paths = [next(folder.glob("checkpoint.*")) for folder in GOLDEN.iterdir() if folder.is_dir()]
    small = [path.read_bytes() for path in sorted(paths, key=lambda path: (path.stat().st_size, path))[:6]]
    weights = torch.load(GOLDEN / "lucidrains_0_0_4_vision" / "checkpoint.pth")
    return [*small, save({name: tensor.contiguous() for name, tensor in weights.items()})]


def _convert(path: Path) -> None:
    facts: dict[str, Any] = {}
    for _ in range(2):
        try:
            convert_checkpoint(path, None, facts)
        except UserError as error:
            # What every checkpoint of language models is asked for.
            if not getattr(error, "names", ()):
                raise
            facts = {name: {"causal": True, "gate_act": "none", "shift_size": 5}[name] for name in error.names}
        else:
            return


def _images() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [(Path(folder) / name).read_bytes() for name in sorted(legal(Path(folder)))]


@functools.cache
def _run() -> dict[str, bytes]:
    """The files of an image classifier."""
    model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **SMALL)
    with tempfile.TemporaryDirectory() as folder:
        wrapped = run_directory.classifier(model, "gmlp_nano_patch4_32", SMALL, ["a", "b", "c"])
        run_directory.save_classifier(wrapped, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@functools.cache
def _language_run() -> dict[str, bytes]:
    from allmlp.language import GMLPForCausalLM
    from tests.language.tiny import tiny_config

    with tempfile.TemporaryDirectory() as folder:
        run_directory.save_language(folder, GMLPForCausalLM(tiny_config()))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _load(path: Path) -> None:
    """Load the run directory of which this is one file, the others being whole."""
    whole = _language_run() if b'"gmlp"' in path.read_bytes() else _run()
    for name, content in whole.items():
        if name != path.name:
            (path.parent / name).write_bytes(content)
    run_directory.load(path.parent)


def _recipe(path: Path) -> None:
    settings = read_settings(path)
    try:
        kind = RECIPES[task_of(settings)]
        settings.pop("task", None)
        make_recipe(settings, kind, str(path))
    except UserError as error:
        # A value is named by its field, wherever it comes from.
        raise UserError(f"{path}: {error}") from error


def _texts(path: Path) -> None:
    for text in find_texts(str(path))["train"]:
        assert isinstance(text, str)


def _tables(name: str) -> list[bytes]:
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        if name.endswith(".csv"):
            path.write_text('text,label\n"one, two",a\nthree,b\n')
        else:
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
            rows = {"image": [{"bytes": content, "path": None} for content in _images()[:2]], "label": [0, 1]}
            datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
        return [path.read_bytes()]


def _image_table(path: Path) -> None:
    _, found = table({"train": [str(path)]}, str(path), None, None)
    for source in found["train"].sources:
        try:
            decode(source)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _image(path: Path) -> None:
    try:
        image = decode(path)
    except UserError as error:
        # Whoever asks for the image names it, in a list of all that are left out.
        raise UserError(f"{path}: {error}") from error
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)


def _recipes() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]


TARGETS = {
    "checkpoint": Target(name="checkpoint.pth", seeds=_checkpoints, read=read_checkpoint),
    "conversion": Target(name="checkpoint.pth", seeds=_golden, read=_convert),
    "configuration": Target(
        name="config.json", seeds=lambda: [_run()["config.json"], _language_run()["config.json"]], read=_load
    ),
    "weights": Target(name="model.safetensors", seeds=lambda: [_run()["model.safetensors"]], read=_load),
    "image": Target(name="image.png", seeds=_images, read=_image),
    "recipe": Target(name="recipe.yaml", seeds=_recipes, read=_recipe),
    "text": Target(name="text.txt", seeds=lambda: ["grün\r\n€ 🦊\n".encode() * 3], read=_texts),
    "tokenizer": Target(
        name="tokenizer.json",
        seeds=lambda: [b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}'],
        read=load_tokenizer,
    ),
    "csv": Target(name="table.csv", seeds=lambda: _tables("table.csv"), read=_texts),
    "parquet": Target(name="table.parquet", seeds=lambda: _tables("table.parquet"), read=_image_table),
}

_EXTREMES = [b"\0", b"\xff", b"\x7f", b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"99999999999", b"-1"]
_TOKENS = [
    b"null",
    b"[]",
    b"{}",
    b"[[[[",
    b"nan",
    b".inf",
    b"1e999",
    b"&a [*a]",
    b"!!int x",
    b"\n",
    b"2001-99-99",
    b'"',
]


@st.composite
def mutations(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A valid file, cut, flipped, spliced, doubled or written over in one to four places."""
    content = bytearray(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(1, 4))):
        # Most that steers a reader stands in front and at the end.
        reach = draw(st.sampled_from([64, 512, len(content)]))
        place = draw(st.integers(0, max(0, min(reach, len(content)) - 1)))
        place = len(content) - 1 - place if draw(st.booleans()) and content else place
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["flip", "cut", "remove", "double", "splice", "extreme", "token", "any"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "remove":
            del content[place : place + length]
        elif kind == "double":
            content[place:place] = content[place : place + length * 4]
        elif kind == "splice":
            other = draw(st.sampled_from(list(seeds)))
            start = draw(st.integers(0, len(other)))
            content[place:] = other[start:]
        elif kind == "extreme":
            extreme = draw(st.sampled_from(_EXTREMES))
            content[place : place + len(extreme)] = extreme
        elif kind == "token":
            content[place : place + length] = draw(st.sampled_from(_TOKENS))
        elif kind == "any":
            content[place : place + length] = draw(st.binary(min_size=length, max_size=length))
    return bytes(content)


# Any value that JSON or YAML may hold, with those that have tripped readers.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [2**31, 2**63, 10**30, -1, 0, 1e308, 1e-308, float("inf"), float("nan"), "", "\0", "../x", "é" * 200]
    )
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_settings(draw: st.DrawFn, valid: Any) -> Any:
    """Valid settings with one to three entries, at any depth, dropped, added or replaced by any value."""
    settings = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        level = settings
        while nested := [name for name, value in level.items() if isinstance(value, dict) and value]:
            if draw(st.booleans()):
                break
            level = level[draw(st.sampled_from(nested))]
        if not level:
            continue
        name = draw(st.sampled_from(sorted(level)))
        if draw(st.integers(0, 5)) == 0:
            del level[name]
        else:
            level[name] = draw(VALUES)
    return settings
