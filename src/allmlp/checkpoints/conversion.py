"""Public all-MLP checkpoints to models here, whoever saved them."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from allmlp.checkpoints import (
    as_mlp,
    deit,
    google_mixer,
    jaketae,
    labml,
    lucidrains,
    lucidrains_mixer,
    run_directory,
    timm,
    vip,
)
from allmlp.checkpoints.architecture import Architecture, LanguageArchitecture
from allmlp.checkpoints.fitting import check_shapes, with_weights
from allmlp.checkpoints.layout import Layout, Tensors
from allmlp.checkpoints.reading import read_checkpoint
from allmlp.checkpoints.unwrapping import check_weights, unwrap
from allmlp.errors import UserError, first_line, listed, nearest, shown
from allmlp.files import check_writable

LAYOUTS: tuple[Layout, ...] = (
    *timm.LAYOUTS,
    *lucidrains.LAYOUTS,
    *lucidrains_mixer.LAYOUTS,
    *jaketae.LAYOUTS,
    *labml.LAYOUTS,
    *as_mlp.LAYOUTS,
    *vip.LAYOUTS,
    *google_mixer.LAYOUTS,
    *deit.LAYOUTS,
)
SOURCES = tuple(dict.fromkeys(layout.source for layout in LAYOUTS))
_log = logging.getLogger(__name__)


class MissingFacts(UserError):
    """A checkpoint does not store everything about its model.

    Attributes:
        names: what has to be given.
    """

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        model: the model, with its weights, in eval mode.
        architecture: how to build it anew.
        layout: what the checkpoint turned out to be.
        notes: what was chosen, assumed and left out, a sentence each.
        classes: the names of an image model's classes, where they are known.
    """

    model: Any
    architecture: Architecture
    layout: Layout
    notes: tuple[str, ...]
    classes: tuple[str, ...] | None = None

    def summary(self) -> dict[str, Any]:
        """What was found out, in JSON's types."""
        if isinstance(self.architecture, LanguageArchitecture):
            arguments = self.architecture.config
        else:
            arguments = {"num_classes": self.architecture.num_classes, **self.architecture.model_args}
        return {
            "source": self.layout.source,
            "family": self.layout.family,
            "model": self.architecture.name,
            "arguments": arguments,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "notes": list(self.notes),
        }


def convert(path: str | Path, source: str | None = None, **facts: Any) -> nn.Module:
    """A public checkpoint as a model of this library that computes the same.

    The source and the architecture are found out from the weights' names and shapes. What no checkpoint stores has to
    be given by name, such as `causal` and `gate_act` of lucidrains' language models; docs/checkpoints.md lists it all.

    Args:
        path: the checkpoint; PyTorch, safetensors or NumPy. No code in it is run.
        source: who saved it, where that is to be checked: one of `SOURCES`.
        facts: what the checkpoint does not store.

    Returns:
        For images timm's kind of module, `[batch, channels, height, width]` to logits; for text one of transformers'
        kind, batch first. In eval mode, on the CPU, in float32 (float64 where the checkpoint has it).

    Raises:
        UserError: if the file cannot be read, is of no known source, lacks facts (`MissingFacts`), or its weights do
            not add up.
    """
    conversion = convert_checkpoint(path, source, facts)
    for note in conversion.notes:
        _log.warning("%s: %s", path, note)
    return conversion.model


def convert_checkpoint(
    path: str | Path, source: str | None = None, facts: Mapping[str, Any] | None = None
) -> Conversion:
    """`convert`, with everything that was found out; arguments and errors as there."""
    contents = read_checkpoint(path)
    try:
        found = convert_state_dict(contents, source, facts)
    except MissingFacts as error:
        raise MissingFacts(f"{path}: {error}", error.names) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if isinstance(found.architecture, LanguageArchitecture):
        return found
    cfg = found.model.pretrained_cfg
    prepared = f"How images were prepared is not stored; mean {cfg['mean']} and std {cfg['std']} are assumed."
    return dataclasses.replace(found, notes=(*found.notes, prepared + _told_by_a_run(Path(path))))


