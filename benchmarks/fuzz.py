"""Gives every reader of files as many broken files as there is time for.

Command: python benchmarks/fuzz.py --seconds 600

Each target of tests/fuzzing.py in turn takes mutations of valid files: by atheris, which follows the coverage of
allmlp, where it is installed and one target is named; by hypothesis otherwise. What fails is written to a folder, each
kind of failure once, and told at the end; the exit code is 1 then.
"""

import argparse
import contextlib
import faulthandler
import os
import resource
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# What the libraries beneath would say about each file.
QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "critical",
    "TRANSFORMERS_VERBOSITY": "error",
}
# The targets are the tests'.
sys.path.insert(0, str(Path(__file__).parents[1]))

MEMORY = 16 * 2**30
"""What the process may map, torch's libraries among it."""
HANG = 60
"""Seconds that a file may take."""


def mutate(name: str, seconds: float, failures: Path, seed: int) -> int:
    """Run one target on mutations by hypothesis; how many kinds of failure there are."""
    from hypothesis import seed as seeded

    from tests.fuzzing import TARGETS, mutations

    target, found, counts = TARGETS[name], {}, [0, 0]
    contents, end = target.seeds(), time.monotonic() + seconds

    def attempt(content: bytes) -> None:
        if time.monotonic() > end:
            return
        counts[0] += 1
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            counts[1] += target.run(content)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            if kind not in found:
                failures.mkdir(parents=True, exist_ok=True)
                path = failures / f"{name}_{len(found)}"
                path.write_bytes(content)
                found[kind] = path
                print(f"{kind}: {str(error)[:200]}\n  {path}", flush=True)
        finally:
            faulthandler.cancel_dump_traceback_later()

    rounds = 0
    while time.monotonic() < end:
        given_run = given(mutations(contents) | st.binary(max_size=64))(attempt)
        bounded = settings(
            max_examples=1000, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck
        )
        seeded(seed + rounds)(bounded(given_run))()
        rounds += 1
    print(f"{name}: {counts[0]:,} files, {counts[1]:,} of them read, {len(found)} kinds of failure", flush=True)
    return len(found)


def follow_coverage(atheris: object, name: str, seconds: float, failures: Path) -> None:
    """Run one target by atheris, which ends the process, at the first failure or when the time is over."""
    with atheris.instrument_imports(include=["allmlp"]):
        from tests.fuzzing import TARGETS
    target = TARGETS[name]
    corpus = failures / f"corpus_{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(content)
    options = [f"-max_total_time={int(seconds)}", f"-timeout={HANG}", f"-artifact_prefix={failures}/{name}_"]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=8192", "-max_len=262144", str(corpus)], target.run)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="targets of tests/fuzzing.py (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument("--failures", type=Path, default=Path("runs/fuzz"), help="where what fails is written to")
    options = parser.parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if len(options.targets) == 1:
        with contextlib.suppress(ImportError):
            import atheris

            follow_coverage(atheris, options.targets[0], options.seconds, options.failures)
    from tests.fuzzing import TARGETS

    names = options.targets or list(TARGETS)
    failed = sum(mutate(name, options.seconds / len(names), options.failures, options.seed) for name in names)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
