"""The command line: arguments to calls, nothing else. Torch is loaded by the commands that need it, not by `--help`."""

import argparse
import dataclasses
import io
import json
import logging
import os
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from allmlp._version import __version__
from allmlp.distributed import is_first_process
from allmlp.errors import Diverged, Interrupted, TrainingError, UserError, first_line
from allmlp.training.recipe import RECIPES, Recipe, make_recipe, read_settings, task_of
from allmlp.training.values import parse_yaml

DONE, FAILED = 0, 1  # argparse exits with 2 for misuse
TRAIN_EXTRA = ("accelerate", "datasets", "matplotlib", "sklearn", "tensorboard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; the process's own by default.

    Returns:
        The exit code: 0 done, 1 failed. Misuse leaves through `SystemExit(2)`.
    """
    # A file's name may be no text.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    _quieten()
    try:
        options.run(options)
        # Unlike the stream's own method, it takes a process without one.
        print(end="", flush=True)
    except (Interrupted, Diverged) as stop:
        # It stops every process of a distributed training, and the first one tells.
        if is_first_process():
            _fail(str(stop))
        return DONE if isinstance(stop, Interrupted) and stop.by_scheduler else FAILED
    except (UserError, TrainingError) as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read the answer has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        return _fail(f"This needs {error.name}; install it with: pip install 'allmlp[train]'")
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        return _fail("stopped")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allmlp", description="Neural networks without attention.")
    parser.add_argument("--version", action="version", version=f"allmlp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_models,
        _add_info,
        _add_train,
        _add_evaluate,
        _add_predict,
        _add_generate,
        _add_convert,
        _add_benchmark,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _add_models(commands: Any) -> None:
    parser = _command(commands, "models", _models, "list the models with their published figures")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="a shell pattern such as 'vip_*'")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def _models(options: argparse.Namespace) -> None:
    from allmlp.catalogue import list_models
    from allmlp.tables import table

    cards = list_models(options.pattern)
    if not cards:
        raise UserError(f"No model's name matches '{options.pattern}'.")
    rows = [("model", "family", "parameters", "MACs", "top 1", "perplexity", "paper")]
    for card in cards:
        size, work = f"{card.parameters / 1e6:.2f}M", f"{card.macs / 1e9:.2f}G"
        top1, perplexity = ("–" if score is None else f"{score:.2f}" for score in (card.top1, card.perplexity))
        rows.append((card.name, card.family, size, work, top1, perplexity, card.url))
    _answer(options, [dataclasses.asdict(card) for card in cards], lambda: table(rows, right=(2, 3, 4, 5)))


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", _info, "show a model's layers: shapes, parameters, multiply-adds")
    parser.add_argument("model", metavar="MODEL", help="a model's name")
    parser.add_argument("--img-size", type=_size, metavar="N", help="image size in pixels: 256, or HEIGHTxWIDTH")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def _info(options: argparse.Namespace) -> None:
    import allmlp.vision  # noqa: F401 registers the architectures
    from allmlp.catalogue import is_language, layer_table, list_models
    from allmlp.checkpoints.timm_models import require_architecture

    if not is_language(options.model):
        require_architecture(options.model, also=[card.name for card in list_models() if is_language(card.name)])
    try:
        layers = layer_table(options.model, options.img_size)
    # Name and size drive the constructors of any architecture.
    except Exception as error:
        raise UserError(f"{options.model} cannot be made so: {first_line(error)}") from error
    totals = {"parameters": layers.parameters, "macs": layers.macs}
    _answer(options, {**dataclasses.asdict(layers), **totals}, lambda: str(layers))


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "train or fine-tune a model")
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        default=argparse.SUPPRESS,
        help="images: digits, a folder of class folders; text: python-stdlib, a text file, a folder of them, a CSV "
        "or JSON Lines file; either: parquet or tar files, or a Hub dataset's name; may be left out where the recipe "
        "names it",
    )
    parser.add_argument(
        "--task", choices=RECIPES, default=argparse.SUPPRESS, help="what to learn (default: what the model is for)"
    )
    parser.add_argument("--output", type=_named("a directory"), required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--recipe", metavar="FILE", help="hyper-parameters from a YAML file; flags win over it")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run directory")
    parser.add_argument("--overwrite", action="store_true", help="replace a former run in the run directory")
    parser.add_argument("--json", action="store_true", help="answer with the metrics in JSON")
    known = {"data"}
    _add_recipe_flags(parser.add_argument_group("hyper-parameters"), Recipe, known)
    for task, kind in RECIPES.items():
        _add_recipe_flags(parser.add_argument_group(f"hyper-parameters of {task}"), kind, known)


def _add_recipe_flags(group: Any, kind: type[Recipe], known: set[str]) -> None:
    """One flag for each of a recipe's fields that is not known yet; a flag not given leaves no trace."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in known:
            continue
        known.add(field.name)
        flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, (int, float, str)) and hints[field.name] is not bool:
            text += f" (default: {_default(field.name)})"
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if hints[field.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif field.metadata["choices"]:
            settings["choices"] = field.metadata["choices"]
        else:
            settings["metavar"] = field.name.upper()
        group.add_argument(flag, **settings)


def _default(name: str) -> str:
    """A field's default, task by task where they differ."""
    defaults: dict[str, list[str]] = {}
    for task, kind in RECIPES.items():
        for field in dataclasses.fields(kind):
            if field.name == name:
                defaults.setdefault(str(field.default), []).append(task)
    if len(defaults) == 1:
        return next(iter(defaults))
    return "; ".join(f"{default} for {', '.join(tasks)}" for default, tasks in defaults.items())


def _train(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from allmlp import training

    metrics = training.train(recipe, options.output, resume=options.resume, overwrite=options.overwrite)
    if metrics:  # of a distributed training's processes the first answers
        _answer(options, metrics, lambda: training.summary(metrics, options.output))


def _recipe(options: argparse.Namespace) -> Recipe:
    """Defaults, under the run's own recipe when it is resumed, under the recipe file, under the flags."""
    settings: dict[str, Any] = {}
    former = Path(options.output) / "recipe.yaml"
    if options.resume and former.is_file():
        settings |= read_settings(former)
    if options.recipe:
        settings |= read_settings(options.recipe)
    names = {"task"} | {field.name for kind in RECIPES.values() for field in dataclasses.fields(kind)}
    settings |= {name: value for name, value in vars(options).items() if name in names}
    kind = RECIPES[task_of(settings)]
    settings.pop("task", None)
    return make_recipe(settings, kind, options.recipe or "the command line")


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", _evaluate, "measure a run's accuracy, class by class, or a text's nats and bits"
    )
    parser.add_argument("run_directory", type=_named("a run directory"), metavar="RUN", help="a run directory")
    parser.add_argument(
        "data", nargs="?", metavar="DATA", help="as for train; of the run's own data (the default) the held-out part"
    )
    _add_size_flags(parser)
    parser.add_argument(
        "--batch-size", type=_count, default=256, metavar="N", help="images or windows of text at a time (default: 256)"
    )
    parser.add_argument("--strict", action="store_true", help="fail at an image that cannot be read")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window of text to the next (default: the context)"
    )
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the images in a table (default: as in training)"
    )
    parser.add_argument("--text-column", metavar="NAME", help="column of the texts in a table, likewise")
    parser.add_argument("--label-column", metavar="NAME", help="column of the classes in a table, likewise")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def _add_size_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--img-size",
        type=_size,
        metavar="N",
        help="resize images to this size in pixels, 256 or HEIGHTxWIDTH, and the model's weights with them",
    )
    parser.add_argument(
        "--patch-kernel",
        type=_size,
        metavar="N",
        help="pixels that a patch sees; where --img-size enlarges the pictures, enlarge it as much",
    )


