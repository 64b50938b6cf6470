"""Measures how images get from shards to the model, and renders docs/scaling.md.

    python benchmarks/input_pipeline.py

It makes JPEG shards of its own and measures, each in a process of its own:

- the memory of one that streams 10,000 and of one that streams 200,000 images;
- images a second of the stream and of torchvision's ImageFolder, by turns, with the same augmentation and one worker;
- how busy a nano's training on the stream keeps two cores, one that trains and one that decodes.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
SHARD = 5000
SMALL, LARGE = 10_000, 200_000
CLASSES = 10
SIZE = 64
CROP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["memory", "speed", "training"], help="what to measure")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        print(json.dumps({"memory": child_memory, "speed": child_speed, "training": child_training}[name](*arguments)))
        return
    if not options.page:
        measure(options.parts)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(parts: Sequence[str]) -> None:
    """Write the results of some parts beside those of the others."""
    from allmlp.files import write_json
    from allmlp.machine import surroundings

    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with TemporaryDirectory() as folder:
        for part in parts:
            found[part] = {"memory": memory, "speed": speed, "training": training}[part](Path(folder))
    found["surroundings"] = surroundings()
    write_json(RESULTS, found)


def pictures(count: int) -> list[bytes]:
    """JPEG files of smooth noise, 64×64, different from each other."""
    from PIL import Image

    random = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def write_tars(folder: Path, count: int, split: str = "train") -> None:
    """Shards of 5,000 images; beside them what spares counting."""
    folder.mkdir(parents=True, exist_ok=True)
    different = pictures(1000)
    lengths = {}
    for start in range(0, count, SHARD):
        name = f"{split}-{start // SHARD:04}.tar"
        lengths[name] = min(SHARD, count - start)
        with tarfile.open(folder / name, "w") as archive:
            for number in range(start, start + lengths[name]):
                for ending, content in (("jpg", different[number % 1000]), ("cls", str(number % CLASSES).encode())):
                    member = tarfile.TarInfo(f"{number:07}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    info = folder / "_info.json"
    splits = json.loads(info.read_text())["splits"] if info.is_file() else {}
    splits[split] = {"filenames": list(lengths), "shard_lengths": list(lengths.values())}
    info.write_text(json.dumps({"splits": splits}))
    (folder / "classnames.txt").write_text("".join(f"{number}\n" for number in range(CLASSES)))


def loader(folder: str, workers: int, batch_size: int = 128) -> Any:
    """The stream of a training with a resized crop and a flip."""
    from torch.utils.data import DataLoader

    from allmlp.data import as_is
    from allmlp.data.image_batches import training_transform
    from allmlp.data.image_sources import find
    from allmlp.data.image_stream import ImageStream
    from allmlp.data.shards import Share

    images = find(folder, streaming=True)[1]["train"]
    transform = training_transform({"input_size": (3, CROP, CROP), "mean": (0.5,) * 3, "interpolation": "bilinear"})
    share = Share(examples=len(images), batch_size=batch_size)
    stream = ImageStream(images, transform, share=share, buffer=1000, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    return DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is)


def memory(folder: Path) -> dict[str, Any]:
    found = {}
    for count in (SMALL, LARGE):
        data = folder / f"memory{count}"
        write_tars(data, count)
        found[str(count)] = _in_a_process("memory", str(data))
    found["growth"] = found[str(LARGE)]["mebibytes"] / found[str(SMALL)]["mebibytes"] - 1
    return found


def child_memory(folder: str) -> dict[str, float]:
    """The largest resident memory while all images come by, decoded."""
    import resource

    images = sum(len(batch["labels"]) for batch in loader(folder, workers=0))
    return {"images": images, "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def speed(folder: Path) -> dict[str, Any]:
    tars, files = folder / "speed", folder / "files"
    write_tars(tars, SMALL)
    for number, picture in enumerate(pictures(1000) * (SMALL // 1000)):
        path = files / str(number % CLASSES) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    return _in_a_process("speed", str(tars), str(files))


def child_speed(tars: str, files: str) -> dict[str, Any]:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.5,) * 3, (0.5,) * 3))
    folder = datasets.ImageFolder(files, transforms.Compose(steps))

    def streamed() -> float:
        begin = time.perf_counter()
        images = sum(len(batch["labels"]) for batch in loader(tars, workers=1))
        return images / (time.perf_counter() - begin)

    def from_folder() -> float:
        begin = time.perf_counter()
        batches = DataLoader(folder, batch_size=128, shuffle=True, num_workers=1)
        images = sum(len(labels) for _, labels in batches)
        return images / (time.perf_counter() - begin)

    rates: dict[str, list[float]] = {"stream": [], "ImageFolder": []}
    for _ in range(5):
        rates["stream"].append(streamed())
        rates["ImageFolder"].append(from_folder())
    ratios = sorted(ours / theirs for ours, theirs in zip(*rates.values(), strict=True))
    return {"images_per_second": {name: float(np.median(each)) for name, each in rates.items()}, "ratios": ratios}


def training(folder: Path) -> dict[str, Any]:
    data = folder / "training"
    write_tars(data, SMALL)
    write_tars(data, 500, "val")
    return _in_a_process("training", str(data), str(folder / "runs"))


def child_training(data: str, runs: str) -> dict[str, float]:
    """A nano trains on one core while one worker decodes on another."""
    import resource

    import torch

    from allmlp.training.recipe import VisionRecipe
    from allmlp.training.vision import VisionEngine, train

    waits: list[float] = []
    get_batch_samples = VisionEngine.get_batch_samples

    def timed(self: VisionEngine, *arguments: Any) -> Any:
        begin = time.perf_counter()
        batches = get_batch_samples(self, *arguments)
        waits.append(time.perf_counter() - begin)
        return batches

    VisionEngine.get_batch_samples = timed
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"data": data, "model": "gmlp_nano_patch4_32", "batch_size": 128, "max_steps": 70}
    metrics = train(VisionRecipe(**settings, precision="fp32", workers=1), Path(runs) / "streamed")
    # The first batch waits for the worker to start.
    seconds = metrics["training_seconds"] - waits[0]
    decoding = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "images_per_second": 128 * (len(waits) - 1) / seconds,
        "training_core": 1 - sum(waits[1:]) / seconds,
        "decoding_core": (decoding.ru_utime + decoding.ru_stime) / seconds,
    }


def _in_a_process(*arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_page(found: dict[str, Any]) -> None:
    """Put the figures into the documentation."""
    from allmlp.benchmark.report import replace_part

    rows = ["| measured | |", "|---|---:|"]
    if "memory" in found:
        for count in (SMALL, LARGE):
            rows.append(f"| memory, {count:,} images | {found['memory'][str(count)]['mebibytes']:,.0f} MiB |")
    if "speed" in found:
        for name, rate in found["speed"]["images_per_second"].items():
            rows.append(f"| {name}, one worker | {rate:,.0f} images/s |")
        ratios = found["speed"]["ratios"]
        middle = ratios[len(ratios) // 2]
        rows.append(f"| stream / ImageFolder, by turns | {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    if "training" in found:
        figures = found["training"]
        rows.append(f"| gMLP nano training on the stream | {figures['images_per_second']:,.0f} images/s |")
        rows.append(f"| the core that trains, busy | {figures['training_core']:.1%} |")
        rows.append(f"| the core that decodes, busy | {figures['decoding_core']:.1%} |")
    about = (
        f"`python benchmarks/input_pipeline.py`, {SIZE}×{SIZE} JPEG files cropped to {CROP}×{CROP}, "
        f"{found['surroundings']['device']}:"
    )
    replace_part(PAGE, "input_pipeline", "\n".join([about, "", *rows]))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
