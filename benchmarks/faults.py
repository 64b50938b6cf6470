"""Trainings that are killed, starved of disk or robbed of a process, and what becomes of them (docs/faults.md).

    python benchmarks/faults.py

Every training is a process of its own, as users start it, and is compared bit for bit with one that nothing happened
to. It writes `benchmarks/results/faults.json` and what docs/faults.md shows of it. On two cores it takes about fifteen
minutes; `--kills` makes it shorter, `--parts` restricts it. The full disk is a small tmpfs in a mount namespace
(`unshare`, Linux).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
# Everything with a state of its own, and a checkpoint every few steps, so that kills fall into saves too.
VISION = """
task: image-classification
data: digits
model: gmlp_nano_patch4_32
model_args: {patch_size: 2, num_blocks: 2, embed_dim: 32}
img_size: 8
epochs: 4
batch_size: 64
accumulate: 2
lr: 2.0e-3
ema: 0.99
drop: 0.1
drop_path: 0.1
mixup: 0.8
cutmix: 1.0
random_erasing: 0.2
auto_augment: rand-m5
workers: 2
eval_every: 4
precision: fp32
"""
LANGUAGE = f"""
task: fill-mask
data: {argparse.__file__}
model: gmlp_nano
model_args: {{num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128}}
context: 64
dropout: 0.1
survival: 0.9
batch_size: 32
max_steps: 101
ema: 0.99
eval_every: 10
precision: fp32
"""
RECIPES = {"vision": VISION, "language": LANGUAGE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each kind of training (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    if not options.page:
        measure(options)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(options: argparse.Namespace) -> None:
    """Write the results of some parts beside those of the others."""
    from allmlp.files import write_json
    from allmlp.machine import surroundings

    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](Path(folder), options)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results = {**results, **found, "surroundings": surroundings()}
        write_json(RESULTS, results)
        print(json.dumps(found, indent=2), flush=True)


def write_page(found: dict[str, Any]) -> None:
    """Put the figures into the documentation."""
    from allmlp.benchmark.report import replace_part

    lines = [
        "| training | steps | kills | before the first checkpoint | in the middle of a save | runs | bit for bit |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("steps", "kills", "before_the_first_checkpoint", "in_the_middle_of_a_save", "runs", "identical")
    for kind, figures in found.get("kills", {}).items():
        lines.append(f"| {kind} | {' | '.join(str(figures[column]) for column in columns)} |")
    events = []
    if "disk" in found:
        events.append(("a full disk, then room and `--resume`", found["disk"]["exit_code"], found["disk"]["identical"]))
    if "ranks" in found:
        restarted, asked = found["ranks"]["restarted"], found["ranks"]["sigterm"]
        events.append(("one of two killed, `--max-restarts 1`", restarted["exit_code"], restarted["identical"]))
        events.append(("SIGTERM to one of two, then `--resume`", asked["exit_code"], asked["resumed_identical"]))
    lines += ["", "| what happens | exit code | bit for bit |", "|---|---|---|"]
    lines += [f"| {what} | {code} | {'yes' if same else 'no'} |" for what, code, same in events]
    seconds = [lost["seconds_until_all_had_ended"] for lost in found.get("ranks", {}).get("lost", ())]
    if seconds:
        lines += ["", f"Of two processes one killed, without a restart: all had ended within {max(seconds)} s."]
    replace_part(PAGE, "faults", "\n".join(lines))


def kills(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs that are killed at random moments and resumed until they end; each moment of a training is as likely."""
    chance = random.Random(options.seed)
    results = {}
    for kind, recipe in RECIPES.items():
        (folder / f"{kind}.yaml").write_text(recipe, encoding="utf-8")
        whole = folder / kind
        process = train(folder / f"{kind}.yaml", whole)
        began = began_at(process, whole)
        require(process.wait() == 0, f"the undisturbed {kind} training failed")
        length = (whole / "model.safetensors").stat().st_mtime - began
        killed, runs, identical = [], 0, 0
        while len(killed) < options.kills:
            run = folder / f"{kind}-{runs}"
            runs += 1
            while not (run / "metrics.json").exists():
                process = train(folder / f"{kind}.yaml", run, "--resume")
                if len(killed) < options.kills and began_at(process, run):
                    try:
                        process.wait(chance.uniform(0, length))
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                        killed.append(remains(run))
                code = process.wait()
                require(code in (0, -signal.SIGKILL), f"a resumed {kind} training failed")
            identical += (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
            print(f"{kind}: {len(killed)} kills, {identical} of {runs} runs identical", flush=True)
            shutil.rmtree(run)
        results[kind] = {
            "kills": len(killed),
            "in_the_middle_of_a_save": sum(one["unfinished"] for one in killed),
            "before_the_first_checkpoint": sum(one["checkpoint"] is None for one in killed),
            "runs": runs,
            "identical": identical,
            "steps": json.loads((whole / "metrics.json").read_text(encoding="utf-8"))["steps"],
            "each": killed,
        }
    return {"kills": results}


def disk(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run on a disk that gets full, then gets room; in a mount namespace, whose end takes the disk away."""
    recipe, whole, small = folder / "recipe.yaml", folder / "whole", folder / "small"
    recipe.write_text(LANGUAGE + "keep: 99\n", encoding="utf-8")
    require(train(recipe, whole).wait() == 0, "the undisturbed training failed")
    size = sum(path.stat().st_size for path in (whole / "checkpoint-10").iterdir())
    small.mkdir()
    allmlp, load = f"{sys.executable} -m allmlp", "import allmlp, sys; allmlp.load(sys.argv[1])"
    # Room for three checkpoints and a half.
    script = f"""
    mount -t tmpfs -o size={int(3.5 * size)} tmpfs {small}
    {allmlp} train --recipe {recipe} --output {small}/run 2> {folder}/said; echo $? > {folder}/code
    ls -A {small}/run > {folder}/left
    {sys.executable} -c '{load}' $(ls -d {small}/run/checkpoint-* | sort -V | tail -1) || exit 1
    mount -o remount,size=1g {small}
    {allmlp} train --resume --output {small}/run && cp {small}/run/model.safetensors {folder}/resumed
    """
    subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], env=environment(), check=True)
    return {
        "disk": {
            "exit_code": int((folder / "code").read_text()),
            "message": (folder / "said").read_text().splitlines()[-1].replace(str(small), "RUNS"),
            "left": sorted((folder / "left").read_text().split()),
            "identical": (folder / "resumed").read_bytes() == (whole / "model.safetensors").read_bytes(),
        }
    }


def ranks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two processes of which one is killed, with and without a restart; and of which one is asked to stop."""
    recipe, whole = folder / "recipe.yaml", folder / "whole"
    recipe.write_text(VISION.replace("workers: 2", "workers: 0"), encoding="utf-8")
    require(launch(recipe, whole).wait() == 0, "the undisturbed training failed")
    lost = []
    for rank in (0, 1):
        run = folder / f"lost-{rank}"
        launcher = launch(recipe, run)
        wait_for(lambda run=run: list(run.glob("checkpoint-*")), launcher)
        members = workers(launcher.pid)
        since = time.monotonic()
        os.kill(members[rank], signal.SIGKILL)
        launcher.wait()
        said = (folder / f"{run.name}.txt").read_text(encoding="utf-8")
        lost.append(
            {
                "killed": rank,
                "seconds_until_all_had_ended": round(time.monotonic() - since, 1),
                "exit_code": launcher.returncode,
                "left_over": sum(Path(f"/proc/{pid}").exists() for pid in members.values()),
                "message": next((line for line in said.splitlines() if "Lost process" in line), None),
            }
        )
        lost[-1]["message"] = str(lost[-1]["message"]).replace(str(folder), "RUNS")
    run = folder / "restarted"
    launcher = launch(recipe, run, restarts=1)
    wait_for(lambda: list(run.glob("checkpoint-*")), launcher)
    os.kill(workers(launcher.pid)[1], signal.SIGKILL)
    restarted = launcher.wait()
    run = folder / "asked"
    launcher = launch(recipe, run)
    wait_for(lambda: list(run.glob("checkpoint-*")), launcher)
    # One of the two alone: they have to agree on a step.
    os.kill(workers(launcher.pid)[1], signal.SIGTERM)
    asked = launcher.wait()
    finished = (run / "config.json").exists()
    require(launch(recipe, run, "--resume").wait() == 0, "the resumed training failed")
    weights = {name: (folder / name / "model.safetensors").read_bytes() for name in ("whole", "restarted", "asked")}
    return {
        "ranks": {
            "lost": lost,
            "restarted": {"exit_code": restarted, "identical": weights["restarted"] == weights["whole"]},
            "sigterm": {
                "exit_code": asked,
                "stopped_early": not finished,
                "resumed_identical": weights["asked"] == weights["whole"],
            },
        }
    }


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def train(recipe: Path, output: Path, *flags: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "allmlp", "train", "--recipe", str(recipe), "--output", str(output), *flags]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def launch(recipe: Path, output: Path, *flags: str, restarts: int = 0) -> "subprocess.Popen[bytes]":
    """Two processes under torchrun; what they say goes into a file beside the run."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "--max-restarts", str(restarts), "-m", "allmlp", "train", "--recipe", str(recipe)]
    with Path(f"{output}.txt").open("wb") as said:
        command += ["--output", str(output), *flags]
        return subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=said)


def workers(launcher: int) -> dict[int, int]:
    """The process of each rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(folder.name)
    return found


def began_at(process: "subprocess.Popen[bytes]", run: Path) -> float | None:
    """When its training begins, which is when it opens its TensorBoard file; None where it ends before."""
    before = len(list(run.glob("tensorboard/*")))
    return wait_for(lambda: len(list(run.glob("tensorboard/*"))) > before, process)


def wait_for(event: Any, process: "subprocess.Popen[bytes]") -> float | None:
    while not event():
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    return time.time()


def remains(run: Path) -> dict[str, Any]:
    """What a kill leaves: the last checkpoint's step, and whether another was being written."""
    from allmlp.checkpoints.training_checkpoints import checkpoint_step, last_checkpoint
    from allmlp.files import UNFINISHED

    checkpoint = last_checkpoint(run)
    step = checkpoint_step(checkpoint) if checkpoint else None
    return {"checkpoint": step, "unfinished": (run / UNFINISHED).exists()}


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


PARTS = {"kills": kills, "disk": disk, "ranks": ranks}

if __name__ == "__main__":
    main()
