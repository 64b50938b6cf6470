"""What int8 gives and costs: time beside bfloat16 on the papers' networks, accuracy on CIFAR-10.

    python benchmarks/int8.py --data DIR_OF_PARQUET_FILES --runs RUNS
    python benchmarks/int8.py --page

RUNS holds the run directories of recipes/cifar10_nano.py. The forms of `allmlp.optimize` are calibrated with one batch
of training images for the accuracy, and with noise, which is as good for the time, on the papers' networks. Beside them
the dynamic ways, which need no calibration: ONNX Runtime's, and torchao's under torch's compiler where torchao is
installed. About six minutes on two cores; writes results/int8.json and its part of docs/speed.md. Accuracy that is
there already is left alone.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).parent / "results" / "int8.json"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
MODELS = (
    "gmlp_small_patch16_224",
    "mixer_base_patch16_224",
    "vip_small_patch7_224",
    "asmlp_tiny_patch4_224",
)
DTYPES = ("float32", "bfloat16", "int8")
FLOOR = "bfloat16 products alone"
TORCHAO, ONNXRUNTIME = "torchao, dynamic", "ONNX Runtime, dynamic"
BATCH = 250
"""Test images for which one form is made; they are a multiple of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--data", help="CIFAR-10 as parquet files; without it no accuracy is measured")
    parser.add_argument("--runs", type=Path, default=Path(__file__).parents[1] / "runs")
    parser.add_argument("--models", nargs="*", default=MODELS, help="networks to time")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not options.page:
        measure(options)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(options: argparse.Namespace) -> None:
    """Everything that is asked for; what is not stays as the results have it."""
    from allmlp.benchmark import machine
    from allmlp.files import write_json

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"times": {}, "accuracy": {}}
    results["machine"] = machine()
    for model in options.models:
        results["times"][model] = times_of(model, options.rounds)
        print(model, results["times"][model], flush=True)
        write_json(RESULTS, results)
    if options.data:
        for run in sorted(options.runs.glob("cifar10_nano_*")):
            name = run.name.removeprefix("cifar10_nano_")
            if name in results["accuracy"]:
                continue
            results["accuracy"][name] = accuracy_of(run, options.data)
            print(name, results["accuracy"][name], flush=True)
            write_json(RESULTS, results)


def times_of(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of a batch of 8 by form, and their ratio to the optimised bfloat16 form."""
    import timm
    import torch

    import allmlp
    from allmlp.benchmark import record_products, replay
    from allmlp.timing import time_in_turn

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(8, *model.pretrained_cfg["input_size"])
    forms: dict[str, Callable[[], object]] = {}
    engines = {}
    for dtype in (torch.bfloat16, torch.int8):
        form = allmlp.optimize(model, images, dtype=dtype)
        engines[str(dtype).removeprefix("torch.")] = form.engine
        forms[str(dtype).removeprefix("torch.")] = lambda form=form: form(images)
    for way, make in {ONNXRUNTIME: _onnxruntime, TORCHAO: _torchao}.items():
        try:
            forms[way] = make(model, images)
        except ImportError as missing:
            print(f"left out: {way}: {missing}")
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        forms[FLOOR] = replay(record_products(lambda: low(images.to(torch.bfloat16))))
    times = time_in_turn(forms, rounds=rounds)
    return {
        form: {
            "milliseconds": time.milliseconds,
            "ratio": time.ratio,
            **({"engine": engines[form]} if form in engines else {}),
        }
        for form, time in times.items()
    }


def _onnxruntime(model: Any, images: Any) -> Callable[[], object]:
    """Weights in int8 by output channel, activations as they come."""
    import onnxruntime as ort
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, quantized = Path(folder) / "exported.onnx", Path(folder) / "quantized.onnx"
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
        network = program.model_proto
        # The shapes of values, as exported, trouble the quantiser's own inference of them.
        del network.graph.value_info[:]
        exported.write_bytes(network.SerializeToString())
        quantize_dynamic(exported, quantized, per_channel=True, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(quantized.read_bytes(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)


def _torchao(model: Any, images: Any) -> Callable[[], object]:
    """Linear maps with weights in int8 by output channel and activations by token; the rest in bfloat16."""
    import torch
    from torch._inductor import config
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    low = copy.deepcopy(model).to(torch.bfloat16)
    quantize_(low, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(low, fullgraph=True, dynamic=False)
    given = images.to(torch.bfloat16)
    with torch.no_grad(), config.patch(freezing=True):
        compiled(given)

    def run() -> object:
        with torch.no_grad():
            return compiled(given)

    return run


def accuracy_of(run: Path, data: str) -> dict[str, float]:
    """The accuracy of a trained network's forms on all test images."""
    import torch

    import allmlp
    from allmlp.data.images import load_images
    from allmlp.training.evaluation import evaluation_batches

    model: Any = allmlp.load(run)
    found = load_images(data)
    batches = {
        "training": evaluation_batches(found.train.subset(range(BATCH)), model.pretrained_cfg),
        "test": evaluation_batches(found.validation, model.pretrained_cfg),
    }
    calibration = batches["training"].__getitems__(list(range(BATCH)))["pixel_values"]
    right = dict.fromkeys(DTYPES, 0)
    engines = {"int8": "auto"}
    forms = {
        dtype: allmlp.optimize(model, calibration, dtype=getattr(torch, dtype), engine=engines.get(dtype, "eager"))
        for dtype in DTYPES
    }
    count = len(found.validation)
    for start in range(0, count, BATCH):
        batch = batches["test"].__getitems__(list(range(start, start + BATCH)))
        for dtype, form in forms.items():
            right[dtype] += int((form(batch["pixel_values"]).argmax(1) == batch["labels"]).sum())
    return {dtype: right[dtype] / count for dtype in DTYPES}


def write_page(results: dict[str, Any]) -> None:
    """Both tables of docs/speed.md."""
    from allmlp.benchmark.report import replace_part

    all_ways = ("bfloat16", "int8", ONNXRUNTIME, TORCHAO, FLOOR)
    ways = [way for way in all_ways if any(way in times for times in results["times"].values())]
    heading = ["milliseconds, batch 8", *ways, "bfloat16 / int8"]
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(ways) + 1)]
    for model, times in results["times"].items():
        cells = [_cell(times.get(way)) for way in ways]
        lines.append(f"| {model} | " + " | ".join(cells) + f" | {1 / times['int8']['ratio']:.2f} |")
    lines += ["", "| CIFAR-10, % | " + " | ".join(DTYPES) + " |", "|---|" + "---:|" * 3]
    for model, accuracy in results["accuracy"].items():
        lines.append(f"| {model} | " + " | ".join(f"{100 * accuracy[dtype]:.2f}" for dtype in DTYPES) + " |")
    replace_part(PAGE, "int8", "\n".join(lines))


def _cell(time: dict[str, Any] | None) -> str:
    if time is None:
        return "–"
    return f"{time['milliseconds']:.1f}" + (f" ({time['engine']})" if "engine" in time else "")


if __name__ == "__main__":
    main()
