"""Every family's CIFAR-10 nano, trained at 32 pixels, at other sizes; renders what docs/resolution.md shows of it.

    python benchmarks/resolution.py sizes --data DIR_OF_PARQUET_FILES --runs RUNS
    python benchmarks/resolution.py methods --data DIR_OF_PARQUET_FILES --runs RUNS
    python benchmarks/resolution.py tuning --data DIR_OF_PARQUET_FILES --runs RUNS

RUNS holds the run directories of recipes/cifar10_nano.py. `sizes` evaluates each without training it further, `methods`
compares ways to resample on part of the images, `tuning` trains one epoch more. What is measured already is left alone,
so that a stopped measurement goes on where it was. Everything goes to benchmarks/results/resolution.json, the page and
its figure.
"""

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from allmlp.benchmark.report import replace_part
from allmlp.checkpoints import run_directory
from allmlp.checkpoints.run_directory import METRICS, read_config
from allmlp.data.images import ImageData, load_images
from allmlp.files import write_json
from allmlp.layers import GridBound, TokenMixingMLP
from allmlp.machine import surroundings
from allmlp.ops import resampling
from allmlp.training import vision
from allmlp.training.evaluation import evaluation_batches, logits_of
from allmlp.training.recipe import VisionRecipe, make_recipe, read_settings
from allmlp.training.report import STYLE, save
from allmlp.vision.base import VisionMLP

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "cifar10_nano.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "resolution.json"
NAMES = {
    "gmlp_nano_patch4_32": "gMLP",
    "mixer_nano_patch4_32": "MLP-Mixer",
    "resmlp_nano_patch4_32": "ResMLP",
    "vip_nano_patch4_32": "ViP",
    "s2mlp_nano_patch4_32": "S²-MLP",
    "s2mlpv2_nano_patch2_32": "S²-MLPv2",
    "asmlp_nano_patch2_32": "AS-MLP",
}
OWN, TUNED = 32, 48
SIZES = (TUNED, 24, 40, 64)
PART = 2000
FINE_TUNING = {"epochs": 1, "lr": 5e-4}
"""What the one epoch more changes in the recipe the models were trained with."""
WAYS = {
    "kernel": "resampled, patch kernel enlarged",
    "plain": "resampled",
    "random": "random token mixing",
    "back": "pictures resized back to 32",
}
TARGETS = ("gmlp_nano_patch4_32", "mixer_nano_patch4_32")
TUNINGS = ("kernel", "random", "own")
"""Fine-tuned: these of `WAYS` at the new size, and the model as it is at its own."""
Axis = Callable[[int, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("sizes", "methods", "tuning"), help="nothing: render alone")
    parser.add_argument("--data", help="CIFAR-10 as parquet files")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the run directories are")
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=list(NAMES))
    ways = list(dict.fromkeys((*WAYS, *TUNINGS)))
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways, help="of sizes and tuning")
    options = parser.parse_args()
    if options.part and not options.data:
        parser.error("--data is needed to measure")
    parts = {"sizes": _sizes, "methods": _methods, "tuning": _tuning}
    measure = parts.get(options.part)
    for model in options.models if measure else ():
        run = options.runs / f"{RECIPE.stem}_{model}"
        if not (run / METRICS).is_file():
            print(f"{run} is not there, or not finished: left out")
            continue
        former = _results().get(options.part, {}).get(model, {})
        for key, value in measure(model, run, options.data, former, options.ways):
            # Several measurements may run side by side.
            found = _results()
            found.setdefault(options.part, {}).setdefault(model, {}).setdefault(key, {}).update(value)
            found["surroundings"] = surroundings()
            write_json(RESULTS, found)
            print(options.part, model, key, value, flush=True)
    render(_results())


def _results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


@cache
def _data(path: str) -> ImageData:
    return load_images(path)


def _accuracy(model: Any, cfg: dict[str, Any], data: str, part: int | None = None) -> float:
    images = _data(data).validation
    if part is not None:
        images = images.subset(range(part))
    logits, labels = logits_of(model, evaluation_batches(images, cfg))
    return round((logits.argmax(1) == labels).float().mean().item(), 4)


def _kernel(model: VisionMLP, size: int) -> int:
    """The kernel that shows a patch of the enlarged picture what it saw at the model's own size."""
    patch_size = model.stem.patch_size[0]
    return max(patch_size, round(patch_size * size / OWN))


