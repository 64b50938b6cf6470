"""Converted models beside their originals: the cases, how far apart the outputs are, and the table in the docs.

python -m tests.checkpoints.parity        measures every case and writes the table into docs/checkpoints.md
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor, nn

from allmlp.checkpoints.conversion import LAYOUTS, Conversion, convert_checkpoint, convert_state_dict
from allmlp.checkpoints.layout import Layout
from tests.checkpoints import originals
from tests.tolerances import PARITY

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
DOCS = ROOT / "docs" / "checkpoints.md"
# Few examples each: what matters is that the sizes vary.
VARIED = settings(max_examples=12, deadline=None, derandomize=True)
_BEGIN, _END = "<!-- parity table, written by python -m tests.checkpoints.parity -->", "<!-- end of parity table -->"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, an input and what its original gives for it, in the dtype asked for."""

    name: str
    source: str
    convert: Callable[[], Conversion]
    input: Tensor
    output: Callable[[torch.dtype], Tensor]
    sequence_first: bool = False


def cases() -> Iterator[Case]:
    """Every recorded original, and live ones of the layouts that have none."""
    for folder in sorted(path.parent for path in GOLDEN.glob("*/case.json")):
        yield golden(folder)
    for name, make in LIVE.items():
        torch.manual_seed(0)
        yield live(name, make())


def golden(folder: Path) -> Case:
    """A case of tests/golden: the original's output was computed in float64."""
    description = json.loads((folder / "case.json").read_text())
    (checkpoint,) = folder.glob("checkpoint.*")
    output = torch.from_numpy(np.load(folder / "output.npy"))
    return Case(
        name=folder.name,
        source=description["source"],
        convert=lambda: convert_checkpoint(checkpoint, None, description["facts"]),
        input=torch.from_numpy(np.load(folder / "input.npy")),
        output=lambda dtype: output,
        sequence_first=description["source"] == "labml",
    )


def live(name: str, original: originals.Original) -> Case:
    """A case of an installed original, its weights as they are now."""
    weights = {key: tensor.clone() for key, tensor in original.model.state_dict().items()}
    return Case(
        name=name,
        source=original.source,
        convert=lambda: convert_state_dict(weights, None, original.facts),
        input=original.input,
        output=original.output,
        sequence_first=original.sequence_first,
    )


LIVE: dict[str, Callable[[], originals.Original]] = {
    "timm MLP-Mixer": lambda: originals.timm_mixer(),
    "timm ResMLP": lambda: originals.timm_resmlp(),
    "mlp-mixer-pytorch": lambda: originals.lucidrains_mixer(),
}


def deviations(case: Case) -> tuple[Conversion, dict[torch.dtype, float]]:
    """The conversion, and for each dtype the largest difference over the original's largest number."""
    conversion = case.convert()
    found = {}
    for dtype in (torch.float64, torch.float32):
        expected = case.output(dtype).double()
        actual = output_of(conversion.model.to(dtype), case.input, sequence_first=case.sequence_first)
        assert actual.dtype == dtype
        assert actual.shape == expected.shape, f"{case.name}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
        found[dtype] = ((actual - expected).abs().max() / expected.abs().max()).item()
    return conversion, found


@torch.no_grad()
def output_of(model: nn.Module, x: Tensor, *, sequence_first: bool = False) -> Tensor:
    """Logits, or the hidden states of a model without head; for tokens that lie along the first axis the same way.

    A backbone's maps come flattened, one behind the other.
    """
    if x.is_floating_point():
        y = model(x.to(next(model.parameters()).dtype))
        return torch.cat([level.flatten(1) for level in y], 1) if isinstance(y, list) else y
    result = model(x.T if sequence_first else x)
    y = result.logits if "logits" in result else result.last_hidden_state
    return y.transpose(0, 1) if sequence_first else y


def table(measured: Mapping[str, dict[torch.dtype, float]]) -> list[str]:
    """The documentation's table, a line for each layout with the largest deviation measured on its cases."""
    lines = ["| source | saves | inferred | to be given | float64 | float32 |", "|---|---|---|---|---|---|"]
    for layout in LAYOUTS:
        worst = measured[cells(layout)]
        figures = [f"{worst[dtype]:.0e}" if worst[dtype] else "0" for dtype in (torch.float64, torch.float32)]
        lines.append(f"| {cells(layout)} | {' | '.join(figures)} |")
    return lines


def cells(layout: Layout) -> str:
    """A layout's cells in front of the figures; they name it."""
    asked = ", ".join(f"`{fact.name}`" for fact in layout.facts if fact.required) or "nothing"
    if layout.stored:
        asked += " (or in the stored configuration)"
    optional = ", ".join(f"`{fact.name}`" for fact in layout.facts if not fact.required)
    if optional:
        asked += f"; optional {optional}"
    return f"`{layout.source}` | {layout.family} | {layout.inferred} | {asked}"


def assert_equal_outputs(original: originals.Original) -> Conversion:
    """Fails unless the converted model computes what its original does, in float64 and in float32."""
    conversion, found = deviations(live("live", original))
    assert conversion.layout.source == original.source
    for dtype, deviation in found.items():
        assert deviation <= PARITY[dtype], f"{deviation:.1e} in {dtype}"
    return conversion


def documented() -> list[str]:
    """The table as the documentation has it."""
    text = DOCS.read_text(encoding="utf-8")
    return text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)].strip().splitlines()


def main() -> None:
    """Measures all cases and writes the table."""
    measured: dict[str, dict[torch.dtype, float]] = {}
    for case in cases():
        conversion, found = deviations(case)
        worst = measured.setdefault(cells(conversion.layout), found)
        measured[cells(conversion.layout)] = {dtype: max(worst[dtype], found[dtype]) for dtype in found}
    text = DOCS.read_text(encoding="utf-8")
    start, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    DOCS.write_text(text[:start] + "\n" + "\n".join(table(measured)) + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
