"""What `import allmlp` adds to importing timm and transformers, and how soon `allmlp --help` answers.

    python benchmarks/startup.py
    python benchmarks/startup.py --page

Twenty seconds; writes results/startup.json and its part of docs/speed.md. Each command is a process of its own, in turn
with the others; the figures are medians of the time from its start to its end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup.json"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
PEERS, WITH_ALLMLP, HELP = "import timm, transformers", "import timm, transformers, allmlp", "allmlp --help"
COMMANDS = {
    PEERS: [sys.executable, "-c", PEERS],
    WITH_ALLMLP: [sys.executable, "-c", WITH_ALLMLP],
    HELP: [sys.executable, "-m", "allmlp", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not options.page:
        measure(options.rounds)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(rounds: int) -> None:
    """Write the results."""
    from allmlp.benchmark import machine
    from allmlp.files import write_json

    spent: dict[str, list[float]] = {name: [] for name in COMMANDS}
    # The first round brings the files into memory.
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            spent[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(times[1:]) for name, times in spent.items()}
    added = statistics.median(
        ours - peers for ours, peers in zip(spent[WITH_ALLMLP][1:], spent[PEERS][1:], strict=True)
    )
    write_json(RESULTS, {"machine": machine(), "seconds": seconds, "added_seconds": added})


def write_page(results: dict) -> None:
    """The part of docs/speed.md."""
    from allmlp.benchmark.report import replace_part

    seconds = results["seconds"]
    replace_part(
        PAGE,
        "startup",
        f"`{PEERS}` takes {seconds[PEERS]:.2f} s, `import allmlp` behind it adds {results['added_seconds']:.2f} s; "
        f"`{HELP}` answers after {seconds[HELP]:.2f} s.",
    )


if __name__ == "__main__":
    main()