def _told_by_a_run(path: Path) -> str:
    """A sentence that names the run directory in which weights lie, which says what they do not; else nothing."""
    folder = path if path.is_dir() else path.parent
    try:
        is_run = run_directory.read_config(folder)["model_type"] == run_directory.VISION
    except UserError:
        is_run = False
    return f" {folder} is a run directory, which says how: use it as it is, in place of its weights." if is_run else ""


def convert_state_dict(
    contents: Mapping[str, Any], source: str | None = None, facts: Mapping[str, Any] | None = None
) -> Conversion:
    """`convert` for a state dict in memory.

    Args:
        contents: the state dict, or what a trainer saves, with the state dict in it.
        source: as in `convert`.
        facts: as in `convert`.
    """
    wanted = None if source is None else _known_source(source)
    unwrapped = unwrap(contents, LAYOUTS)
    layout, tensors = unwrapped.layout, unwrapped.tensors
    if wanted not in (None, layout.source):
        raise UserError(f"This is no checkpoint of {wanted}: its weights have the names of {layout.source}.")
    check_weights(tensors)
    known = _known_facts(layout, facts or {}, unwrapped.beside)
    architecture, renamed = layout.convert(tensors, known)
    where = f"this checkpoint ({layout.source}, {layout.family})"
    # What does not fit is found out before it takes memory.
    with torch.device("meta"):
        blank = architecture.build()
    weights = _fit(renamed, blank)
    check_shapes(blank, {name: list(tensor.shape) for name, tensor in weights.items()}, where)
    model = with_weights(blank, architecture.build, weights, where)
    assumed = [
        f"{fact.name} is not stored; {fact.assumed.format(model=model)} is assumed."
        for fact in layout.facts
        if fact.assumed and fact.name not in known
    ]
    notes = (*unwrapped.notes, *assumed, *architecture.notes)
    return Conversion(model=model.eval(), architecture=architecture, layout=layout, notes=notes)


def summary_text(found: Mapping[str, Any]) -> str:
    """`Conversion.summary`, with the `run_directory` it was written to, as text."""
    arguments = ", ".join(f"{name}={value}" for name, value in found["arguments"].items())
    return "\n".join(
        [
            f"{found['source']}: {found['family']}",
            f"{found['model']}({arguments}), {found['parameters']:,} parameters",
            *found["notes"],
            f"run directory  {found['run_directory']}",
        ]
    )


def export_state_dict(model: nn.Module, target: str) -> dict[str, Tensor]:
    """A model's weights as another project loads them.

    Args:
        model: a model of this library.
        target: `"timm"`.

    Raises:
        UserError: if the project has no such model, or computes it differently.
    """
    if target != "timm":
        raise UserError(f"There is no export to '{target}', only to timm.")
    return timm.export(model)


def refuse_output(directory: str | Path, *, overwrite: bool) -> None:
    """Check that a run may be written to a directory; to be asked before a checkpoint is read for minutes.

    Raises:
        UserError: if there is a run that is not to be replaced, or nothing can be written there.
    """
    former = run_directory.former_run(directory)
    if former and not overwrite:
        there = listed([path.name for path in former])
        raise UserError(
            f"{directory} holds a run already: {there}. Choose another --output, or replace it (--overwrite)."
        )
    try:
        check_writable(Path(directory) / run_directory.CONFIG)
    except OSError as error:
        raise UserError(f"{directory} cannot be written to: {first_line(error)}") from error