def _evaluate(options: argparse.Namespace) -> None:
    if _reads_text(options):
        from allmlp.training import language_evaluation, language_report

        _refuse(options, "text", ("img_size", "patch_kernel", "strict", "image_column"))
        measured = language_evaluation.evaluate(
            options.run_directory,
            options.data,
            batch_size=options.batch_size,
            stride=options.stride,
            text_column=options.text_column,
            label_column=options.label_column,
        )
        _answer(options, measured, lambda: language_report.evaluation_text(measured))
        return
    from allmlp.training import evaluation

    _refuse(options, "images", ("stride", "text_column"))
    found = evaluation.evaluate(
        options.run_directory,
        options.data,
        img_size=options.img_size,
        patch_kernel=options.patch_kernel,
        batch_size=options.batch_size,
        strict=options.strict,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    _answer(options, found, lambda: evaluation.accuracy_text(found))


def _reads_text(options: argparse.Namespace) -> bool:
    from allmlp.checkpoints import run_directory

    return run_directory.read_config(options.run_directory)["model_type"] == run_directory.LANGUAGE


def _refuse(options: argparse.Namespace, kind: str, names: Sequence[str]) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
    if given:
        raise UserError(f"{options.run_directory} holds a model of {kind}: leave {' and '.join(given)} out.")


def _add_predict(commands: Any) -> None:
    parser = _command(commands, "predict", _predict, "name the likeliest classes of images, or of texts")
    parser.add_argument("run_directory", type=_named("a run directory"), metavar="RUN", help="a run directory")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="image files, or for a model of text text files; or folders of them"
    )
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be repeated")
    _add_size_flags(parser)
    parser.add_argument("--top-k", type=int, default=3, metavar="K", help="classes of each (default: 3)")
    parser.add_argument("--strict", action="store_true", help="fail at a file that cannot be read")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def _predict(options: argparse.Namespace) -> None:
    from allmlp.training import evaluation

    common = {"top_k": options.top_k, "strict": options.strict}
    if _reads_text(options):
        from allmlp.training import language_evaluation

        _refuse(options, "text", ("img_size", "patch_kernel"))
        found = language_evaluation.predict(options.run_directory, options.files, options.text or (), **common)
    else:
        _refuse(options, "images", ("text",))
        sizes = {"img_size": options.img_size, "patch_kernel": options.patch_kernel}
        found = evaluation.predict(options.run_directory, options.files, **sizes, **common)
    broken = [f"{entry['file']} ({entry['error']})" for entry in found if "error" in entry]
    if broken:
        logging.getLogger("allmlp").warning("left out %d of %d: %s", len(broken), len(found), ", ".join(broken[:5]))
    if len(broken) == len(found):
        raise UserError("None of the files can be read.")
    _answer(options, found, lambda: evaluation.predictions_text(found))


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "let a language model write")
    parser.add_argument("run_directory", type=_named("a run directory"), metavar="RUN", help="a run directory")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="how the text begins; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0: the likeliest token each time (default: 0.8; 0 for a beam search)",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default: 0, all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest with this share")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="beam search (default: 1, none)")
    parser.add_argument(
        "--context-overflow",
        choices=("stop", "reprefill"),
        default="stop",
        help="where the context is full: stop (default), or go on from its last half",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def _generate(options: argparse.Namespace) -> None:
    from allmlp.training import language_evaluation

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "beams", "context_overflow", "seed")
    settings = {name: getattr(options, name) for name in names}
    if settings["temperature"] is None:
        settings["temperature"] = 0.8 if options.beams == 1 else 0.0
    written = language_evaluation.generate(options.run_directory, options.prompt, **settings)
    _answer(options, written, lambda: "\n\n".join(entry["prompt"] + entry["text"] for entry in written))