def _sizes(
    name: str, run: Path, data: str, former: dict[str, Any], ways: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Accuracy without further training on all test images, by size and way."""
    own: Any = run_directory.load(run)
    if str(OWN) not in former:
        yield str(OWN), {"plain": _accuracy(own, own.pretrained_cfg, data)}
    for way, size in itertools.product(ways, SIZES):
        if way in former.get(str(size), {}):
            continue
        resized: Any = run_directory.load(run, img_size=size)
        model = resized
        if way == "kernel":
            model.set_input_size(patch_kernel=_kernel(own, size))
        elif way == "back":
            model = nn.Sequential(_Resized(), own)
        elif way == "random":
            if own.stem.img_size is None or size != TUNED:
                continue
            model = _with_random_mixing(name, own, size)
        elif way != "plain":
            continue
        yield str(size), {way: _accuracy(model, resized.pretrained_cfg, data)}


class _Resized(nn.Module):
    """Images at the size the models were trained at."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (OWN, OWN), mode="bicubic", antialias=True)


def _with_random_mixing(name: str, own: VisionMLP, size: int) -> Any:
    """What there is without resampling: a model of another size with all weights that fit it, the others fresh."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, img_size=size).eval()
    fresh = model.state_dict()
    fitting = {key: value for key, value in own.state_dict().items() if value.shape == fresh[key].shape}
    model.load_state_dict({**fresh, **fitting})
    return model


def _methods(
    name: str, run: Path, data: str, former: dict[str, Any], ways: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Accuracy of ways to resample on part of the test images, by way and size, where weights belong to positions."""
    own: Any = run_directory.load(run)
    if own.stem.img_size is None:
        return
    if "own" not in former:
        yield "own", {str(OWN): _accuracy(own, own.pretrained_cfg, data, PART)}
    for method, axis in METHODS.items():
        if method in former or (method == DIAGONAL and not _square(own)):
            continue
        found = {}
        for size in (24, TUNED):
            model = copy.deepcopy(own)
            model.pretrained_cfg = dict(own.pretrained_cfg)
            with patch.object(resampling, "_axis", axis):
                model.set_input_size(size, patch_kernel=_kernel(own, size))
            if method == DIAGONAL:
                _keep_the_diagonal(own, model)
            found[str(size)] = _accuracy(model, model.pretrained_cfg, data, PART)
        yield method, found


def _interpolation(mode: str) -> Axis:
    """Both ways by interpolation, of more values than are wanted by averages of them."""

    def axis(size: int, new_size: int) -> Tensor:
        basis = torch.eye(size, dtype=torch.float64)[None, None]
        if mode == "nearest":
            return F.interpolate(basis, (new_size, size), mode="nearest-exact")[0, 0]
        return F.interpolate(basis, (new_size, size), mode=mode, antialias=True)[0, 0]

    return axis


def _with_inverse(mode: str) -> Axis:
    """To finer grids by interpolation, back by its pseudo-inverse."""
    interpolation = _interpolation(mode)

    def axis(size: int, new_size: int) -> Tensor:
        return interpolation(size, new_size) if size <= new_size else torch.linalg.pinv(interpolation(new_size, size))

    return axis


DIAGONAL = "bicubic and its pseudo-inverse, the mean diagonal kept"
METHODS: dict[str, Axis] = {
    "nearest": _interpolation("nearest"),
    "bilinear": _interpolation("bilinear"),
    "bicubic": _interpolation("bicubic"),
    "nearest and its pseudo-inverse": _with_inverse("nearest"),
    "bilinear and its pseudo-inverse": _with_inverse("bilinear"),
    "bicubic and its pseudo-inverse": _with_inverse("bicubic"),
    DIAGONAL: _with_inverse("bicubic"),
}


def _square(model: VisionMLP) -> list[tuple[str, str]]:
    """The weights that map a model's tokens to its tokens: their layers' names and theirs."""
    return [
        (name, key)
        for name, layer in model.named_modules()
        if isinstance(layer, GridBound) and not isinstance(layer, TokenMixingMLP)
        for key, weight in layer.named_parameters()
        if weight.ndim > 1 and weight.shape[-2:] == (model.stem.num_patches,) * 2
    ]


def _keep_the_diagonal(own: VisionMLP, model: VisionMLP) -> None:
    """`d I + U (W − d I) D` in place of `U W D`: what a token keeps of itself is not smoothed."""
    grid, new_grid = own.stem.grid_size, model.stem.grid_size
    smoothing = resampling.resampling_matrix(grid, new_grid) @ resampling.resampling_matrix(new_grid, grid)
    kept = (torch.eye(len(smoothing)) - smoothing).float()
    for name, key in _square(own):
        weight = own.get_submodule(name).get_parameter(key).data
        mean = weight.diagonal(dim1=-2, dim2=-1).mean(-1)
        model.get_submodule(name).get_parameter(key).data += mean[..., None, None] * kept


def _tuning(name: str, run: Path, data: str, former: dict[str, Any], ways: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Accuracy after one epoch more, by way."""
    own: Any = run_directory.load(run)
    for way in ways:
        if way not in TUNINGS or way in former or (way == "random" and own.stem.img_size is None):
            continue
        settings: dict[str, Any] = {} if way == "own" else {"img_size": TUNED}
        if way == "kernel":
            settings["model_args"] = {"patch_kernel": _kernel(own, TUNED)}
        with TemporaryDirectory() as folder, patch.object(vision, "load_images", lambda path, **_: _data(path)):
            start = run
            if way == "random":
                start = Path(folder) / "start"
                model = _with_random_mixing(name, own, TUNED)
                classes = read_config(run)["label_names"]
                wrapped = run_directory.classifier(model, name, {"img_size": TUNED}, classes)
                run_directory.save_classifier(wrapped, start)
            settings = {**read_settings(RECIPE), "data": data, "start_from": str(start), **FINE_TUNING, **settings}
            metrics = vision.train(make_recipe(settings, VisionRecipe), Path(folder) / "run")
        yield way, {key: metrics[key] for key in ("accuracy", "precision")}


def render(found: dict[str, Any]) -> None:
    """Draw docs/figures/resolution.png, and write the tables between the page's markers."""
    tables = {"sizes": _sizes_table, "methods": _methods_table, "tuning": _tuning_table}
    page = ROOT / "docs" / "resolution.md"
    for part, table in tables.items():
        if found.get(part):
            replace_part(page, part, "\n".join(table(found)))
    if found.get("sizes"):
        _draw(found["sizes"])


def _percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.1f}"


def _sizes_table(found: dict[str, Any]) -> list[str]:
    sizes = sorted((OWN, *SIZES))
    rows = [f"| model | at another size | {' | '.join(map(str, sizes))} |", "|---|---|" + "---:|" * len(sizes)]
    for model, figures in _measured(found["sizes"]):
        for way, words in WAYS.items():
            points = _course(figures, way)
            course = [points.get(size) for size in sizes]
            if set(points) - {OWN}:
                rows.append(f"| {NAMES[model]} | {words} | {' | '.join(map(_percent, course))} |")
    return rows


def _methods_table(found: dict[str, Any]) -> list[str]:
    measured = _measured(found["methods"])
    headings = [f"{NAMES[model]} ({_percent(figures['own'][str(OWN)])})" for model, figures in measured]
    rows = [f"| method | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
    for method in METHODS:
        cells = [" / ".join(map(_percent, figures.get(method, {"": None}).values())) for _, figures in measured]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return rows


def _tuning_table(found: dict[str, Any]) -> list[str]:
    rows = [
        "| model | trained at 32 | at 48, untrained | at 48, one epoch | random token mixing, untrained | one epoch "
        "| one epoch more at 32 |",
        "|---|" + "---:|" * 6,
    ]
    for model, figures in _measured(found["tuning"]):
        untrained = found.get("sizes", {}).get(model, {})
        after = {way: figures[way]["accuracy"] if way in figures else None for way in TUNINGS}
        cells = (
            untrained.get(str(OWN), {}).get("plain"),
            untrained.get(str(TUNED), {}).get("kernel"),
            after["kernel"],
            untrained.get(str(TUNED), {}).get("random"),
            after["random"],
            after["own"],
        )
        rows.append(f"| {NAMES[model]} | {' | '.join(map(_percent, cells))} |")
    return rows


def _measured(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(model, found[model]) for model in NAMES if found.get(model)]


def _draw(found: dict[str, Any]) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for model, figures in _measured(found):
            (line,) = left.plot(*_points(figures, "kernel"), marker="o", ms=3, label=NAMES[model])
            for way, style in (("kernel", "o-"), ("plain", "o--"), ("back", "o:"), ("random", "x")):
                sizes, accuracies = _points(figures, way)
                if model in TARGETS and set(sizes) - {OWN}:
                    label = f"{NAMES[model]}, {WAYS[way]}"
                    right.plot(sizes, accuracies, style, ms=3, color=line.get_color(), label=label)
        left.set(title="Trained at 32 pixels, used at others: accuracy", xlabel="image size in pixels")
        right.set(title="Beside the other ways", xlabel="image size in pixels", ylim=(0, None))
        for axes in (left, right):
            axes.set_xticks(sorted((OWN, *SIZES)))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.legend(fontsize=6, loc="lower left")
    save(figure, ROOT / "docs" / "figures" / "resolution.png")


def _points(figures: dict[str, Any], way: str) -> tuple[list[int], list[float]]:
    course = _course(figures, way)
    return list(course), list(course.values())


def _course(figures: dict[str, Any], way: str) -> dict[int, float]:
    """Accuracy of a way by size, beginning with the model's own, where all ways but the random one are the same."""
    at = {
        int(size): ways.get("plain" if size == str(OWN) and way != "random" else way) for size, ways in figures.items()
    }
    return {size: accuracy for size, accuracy in sorted(at.items()) if accuracy is not None}


if __name__ == "__main__":
    main()
