"""Every family beside its peers, and what `allmlp.optimize` makes of it beside the inference engines.

    python benchmarks/speed.py eager --rounds 7 --seconds 45 --peer-path …
    python benchmarks/speed.py engines --peer-path …
    python benchmarks/speed.py eager --task inference --batch-size 1 --rounds 25 --name speed_latency --peer-path …
    python benchmarks/speed.py eager --task inference --batch-size 32 --rounds 5 --name speed_batch32 --peer-path …
    python benchmarks/speed.py eager --compiled --task inference --rounds 11 --name speed_compiled --peer-path …
    python benchmarks/speed.py eager --compiled --task training --rounds 7 --name speed_compiled_training --peer-path …
    python benchmarks/speed.py eager --models gmlp_base amlp_base --batch-size 1 --name speed_language
    python benchmarks/speed.py page

`--peer-path …` stands for three: AS-MLP=DIR, VisionPermutator=DIR and Jittor-MLP=DIR, checkouts of those repositories.
Each measurement writes `benchmarks/results/speed_<part>.json`, the last command puts all into `docs/speed.md`. On two
cores they take three minutes (one image) to an hour (training, compiled). `--models` and `--batch-size` restrict or
widen what is measured; `--cpu-isa AVX512_CORE_BF16` keeps oneDNN from newer instructions (AMX), to compare with
machines that lack them.
"""

import argparse
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ENGINE_MODELS = (
    "gmlp_small_patch16_224",
    "mixer_base_patch16_224",
    "vip_small_patch7_224",
    "asmlp_tiny_patch4_224",
)
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("eager", "engines", "page"))
    parser.add_argument("--peer-path", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--task", nargs="+", default=["inference", "training"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[8])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="eager: further rounds of a row until so many have passed"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-isa", metavar="ISA")
    parser.add_argument("--name", help="name of the results' file (default: speed_<part>)")
    options = parser.parse_args()
    if options.models and not options.name:
        parser.error(f"--models leaves rows of speed_{options.part} out: give what it measures a --name of its own")
    if options.cpu_isa:
        # oneDNN reads this when it is loaded.
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.cpu_isa
    # torch's profiler, which sees the memory, reports its own start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    {"eager": eager, "engines": engines, "page": page}[options.part](options)


def eager(options: argparse.Namespace) -> None:
    from allmlp.benchmark import MODELS, checkouts, measure, result_table, settings
    from allmlp.tables import table

    wanted = settings(
        options.models or MODELS,
        tasks=options.task,
        dtypes=options.dtype,
        compiled=(options.compiled,),
        batch_sizes=options.batch_size,
        device=options.device,
    )
    paths = checkouts(dict(given.split("=", 1) for given in options.peer_path))
    results = []
    for setting in wanted:
        found = measure(setting, peer_paths=paths, rounds=options.rounds, seconds=options.seconds, skipped=_leave_out)
        print(table(result_table(found)[1:]), flush=True)
        results += found
        _keep(options, results)


def engines(options: argparse.Namespace) -> None:
    """`allmlp.optimize` beside eager forms and what the inference engines make of the peer, in turn."""
    from allmlp.benchmark import checkouts, result_table
    from allmlp.tables import table

    paths = checkouts(dict(given.split("=", 1) for given in options.peer_path))
    results = []
    for model in options.models or ENGINE_MODELS:
        for dtype in options.dtype:
            for batch_size in options.batch_size:
                found = _beside_engines(model, dtype, batch_size, paths, options.rounds)
                print(table(result_table(found)[1:]), flush=True)
                results += found
                _keep(options, results)


def _beside_engines(model: str, dtype: str, batch_size: int, paths: dict[str, Path], rounds: int) -> list:
    import copy

    import torch

    import allmlp
    from allmlp.benchmark import FLOOR, OURS, Result, Setting, build_pair, example, peers_of, record_products, replay
    from allmlp.benchmark.measurement import DTYPES, compare
    from allmlp.benchmark.networks import in_dtype
    from allmlp.deploy.engines import ENGINES, EngineMissingError
    from allmlp.timing import time_in_turn

    if not (peers := peers_of(model)):
        raise SystemExit(f"{model} has no peer to be measured beside; those of {', '.join(ENGINE_MODELS)} are known")
    peer = peers[0]
    ours, theirs = build_pair(peer, paths)
    difference = compare(ours, theirs, example(model, 2))
    x = example(model, batch_size)
    precision = DTYPES[dtype]
    optimized = allmlp.optimize(ours, x, dtype=precision)
    for candidate in optimized.candidates:
        _say(f"{model}, {dtype}: {candidate}")
    low = copy.deepcopy(ours).to(precision)
    with torch.no_grad():
        products = record_products(lambda: low(in_dtype(x, precision)))
    runners = {
        OURS: lambda: optimized(x),
        FLOOR: replay(products),
        "allmlp, eager": ENGINES["eager"](ours, (x,), precision),
        f"{peer.name}, eager, float32": ENGINES["eager"](theirs, (x,), torch.float32),
    }
    for engine in ("openvino", "onnxruntime"):
        try:
            runners[f"{peer.name}, {engine}"] = ENGINES[engine](theirs, (x,), precision)
        except EngineMissingError as reason:
            _leave_out(str(reason))
    steps = {name: run if name in (OURS, FLOOR) else lambda run=run: run(x) for name, run in runners.items()}
    times = time_in_turn(steps, rounds=rounds)
    setting = Setting(model=model, dtype=dtype, batch_size=batch_size)
    return [
        Result(
            setting=setting,
            contender=name,
            milliseconds=time.milliseconds,
            ratio=time.ratio,
            difference=None if name == FLOOR else difference,
            engine=optimized.engine if name == OURS else None,
        )
        for name, time in times.items()
    ]


def page(options: argparse.Namespace) -> None:
    from allmlp.benchmark import read_results, write_page

    for file in sorted(RESULTS.glob("speed_*.json")):
        results, facts = read_results(file)
        write_page(PAGE, file.stem.removeprefix("speed_"), results, facts)


def _keep(options: argparse.Namespace, results: list) -> None:
    from allmlp.benchmark import machine, write_results

    facts = machine()
    if options.cpu_isa:
        facts["onednn_max_cpu_isa"] = options.cpu_isa
    write_results(RESULTS / f"{options.name or f'speed_{options.part}'}.json", results, facts)


def _leave_out(reason: str) -> None:
    _say(f"left out: {reason}")


def _say(what: str) -> None:
    print(what, file=sys.stderr)


if __name__ == "__main__":
    main()