def _add_convert(commands: Any) -> None:
    parser = _command(commands, "convert", _convert, "make a run directory of a public checkpoint")
    parser.add_argument(
        "checkpoint",
        type=_named("a checkpoint"),
        metavar="CHECKPOINT",
        help="a .pth, .pt, .bin, .safetensors or .npz file, the .index.json of several, a directory with one of them, "
        "or timm:NAME",
    )
    parser.add_argument("--output", type=_named("a directory"), required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--source", metavar="S", help="who saved it; found out where it is left away")
    parser.add_argument(
        "--set",
        dest="facts",
        action="append",
        nargs="+",
        type=_fact,
        default=[],
        metavar="KEY=VALUE",
        help="what the checkpoint does not store, such as causal=true gate_act=none shift_size=5 img_size=[192,256]",
    )
    parser.add_argument("--classes", metavar="FILE", help="the names of an image model's classes, one a line")
    parser.add_argument(
        "--tokenizer", metavar="T", help="a language model's tokenizer: bytes, a directory or the Hub's name"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a former run in the run directory")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def _convert(options: argparse.Namespace) -> None:
    from allmlp.checkpoints import conversion, pretrained
    from allmlp.data.tokenization import fitting_tokenizer

    conversion.refuse_output(options.output, overwrite=options.overwrite)
    facts = dict(fact for given in options.facts for fact in given)
    names = None if options.classes is None else _lines(options.classes)
    if names == []:
        raise UserError(f"{options.classes} is empty; it should name the model's classes, one a line.")
    if options.checkpoint.startswith(pretrained.TIMM):
        if facts or options.source not in (None, "timm"):
            raise UserError("timm's own weights come with all that has to be known: leave --source and --set out.")
        found = pretrained.from_timm(options.checkpoint.removeprefix(pretrained.TIMM))
    else:
        found = conversion.convert_checkpoint(options.checkpoint, options.source, facts)
    tokenizer = fitting_tokenizer(options.tokenizer, found.model) if options.tokenizer else None
    conversion.write_run_directory(
        found, options.output, classes=names, tokenizer=tokenizer, overwrite=options.overwrite
    )
    answer = {**found.summary(), "run_directory": options.output}
    _answer(options, answer, lambda: conversion.summary_text(answer))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error


def _fact(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form KEY=VALUE")
    try:
        return name, parse_yaml(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' has no value that can be read") from error


def _add_benchmark(commands: Any) -> None:
    parser = _command(
        commands, "benchmark", _benchmark, "time models beside their peers and their bare matrix products"
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models' names (default: one of each vision family)")
    parser.add_argument("--task", nargs="+", choices=("inference", "training"), default=["inference"], help="what runs")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="computed in")
    parser.add_argument(
        "--batch-size", nargs="+", type=_count, metavar="N", default=[8], help="images or texts of one call"
    )
    parser.add_argument("--compiled", action="store_true", help="through torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--threads", type=_count, metavar="N", help="threads of a CPU (default: torch's own choice)")
    parser.add_argument("--rounds", type=_count, metavar="N", default=5, help="timed calls of each (default: 5)")
    parser.add_argument(
        "--peer-path",
        type=_peer_path,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a checkout of a peer that cannot be installed: AS-MLP, VisionPermutator, Jittor-MLP",
    )
    parser.add_argument("--output", metavar="FILE", help="keep the results as JSON")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def _benchmark(options: argparse.Namespace) -> None:
    # torch's profiler, which sees the memory, reports its own start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    import allmlp.vision  # noqa: F401 registers the architectures
    from allmlp.benchmark import (
        MODELS,
        Result,
        check,
        checkouts,
        machine,
        measure,
        result_table,
        settings,
        write_results,
    )
    from allmlp.files import check_writable
    from allmlp.tables import table

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    paths = checkouts(dict(options.peer_path))
    wanted = settings(
        options.models or MODELS,
        tasks=options.task,
        dtypes=options.dtype,
        compiled=(options.compiled,),
        batch_sizes=options.batch_size,
        device=options.device,
    )
    for setting in wanted:
        check(setting)
    if options.output:
        check_writable(options.output)
    skipped: dict[str, None] = {}
    results: list[Result] = []
    try:
        for setting in wanted:
            results += measure(setting, peer_paths=paths, rounds=options.rounds, skipped=skipped.setdefault)
            if options.output:
                write_results(Path(options.output), results, machine())
    finally:
        # Whatever stops it, what has been measured is shown.
        for reason in skipped:
            print(f"left out: {reason}", file=sys.stderr)
        if results:
            answer = {"machine": machine(), "results": [result.as_dict() for result in results]}
            _answer(options, answer, lambda: table(result_table(results), right=(2, 3, 5, 6)))


def _named(what: str) -> Callable[[str], str]:
    """The type of an argument that names something of this kind."""

    def check(text: str) -> str:
        # pathlib takes an empty name, such as an unset variable's, for the current directory.
        if not text.strip():
            raise argparse.ArgumentTypeError(f"must name {what}, got an empty name")
        return text

    return check


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _peer_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, got {text!r}")
    return name, path


def _size(text: str) -> int | tuple[int, int]:
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no image size such as 256 or 224x320")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _answer(options: argparse.Namespace, content: Any, text: Callable[[], str]) -> None:
    print(_json(content) if options.json else text())


def _json(content: Any) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        # The stream's own escapes are not all JSON's.
        return json.dumps(content, indent=2)
    return text


def _quieten() -> None:
    """What allmlp has to say goes to stderr line by line; what the libraries beneath mutter, nowhere."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    log = logging.getLogger("allmlp")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}"


def _fail(message: str) -> int:
    print(f"allmlp: {message}", file=sys.stderr)
    return FAILED
