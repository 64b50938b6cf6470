"""Trains every family's nano on CIFAR-10 under one recipe, and renders what docs/cifar10.md shows of it.

    python recipes/cifar10_nano.py --data DIR_OF_PARQUET_FILES
    python recipes/cifar10_nano.py --data DIR_OF_PARQUET_FILES --speed
    python recipes/cifar10_nano.py --data DIR --recipe recipes/cifar10_nano_300.yaml --models gmlp_nano_patch4_32

A model whose run directory is finished is left alone, so that a stopped measurement goes on where it was, and several
may run side by side. Images/s only mean something where nothing else runs: --speed measures them again, one model at a
time. What all run directories say goes to benchmarks/results/RECIPE.json, the page and its figure.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

import allmlp.vision  # noqa: F401 registers the models
from allmlp.benchmark.report import replace_part
from allmlp.checkpoints.run_directory import METRICS
from allmlp.files import write_json
from allmlp.training.recipe import VisionRecipe, make_recipe, read_settings
from allmlp.training.report import STYLE, save
from allmlp.training.vision import train

ROOT = Path(__file__).parents[1]
NAMES = {
    "gmlp_nano_patch4_32": "gMLP",
    "mixer_nano_patch4_32": "MLP-Mixer",
    "resmlp_nano_patch4_32": "ResMLP",
    "s2mlp_nano_patch4_32": "S²-MLP",
    "s2mlpv2_nano_patch2_32": "S²-MLPv2",
    "asmlp_nano_patch2_32": "AS-MLP",
    "vip_nano_patch4_32": "ViP",
}
STEPS = 60
SPEED = ("images_per_second", "precision", "surroundings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10 as parquet files")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "cifar10_nano.yaml")
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--output", type=Path, default=ROOT / "runs", help="where the run directories go")
    parser.add_argument("--speed", action="store_true", help=f"train {STEPS} steps of each to measure images/s")
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / f"{options.recipe.stem}.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    for model in options.models:
        run = options.output / f"{options.recipe.stem}_{model}"
        if options.data is None and not (run / METRICS).is_file():
            parser.error(f"--data is needed to train {model}")
        settings = {**read_settings(options.recipe), "data": options.data, "model": model}
        recipe = make_recipe(settings, VisionRecipe, str(options.recipe))
        if options.speed:
            with TemporaryDirectory() as folder:
                metrics = train(dataclasses.replace(recipe, max_steps=STEPS), Path(folder) / "run")
            found.setdefault(model, {}).update({key: metrics[key] for key in SPEED})
        elif not (run / METRICS).is_file():
            train(recipe, run, overwrite=True)
    for model, figures in collected(options).items():
        # Speed measured alone stays.
        found[model] = {**figures, **{key: found[model][key] for key in SPEED if key in found.get(model, {})}}
    write_json(results, found)
    render(found, options.recipe.stem)


def collected(options: argparse.Namespace) -> dict[str, Any]:
    """What the finished run directories say, by model."""
    found = {}
    for model in NAMES:
        path = options.output / f"{options.recipe.stem}_{model}" / METRICS
        if path.is_file():
            metrics = json.loads(path.read_text())
            keys = ("parameters", "accuracy", "training_seconds", *SPEED)
            course = [entry["eval_accuracy"] for entry in metrics["history"] if "eval_accuracy" in entry]
            found[model] = {**{key: metrics[key] for key in keys}, "accuracy_per_epoch": course}
    return found


def render(found: dict[str, Any], name: str) -> None:
    """Draw docs/figures/NAME.png, and write the table into the page's part of that name."""
    rows = [
        "| model | parameters | accuracy after each epoch, % | final, % | images/s |",
        "|---|---:|---|---:|---:|",
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        label_height = 100.0
        for model, figures in sorted(found.items(), key=lambda item: -item[1]["accuracy"]):
            course = [100 * accuracy for accuracy in figures["accuracy_per_epoch"]]
            (line,) = left.plot(range(1, len(course) + 1), course, marker="o" if len(course) < 20 else None, ms=3)
            # One below the other where curves end side by side.
            label_height = min(course[-1], label_height - 1.7)
            left.annotate(
                f"{NAMES[model]} {course[-1]:.1f}",
                (len(course), label_height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=line.get_color(),
            )
            right.barh(NAMES[model], figures["images_per_second"], color=line.get_color())
            places = [round(fifth * len(course) / 5) - 1 for fifth in range(1, 6)]
            shown = course if len(course) <= 10 else [course[place] for place in places]
            rows.append(
                f"| `{model}` | {figures['parameters']:,} | {' '.join(f'{value:.1f}' for value in shown)} "
                f"| **{100 * figures['accuracy']:.2f}** | {figures['images_per_second']:,.0f} |"
            )
        left.set(title="Accuracy on the test images (%)", xlabel="epoch")
        left.margins(x=0.22)
        right.set(title="Training speed (images/s)")
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
    save(figure, ROOT / "docs" / "figures" / f"{name}.png")
    picture = f"![Accuracy and speed](figures/{name}.png)"
    replace_part(ROOT / "docs" / "cifar10.md", name, "\n".join([*rows, "", picture]))


if __name__ == "__main__":
    main()
