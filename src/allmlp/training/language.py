"""From a language recipe to a trained run directory: causal and masked language models, classifiers of texts."""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from allmlp.checkpoints import run_directory
from allmlp.checkpoints.training_checkpoints import checkpoint_step
from allmlp.data import as_is
from allmlp.data.labelled_texts import TextBatches, load_labelled_texts
from allmlp.data.sampling import IGNORED
from allmlp.data.text import Masking, TextData, TokenWindows, load_text
from allmlp.data.text_stream import TokenStream, streamed_text
from allmlp.data.tokenization import BYTES, Tokens, fitting_tokenizer, make_tokenizer
from allmlp.distributed import process_count, process_index
from allmlp.errors import UserError, nearest, shown
from allmlp.language import GMLPConfig, GMLPForCausalLM, GMLPForMaskedLM, GMLPForSequenceClassification
from allmlp.language.configuration import MODEL_FIELDS, OF_THE_TOKENIZER, said_by
from allmlp.machine import surroundings
from allmlp.training import language_report
from allmlp.training.callbacks import TensorBoard
from allmlp.training.engine import Engine, chosen_precision, prepare_output, refuse_output
from allmlp.training.evaluation import accuracy_of
from allmlp.training.language_evaluation import classify, mask_token, model_tokenizer, text_loss, text_measures
from allmlp.training.recipe import CausalRecipe, LanguageRecipe, MaskedRecipe, TextClassificationRecipe

_log = logging.getLogger(__name__)


class WindowsEngine(Engine):
    """The Trainer for windows of text; its held-out loss counts each token once."""

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        # Given labels, the model takes its own loss of all windows at once, which needs several times their logits.
        unlabelled = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        if isinstance(self.model, GMLPForCausalLM):
            unlabelled["use_cache"] = False
        logits: Any = super().prediction_step(model, unlabelled, False, ignore_keys)[1]
        labels = inputs["labels"].to(logits.device)
        nats = [
            F.cross_entropy(window.float(), own, ignore_index=IGNORED, reduction="sum")
            for window, own in zip(logits, labels, strict=True)
        ]
        return None, torch.stack([torch.stack(nats), (labels != IGNORED).sum(1)], dim=1), None

    def held_out_loss(self, predictions: Any, labels: Any) -> float:
        nats, tokens = predictions.sum(0, dtype="float64")
        return float(nats / tokens)


_MODELS: dict[str, Any] = {
    CausalRecipe.task: GMLPForCausalLM,
    MaskedRecipe.task: GMLPForMaskedLM,
    TextClassificationRecipe.task: GMLPForSequenceClassification,
}