def write_run_directory(
    conversion: Conversion,
    directory: str | Path,
    *,
    classes: Sequence[str] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a converted checkpoint as a run directory.

    Args:
        conversion: what `convert_checkpoint` gives.
        directory: where to.
        classes: the names of an image model's classes; numbers where they are not known.
        tokenizer: a language model's tokenizer, to be put beside it; it says which tokens begin and end a text.
        overwrite: replace a run that lies there.

    Raises:
        UserError: as `refuse_output`, or if the names do not fit the model, or one is blank; or the run cannot be
            written, and a former one is still there.
    """
    directory, model, architecture = Path(directory), conversion.model, conversion.architecture
    refuse_output(directory, overwrite=overwrite)
    if isinstance(architecture, LanguageArchitecture):
        if classes is not None:
            raise UserError("This is a language model: it has no classes to be named.")
        if tokenizer is not None:
            _end_texts_as(tokenizer, model)
        _replace(directory, lambda: run_directory.save_language(directory, model, tokenizer))
        return
    known = conversion.classes if classes is None else classes
    names = [str(index) for index in range(architecture.num_classes)] if known is None else known
    if len(names) != architecture.num_classes:
        raise UserError(f"The model has {architecture.num_classes} classes, but there are {len(names)} names.")
    if not all(map(str.strip, names)):
        raise UserError("One of the classes' names is blank.")
    # As in ImageNet, where cranes lift and fly.
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        _log.warning("more than one class is called %s", ", ".join(repeated[:8]))
    wrapped = run_directory.classifier(model, architecture.name, architecture.model_args, names)
    _replace(directory, lambda: run_directory.save_classifier(wrapped, directory))


def _end_texts_as(tokenizer: Any, model: Any) -> None:
    """Have a language model begin, end and fill up texts with its tokenizer's tokens, which no checkpoint stores."""
    from allmlp.language.configuration import said_by

    # One that does not write has no configuration of it.
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for name, token in said_by(tokenizer).items():
            setattr(config, name, token)


def _replace(directory: Path, save: Callable[[], Container[str]]) -> None:
    """Save a run, then remove what is left of a former one, which stays as it is where there is no room."""
    former = run_directory.former_run(directory)
    try:
        written = save()
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be written to: {first_line(error)}") from error
    run_directory.remove_unfinished(directory)
    run_directory.remove(former, keep=written)


def _known_source(name: str) -> str:
    """A source by its name, however it is written.

    Raises:
        UserError: if there is none.
    """
    source = str(name).lower().replace("_", "-")
    if source not in SOURCES:
        raise UserError(f"There is no source '{source}', only {', '.join(SOURCES)}.{nearest(source, SOURCES)}")
    return source


def _known_facts(layout: Layout, given: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known about a model beside its weights."""
    named = {fact.name: fact for fact in layout.facts}
    kind = f"a {layout.source} checkpoint ({layout.family})"
    unknown = [name for name in given if name not in named]
    if unknown:
        allowed = f"what can be given is {', '.join(named)}" if named else "nothing has to be given"
        raise UserError(f"This is {kind}, for which there is no {', '.join(unknown)}; {allowed}.")
    known: dict[str, Any] = {}
    stored = layout.stored(beside) if layout.stored else {}
    for name, value in {**stored, **given}.items():
        try:
            known[name] = named[name].parse(value)
        except ValueError as error:
            raise UserError(f"{name} is {shown(value)}; it should be {error}") from error
    missing = [fact for fact in layout.facts if fact.required and fact.name not in known]
    if missing:
        names = [fact.name for fact in missing]
        raise MissingFacts(
            f"This is {kind}, which does not store {' and '.join(names)}. Give "
            + "; ".join(f"{fact.name}: {fact.help}" for fact in missing)
            + f" (on the command line: --set {' '.join(f'{name}=…' for name in names)}).",
            names,
        )
    return known


def _fit(tensors: Tensors, model: nn.Module) -> Tensors:
    """The tensors in the model's shapes, where those differ in dimensions of size one alone."""
    fitted = {}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        shape = wanted.get(name, tensor.shape)
        if [size for size in tensor.shape if size != 1] == [size for size in shape if size != 1]:
            tensor = tensor.reshape(shape)
        fitted[name] = tensor
    return fitted
