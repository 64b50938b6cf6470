"""What models there are, with their published figures, and what a model is made of."""

import fnmatch
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from allmlp.tables import table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model and its figures.

    Attributes:
        name: timm's name of an image model, `GMLPConfig.named`'s of a language model.
        family: the architecture, as its paper writes it.
        parameters: number of parameters, counted; of language models with the paper's vocabulary.
        macs: multiply-adds of one image at the model's own size, or of one text of the model's length, counted.
        published_parameters: as the paper prints them.
        published_macs: as the paper prints them.
        top1: published ImageNet-1k accuracy of an image model, in percent.
        perplexity: published perplexity of a masked language model (C4).
        paper: key in docs/references.bib.
        title: the paper's.
        url: the paper's.
    """

    name: str
    family: str
    parameters: int
    macs: int
    published_parameters: str | None
    published_macs: str | None
    top1: float | None
    perplexity: float | None
    paper: str
    title: str
    url: str


@cache
def _published() -> dict[str, Any]:
    return tomllib.loads((files("allmlp") / "published.toml").read_text(encoding="utf-8"))


def list_models(pattern: str | None = None) -> list[ModelCard]:
    """The models whose name matches a shell pattern such as `"vip_*"`, those of images first; all of them for None."""
    published = _published()
    cards = []
    for name, entry in {**published["models"], **published["language_models"]}.items():
        if pattern is not None and not fnmatch.fnmatch(name, pattern):
            continue
        printed, paper = entry.get("published", {}), published["papers"][entry["paper"]]
        cards.append(
            ModelCard(
                name=name,
                family=entry["family"],
                parameters=entry["parameters"],
                macs=entry["macs"],
                published_parameters=printed.get("parameters"),
                published_macs=printed.get("macs"),
                top1=printed.get("top1"),
                perplexity=printed.get("perplexity"),
                paper=entry["paper"],
                title=paper["title"],
                url=paper["url"],
            )
        )
    return cards


def is_language(name: str) -> bool:
    """Whether a name is a language model's."""
    return name in _published()["language_models"]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A module that computes something itself.

    Attributes:
        name: its path in the model.
        type: its class.
        output: shape of its output for one image or text; of several outputs the first one's.
        parameters: numbers it owns itself, its children's left out.
        macs: multiply-adds it does itself, its children's left out.
    """

    name: str
    type: str
    output: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """The layers of a model in the order they run.

    Attributes:
        model: the model's name.
        input: shape of the input.
        rows: the layers.
    """

    model: str
    input: tuple[int, ...]
    rows: tuple[LayerRow, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    def __str__(self) -> str:
        rows = [("layer", "type", "output", "parameters", "MACs")]
        for row in self.rows:
            shape = " × ".join(str(size) for size in row.output)
            rows.append((row.name, row.type, shape, f"{row.parameters:,}", f"{row.macs:,}"))
        rows.append(("total", "", "", f"{self.parameters:,}", f"{self.macs:,}"))
        heading, *lines, total = table(rows, right=(3, 4)).splitlines()
        rule = "─" * len(total)
        of = f"{self.model}, input {' × '.join(str(size) for size in self.input)}"
        return "\n".join((of, rule, heading, rule, *lines, rule, total))


def layer_table(name: str, img_size: int | tuple[int, int] | None = None, **arguments: Any) -> LayerTable:
    """The layer table of a model, made without allocating or computing anything (on the meta device).

    Args:
        name: a timm model's name, or a language model's, which is taken as a masked one and given a text of its length.
        img_size: image size in pixels, the model's own where None.
        arguments: further arguments of `timm.create_model`, or fields of `GMLPConfig`.

    Raises:
        ValueError: for a size the model's patches do not tile, and for an image size of a language model.
    """
    import torch

    if is_language(name):
        from allmlp.language import GMLPConfig, GMLPForMaskedLM

        if img_size is not None:
            raise ValueError("a language model has no image size")
        with torch.device("meta"), torch.no_grad():
            reader = GMLPForMaskedLM(GMLPConfig.named(name, **arguments)).eval()
            ids = torch.zeros(1, reader.config.max_position_embeddings, dtype=torch.long)
            rows = tuple(_layer_rows(reader, ids))
        return LayerTable(model=name, input=tuple(ids.shape[1:]), rows=rows)

    import timm
    from timm.layers import to_2tuple

    import allmlp.vision  # noqa: F401 registers the architectures

    if img_size is not None:
        arguments["img_size"] = img_size
    with torch.device("meta"):
        model = timm.create_model(name, **arguments).eval()
        cfg: dict[str, Any] = vars(model)["pretrained_cfg"]
        chans, *size = cfg["input_size"]
        # Not every model keeps the size it is made for.
        height, width = size if img_size is None else to_2tuple(img_size)
        image = torch.empty(1, arguments.get("in_chans", chans), height, width)
        rows = tuple(_layer_rows(model, image))
    return LayerTable(model=name, input=tuple(image.shape[1:]), rows=rows)


def _layer_rows(model: Any, example: Any) -> Iterator[LayerRow]:
    import torch
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    shapes: dict[str, tuple[int, ...]] = {}
    flops: Counter[str] = Counter()
    running: list[str] = []
    counter = FlopCounterMode(display=False)

    def count() -> None:
        """What has been counted since the last time was done by the innermost module that runs."""
        if running:
            flops[running[-1]] += counter.get_total_flops() - flops.total()

    def enter(name: str) -> None:
        count()
        running.append(name)

    def leave(name: str, output: Any) -> None:
        count()
        running.pop()
        tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        shapes[name] = next((tuple(tensor.shape[1:]) for tensor in tensors), ())

    modules = dict(model.named_modules())
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: enter(name))
        module.register_forward_hook(lambda _module, _inputs, output, name=name: leave(name, output))
    with counter:
        model(example)
    counted: set[int] = set()
    for name, shape in shapes.items():
        own = {id(parameter): parameter.numel() for parameter in modules[name].parameters(recurse=False)}
        # What is tied is one parameter.
        parameters = sum(count for key, count in own.items() if key not in counted)
        counted |= own.keys()
        macs = flops[name] // 2  # the counter takes a multiply-add for two operations
        if parameters or macs:
            yield LayerRow(name=name, type=type(modules[name]).__name__, output=shape, parameters=parameters, macs=macs)