def train(
    recipe: LanguageRecipe, output: str | Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train a language model or a classifier of texts and write its run directory.

    Args:
        recipe: the hyper-parameters; `data`, and `model` or `start_from`, must be set.
        output: the run directory.
        resume: go on from the last checkpoint in it.
        overwrite: replace a former run in it.

    Returns:
        What `metrics.json` holds: the held-out score, its course, the speed, the surroundings.

    Raises:
        UserError: if data, model, tokenizer or run directory cannot be used.
        Interrupted: if it was asked to stop and has saved a checkpoint.
    """
    output = Path(output)
    if recipe.data is None:
        raise UserError("Nothing to train on: name the data.")
    refuse_output(output, recipe, resume=resume, overwrite=overwrite)
    set_seed(recipe.seed)
    if isinstance(recipe, TextClassificationRecipe):
        return _train_classifier(recipe, output, resume, overwrite)
    return _train_language_model(recipe, output, resume, overwrite)


def summary(metrics: dict[str, Any], output: Path) -> str:
    """The score, the speed, and where the run directory and its pictures are."""
    if metrics["task"] == TextClassificationRecipe.task:
        score = (
            f"accuracy {metrics['accuracy']:.2%} on {metrics['texts']:,} held-out texts (loss {metrics['loss']:.4f})"
        )
    else:
        score = language_report.measures_text(metrics, "held-out")
    return (
        f"{score}\n"
        f"{metrics['steps']:,} steps ({metrics['epochs']:g} epochs) in {metrics['training_seconds']:,.0f} s of "
        f"training, {metrics['per_second']:,.0f} {metrics['unit']}/s, {metrics['precision']}\n"
        f"run directory  {output}\n"
        f"report         {', '.join(str(output / path) for path in metrics['report'])}"
    )


def _train_language_model(recipe: LanguageRecipe, output: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    start, tokenizer = _start(recipe)
    load = streamed_text if recipe.streaming else functools.partial(load_text, holdout=recipe.holdout)
    data = load(
        str(recipe.data),
        tokenizer=tokenizer,
        tokenizer_name=recipe.tokenizer or BYTES,
        trained_size=recipe.train_tokenizer,
        text_column=recipe.text_column,
    )
    for part in (part for part in (data.train, data.validation) if isinstance(part, Tokens)):
        if part.unknown:
            _log.warning("%d tokens of %s stand for text the tokenizer does not know", part.unknown, recipe.data)
    config = planned_config(recipe, start, data.tokenizer)
    context = recipe.context or config.max_position_embeddings
    masking = None
    if isinstance(recipe, MaskedRecipe):
        masking = Masking(
            share=recipe.mask_share,
            mask_token=mask_token(data.tokenizer, recipe.tokenizer or recipe.start_from),
            vocabulary=len(data.tokenizer),
        )
    training = _training_windows(recipe, data, context, masking)
    held_out = TokenWindows(data.validation, context, masking=masking)
    model = build_model(recipe, config, start)
    # A training takes memory enough without the model that it has begun with.
    del start
    resume_from = prepare_output(
        output,
        recipe,
        model,
        resume=resume,
        overwrite=overwrite,
        tokenizer=data.tokenizer,
        unit="tokens",
        per_example=context,
    )
    _log.info(
        "%s, %s parameters, %d tokens at once: %s %s to learn from, %s tokens held out, vocabulary of %d, %s",
        type(model).__name__,
        f"{model.num_parameters():,}",
        context,
        f"{len(data.train):,}",
        "tokens" if isinstance(data.train, Tokens) else "documents",
        f"{len(data.validation):,}",
        len(data.tokenizer),
        chosen_precision(recipe.precision),
    )
    engine = _engine(
        WindowsEngine,
        recipe,
        output,
        model,
        training,
        held_out,
        "tokens",
        context,
        resume_from,
        tokenizer=data.tokenizer,
    )
    model = engine.run()
    if not engine.is_world_process_zero():
        return {}
    run_directory.save_language(output, model, data.tokenizer)
    loss, predicted = text_loss(model, held_out)
    measures = text_measures(loss, predicted, data.validation, masked=masking is not None)
    metrics = {**_common_metrics(recipe, engine, model, "tokens"), **measures}
    return _finish(
        output, metrics, language_report.write(output / run_directory.REPORT, metrics, model, data.tokenizer)
    )


def _training_windows(
    recipe: LanguageRecipe, data: TextData, context: int, masking: Masking | None
) -> TokenWindows | TokenStream:
    if isinstance(data.train, Tokens):
        return TokenWindows(data.train, context, masking=masking, seed=recipe.seed)
    if recipe.max_steps is None:
        raise UserError("How many tokens a stream holds is not known: say how long to learn from it (--max-steps).")
    return TokenStream(
        data.train,
        data.tokenizer,
        context,
        batch_size=recipe.batch_size,
        batches=recipe.max_steps * recipe.accumulate,
        seed=recipe.seed,
        buffer=recipe.shuffle_buffer,
        process=process_index(),
        processes=process_count(),
        masking=masking,
    )


def _train_classifier(recipe: TextClassificationRecipe, output: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    if recipe.streaming:
        raise UserError("Texts with classes do not stream: leave --streaming out.")
    start, tokenizer = _start(recipe)
    classes, train_texts, held_out_texts = load_labelled_texts(
        str(recipe.data),
        holdout=recipe.holdout,
        seed=recipe.seed,
        text_column=recipe.text_column,
        label_column=recipe.label_column,
    )
    if tokenizer is None:
        tokenizer = make_tokenizer(
            recipe.tokenizer or BYTES, [train_texts.documents(str(recipe.data))], trained_size=recipe.train_tokenizer
        )
    config = planned_config(recipe, start, tokenizer, classes)
    model = build_model(recipe, config, start)
    # A training takes memory enough without the model that it has begun with.
    del start
    context = recipe.context or config.max_position_embeddings
    training = TextBatches(train_texts, tokenizer, context)
    held_out = TextBatches(held_out_texts, tokenizer, context)
    resume_from = prepare_output(
        output, recipe, model, resume=resume, overwrite=overwrite, tokenizer=tokenizer, unit="texts"
    )
    _log.info(
        "%s parameters: %s texts to learn from, %s held out, %d classes, %s",
        f"{model.num_parameters():,}",
        f"{len(training):,}",
        f"{len(held_out):,}",
        len(classes),
        chosen_precision(recipe.precision),
    )
    engine = _engine(
        Engine,
        recipe,
        output,
        model,
        training,
        held_out,
        "texts",
        1,
        resume_from,
        tokenizer=tokenizer,
        compute_metrics=_accuracy_metric,
    )
    model = engine.run()
    if not engine.is_world_process_zero():
        return {}
    run_directory.save_language(output, model, tokenizer)
    logits, labels = classify(model, held_out)
    found = accuracy_of(logits, labels, classes, unit="texts")
    metrics = {**_common_metrics(recipe, engine, model, "texts"), **found}
    report = language_report.write_classification(
        output / run_directory.REPORT, metrics["history"], logits, labels, classes
    )
    return _finish(output, metrics, report)


def planned_config(recipe: LanguageRecipe, start: Any, tokenizer: Any, classes: tuple[str, ...] = ()) -> GMLPConfig:
    """The configuration of the model to train.

    Args:
        recipe: names the size, or the run to start from, and what is changed about it.
        start: the model to start from, or None.
        tokenizer: its length is the vocabulary's of a new model.
        classes: the names of a classifier's classes.

    Raises:
        UserError: if there is no such model, or it cannot be made so.
    """
    changes: dict[str, Any] = dict(recipe.model_args)
    known = [name for name in MODEL_FIELDS if name not in OF_THE_TOKENIZER]
    for name in changes:
        if name in OF_THE_TOKENIZER:
            raise UserError(f"model_args sets {name}: that is what the tokenizer says.")
        # A configuration would keep it, and the model not read it.
        if name not in known:
            raise UserError(f"model_args sets {shown(name)}, which no model has.{nearest(str(name), known)}")
    if recipe.dropout is not None:
        changes["hidden_dropout"] = recipe.dropout
    if recipe.survival is not None:
        changes["survival_probability"] = recipe.survival
    changes |= said_by(tokenizer)
    if classes:
        changes |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    try:
        if start is not None:
            if recipe.model is not None:
                raise UserError(f"The model in {recipe.start_from} has its own size: leave --model away.")
            config = GMLPConfig.from_dict({**start.config.to_dict(), **changes})
        elif recipe.model is not None:
            if recipe.context is not None:
                changes.setdefault("max_position_embeddings", recipe.context)
            config = GMLPConfig.named(recipe.model, **{"vocab_size": len(tokenizer), **changes})
        else:
            raise UserError("Nothing to train: name a model, or a run directory to start from.")
    except StrictDataclassError as error:
        raise UserError(f"The model cannot be made so: {' '.join(str(error).split())}") from error
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"The model has a vocabulary of {config.vocab_size}, the tokenizer {len(tokenizer)} tokens: leave "
            "vocab_size away, or make it as large."
        )
    if recipe.context and recipe.context > config.max_position_embeddings and config.spatial_weight == "dense":
        raise UserError(
            f"The context of {recipe.context} tokens is longer than the model's {config.max_position_embeddings}."
        )
    return config


def build_model(recipe: LanguageRecipe, config: GMLPConfig, start: Any) -> Any:
    """The model to train, with the weights to start from where there are any.

    Raises:
        UserError: if the weights do not fit the configuration.
    """
    model = _MODELS[recipe.task](config)
    if start is not None:
        state, fresh = start.state_dict(), model.state_dict()
        kept = {name: state[name] for name in fresh if name in state and state[name].shape == fresh[name].shape}
        unlike = [name for name in {**fresh, **state} if name.startswith("model.") and name not in kept]
        if unlike:
            raise UserError(f"The weights of {recipe.start_from} do not fit the model: {', '.join(unlike[:5])}.")
        new = [name for name in fresh if name not in kept]
        if new:
            _log.info("new weights for %s, which %s has not", ", ".join(new), recipe.start_from)
        model.load_state_dict({**fresh, **kept})
    return model.train()


def parameter_groups(model: nn.Module, recipe: LanguageRecipe) -> list[dict[str, Any]]:
    """No weight decay for biases and norms, nor for the gate's bias, which is an offset at one."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith(".bias") or parameter.ndim < 2].append(parameter)
    return [
        {"params": groups[False], "weight_decay": recipe.weight_decay},
        {"params": groups[True], "weight_decay": 0.0},
    ]


def _start(recipe: LanguageRecipe) -> tuple[Any, Any]:
    """The model to start from and its tokenizer, or the one named for it; None where they are to be made."""
    if recipe.start_from is None:
        return None, None
    from allmlp.checkpoints.pretrained import find_pretrained

    model = find_pretrained(recipe.start_from).model
    if not isinstance(getattr(model, "config", None), GMLPConfig):
        raise UserError(f"{recipe.start_from} holds no language model.")
    if recipe.train_tokenizer is not None:
        raise UserError("A model to start from has its vocabulary: a tokenizer trained anew does not fit it.")
    if recipe.tokenizer is None:
        return model, model_tokenizer(str(recipe.start_from), model)
    return model, fitting_tokenizer(recipe.tokenizer, model)


def _engine(
    kind: type[Engine],
    recipe: LanguageRecipe,
    output: Path,
    model: Any,
    training: Any,
    held_out: Any,
    unit: str,
    per_example: int,
    resume_from: Path | None,
    **settings: Any,
) -> Engine:
    resumed_at = checkpoint_step(resume_from) if resume_from else 0
    board = TensorBoard(output / run_directory.EVENTS, _Logits(model), held_out[0]["input_ids"], resumed_at)
    return kind(
        recipe,
        output,
        model,
        parameter_groups(model, recipe),
        unit=unit,
        per_example=per_example,
        workers=recipe.workers or 0,
        resume_from=resume_from,
        callbacks=[board],
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=as_is,
        **settings,
    )


class _Logits(nn.Module):
    """A model as a function of tokens alone, for TensorBoard's drawing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        settings = {"use_cache": False} if isinstance(self.model, GMLPForCausalLM) else {}
        return self.model(input_ids, **settings).logits


def _accuracy_metric(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _common_metrics(recipe: LanguageRecipe, engine: Engine, model: Any, unit: str) -> dict[str, Any]:
    return {
        "task": recipe.task,
        "epochs": round(engine.state.epoch or 0.0, 4),
        "steps": engine.state.global_step,
        "unit": unit,
        "per_second": round(engine.progress.rate, 1),
        "training_seconds": round(engine.progress.seconds, 1),
        "parameters": model.num_parameters(),
        "precision": "bf16" if engine.args.bf16 else "fp32",
        "surroundings": surroundings(),
        **engine.course,
    }


def _finish(output: Path, metrics: dict[str, Any], report: list[Path]) -> dict[str, Any]:
    metrics["report"] = [str(path.relative_to(output)) for path in report]
    run_directory.save_metrics(output, metrics)
    return metrics
