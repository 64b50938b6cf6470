"""What a trained language model knows: nats and bits of a text, classes of texts, and what it writes."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from allmlp.checkpoints import run_directory
from allmlp.data import as_is, text_sources
from allmlp.data.labelled_texts import LabelledTexts, TextBatches, load_labelled_texts, read_labelled_texts
from allmlp.data.sampling import IGNORED
from allmlp.data.text import Masking, TokenWindows
from allmlp.data.tokenization import Tokens, encode, load_tokenizer
from allmlp.errors import UserError
from allmlp.language import GMLPForCausalLM
from allmlp.training.evaluation import accuracy_of, likeliest, named_files, recipe_of, same_data, trained_columns
from allmlp.training.recipe import LanguageRecipe, TextClassificationRecipe

_log = logging.getLogger(__name__)
_LOGITS = 1 << 27  # 512 MiB in float32


@torch.inference_mode()
def text_loss(model: Any, windows: TokenWindows, batch_size: int = 64) -> tuple[float, int]:
    """The cross entropy of a text, summed in float64.

    Args:
        model: a causal or masked language model; it stays on its device.
        windows: the text.
        batch_size: windows per forward pass, fewer where their logits would be more than 2²⁷ numbers.

    Returns:
        Nats in all, and the number of tokens predicted.
    """
    nats, predicted = 0.0, 0
    batch_size = max(1, min(batch_size, _LOGITS // (windows.context * model.config.vocab_size)))
    for logits, labels in _outputs(model, windows, batch_size):
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        # Not every accelerator has float64.
        nats += losses.cpu().double().sum().item()
        predicted += int((labels != IGNORED).sum())
    return nats, predicted


@torch.inference_mode()
def classify(
    model: Any, texts: TextBatches, batch_size: int = 64
) -> tuple[Float[Tensor, "texts classes"], Int[Tensor, " texts"]]:
    """A classifier's logits for labelled texts, and the labels."""
    logits, labels = zip(*_outputs(model, texts, batch_size), strict=True)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def _outputs(model: Any, data: Any, batch_size: int) -> Any:
    """The logits in float32 and the labels of each batch, in eval mode, on the model's device."""
    training = model.training
    model.eval()
    loader = DataLoader(data, batch_size=batch_size, collate_fn=as_is)
    for batch in tqdm(loader, desc="evaluating", unit=" batches", leave=False, disable=None, delay=1):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
        if isinstance(model, GMLPForCausalLM):
            inputs["use_cache"] = False
        yield model(**inputs).logits.float(), batch["labels"].to(model.device)
    model.train(training)


def text_measures(nats: float, predicted: int, text: Tokens, *, masked: bool = False) -> dict[str, Any]:
    """A text's cross entropy in every unit.

    Args:
        nats: in all.
        predicted: tokens predicted.
        text: the text.
        masked: only some tokens were predicted, so that nothing can be said about characters and bytes.
    """
    per_token = nats / predicted
    measures: dict[str, Any] = {
        "tokens": len(text),
        "predicted": predicted,
        "nats_per_token": per_token,
        "bits_per_token": per_token / math.log(2),
        "perplexity": math.exp(min(per_token, 700.0)),
    }
    if not masked:
        # The first token is not predicted; it counts with the average, so that units of one token each agree.
        whole = per_token * len(text)
        for unit, count in (("character", text.characters), ("byte", text.bytes)):
            # Bytes need not be characters, and documents may be empty.
            if count:
                measures[f"nats_per_{unit}"] = whole / count
                measures[f"bits_per_{unit}"] = whole / count / math.log(2)
    return measures


def evaluate(
    run: str,
    data: str | None = None,
    *,
    batch_size: int = 64,
    stride: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """How well a run's model knows a text, or tells texts apart.

    Of the data it was trained on, the held-out part counts; of other data its validation split, or all of it where it
    has none. The text is cut into windows of the training's length, each read by itself.

    Args:
        run: a run directory.
        data: a text as for training; the run's own by default.
        batch_size: windows or texts per forward pass.
        stride: tokens from one window to the next; smaller gives more context to each token, at more cost.
        text_column: column of the texts in a table; by default as in training, or found by its name.
        label_column: column of the classes, likewise.

    Returns:
        What `text_measures`, or for classes `accuracy_of`, gives, with `run`, `data`, `task` and its `part`.

    Raises:
        UserError: if the run or the data cannot be used, or they do not fit together.
    """
    model, recipe = load_model(run), recipe_of(run, LanguageRecipe)
    tokenizer = model_tokenizer(run, model)
    own = recipe.data if recipe else None
    data = data or own
    if data is None:
        raise UserError(f"{run} does not say what it was trained on; name the data to evaluate on.")
    task = run_directory.task(run)
    context = _context(recipe, model)
    seen = recipe if recipe and same_data(data, own) else None
    found: dict[str, Any] = {"run": str(run), "data": data, "task": task}
    columns = {"text_column": text_column, "label_column": label_column}
    if text_sources.is_table(data):
        columns = trained_columns(recipe, columns)
    if task == "text-classification":
        if stride is not None:
            raise UserError(f"{run} tells classes of whole texts: leave --stride out.")
        return found | _evaluate_classes(model, tokenizer, data, seen, columns, context, batch_size)
    if label_column is not None:
        raise UserError(f"{run} holds a model for {task}: it has no labels, leave --label-column out.")
    splits = text_sources.find_texts(data, columns["text_column"])
    part, text = next(reversed(splits.items()))
    if len(splits) == 1:
        part = "all"
        if seen is not None:
            part, text = "held out", text.cut(seen.holdout)[1]
    tokens = encode(text, tokenizer)
    if tokens.unknown:
        _log.warning("%d of %d tokens stand for text the tokenizer does not know", tokens.unknown, len(tokens))
    masking = None
    if task == "fill-mask":
        share = getattr(recipe, "mask_share", 0.15)
        masking = Masking(share=share, mask_token=mask_token(tokenizer, run), vocabulary=len(tokenizer))
    windows = TokenWindows(tokens, context, masking=masking, stride=stride)
    nats, predicted = text_loss(model, windows, batch_size)
    measures = text_measures(nats, predicted, tokens, masked=masking is not None)
    return {**found, "part": part, "unknown": tokens.unknown, "context": context, **measures}


def predict(
    run: str,
    files: Sequence[str] = (),
    texts: Sequence[str] = (),
    *,
    top_k: int = 5,
    strict: bool = False,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """The likeliest classes of texts.

    Args:
        run: a run directory of a classifier of texts.
        files: text files, a text each, and folders of `.txt` files.
        texts: further texts.
        top_k: classes per text.
        strict: raise at a file that cannot be read.
        batch_size: texts per forward pass.

    Returns:
        For each file `{"file", "predictions": [{"label", "probability"}, …]}`, the likeliest first, or
        `{"file", "error"}` where it cannot be read; then the same for each text, under `"text"`.

    Raises:
        UserError: if the run cannot be used, there is no such file or no text at all, or `strict` and one cannot be
            read.
    """
    if top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1.")
    task = run_directory.task(run)
    if task != TextClassificationRecipe.task:
        raise UserError(f"{run} holds a model for {task}; it tells no classes.")
    model = load_model(run)
    tokenizer = model_tokenizer(run, model)
    entries: list[dict[str, Any]] = []
    read: list[str] = []
    for path in named_files(files, (".txt",), ".txt file"):
        if path.suffix in (".csv", ".parquet"):
            raise UserError(f"{path} is a table, not a text: name text files, or give texts (--text).")
        try:
            # Line ends stay as they are, as in training.
            read.append(path.read_bytes().decode("utf-8"))
            entries.append({"file": str(path)})
        except UnicodeDecodeError as error:
            if strict:
                raise UserError(f"{path} is not UTF-8: {error}") from error
            entries.append({"file": str(path), "error": "not UTF-8"})
    for text in texts:
        _check_characters(text, "text")
        read.append(text)
        entries.append({"text": text})
    if not entries:
        raise UserError("Nothing to predict: name files, or give a text (--text).")
    if read:
        context = _context(recipe_of(run, LanguageRecipe), model)
        unlabelled = LabelledTexts(texts=read, labels=np.zeros(len(read), dtype=np.int64))
        batches = TextBatches(unlabelled, tokenizer, context)
        known = [model.config.id2label[i] for i in range(len(model.config.id2label))]
        found = iter(likeliest(classify(model, batches, batch_size)[0], known, top_k))
        entries = [entry if "error" in entry else {**entry, "predictions": next(found)} for entry in entries]
    return entries


def generate(
    run: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    beams: int = 1,
    context_overflow: str = "stop",
    seed: int = 0,
    streamer: Any = None,
) -> list[dict[str, Any]]:
    """What a run's model writes behind prompts.

    Args:
        run: a run directory of a causal language model.
        prompts: how the texts begin; those of as many tokens are gone on with together.
        max_new_tokens: tokens to write.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw from this many likeliest tokens; 0: from all.
        top_p: draw from the likeliest tokens that have this probability together.
        beams: beams of a beam search; 1: none.
        context_overflow: `stop` or `reprefill`, see `GMLPForCausalLM.generate`.
        seed: of the draws, for each length of prompt anew.
        streamer: is given each token when it is there (one prompt only).

    Returns:
        For each prompt `{"prompt", "text", "tokens"}`, the text without the prompt.

    Raises:
        UserError: if the run cannot write, or a prompt is empty, too long, or has characters the model does not know.
    """
    if run_directory.task(run) != "text-generation":
        raise UserError(f"{run} holds a model for {run_directory.task(run)}; it does not write text.")
    if not 0 <= temperature < float("inf") or max_new_tokens < 1 or beams < 1 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(
            "temperature and top_k must be at least 0, max_new_tokens and beams at least 1, and top_p above 0 and at "
            f"most 1; got {temperature}, {top_k}, {max_new_tokens}, {beams} and {top_p}."
        )
    # The sampler divides by it, in float32.
    if 0 < temperature < 1e-6:
        raise UserError(f"temperature must be 0 or at least 1e-6, got {temperature}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to 2³²-1, got {seed}.")
    model = load_model(run)
    tokenizer = model_tokenizer(run, model)
    encoded = [_encoded(number, prompt, tokenizer, run) for number, prompt in enumerate(prompts, 1)]
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    answers: dict[int, dict[str, Any]] = {}
    # Padding would take room in the context of the shorter ones.
    for length in sorted({len(ids) for ids in encoded}):
        places = [place for place, ids in enumerate(encoded) if len(ids) == length]
        torch.manual_seed(seed)
        written = model.generate(
            torch.tensor([encoded[place] for place in places]),
            max_new_tokens=max_new_tokens,
            num_beams=beams,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=unwritten(tokenizer),
            context_overflow=context_overflow,
            streamer=streamer,
            **drawing,
        )[:, length:]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for place, text, ids in zip(places, texts, written, strict=True):
            # A text that ended before the others is filled up with padding.
            tokens = len(ids) if tokenizer.eos_token_id is None else int((ids != tokenizer.pad_token_id).sum())
            answers[place] = {"prompt": prompts[place], "text": text, "tokens": tokens}
    return [answers[place] for place in range(len(prompts))]


def unwritten(tokenizer: Any) -> list[int] | None:
    """The tokens that stand for no text and end none; None where there are none."""
    return [token for token in (tokenizer.mask_token_id, tokenizer.unk_token_id) if token is not None] or None


def load_model(run: str) -> Any:
    """The language model of a run directory.

    Raises:
        UserError: if it is no run directory, or one of images.
    """
    kind = run_directory.read_config(run)["model_type"]
    if kind != run_directory.LANGUAGE:
        raise UserError(f"{run} holds a model of type '{kind}', not a language model.")
    return run_directory.load(run)


def model_tokenizer(run: str, model: Any) -> Any:
    """The tokenizer beside a model.

    Raises:
        UserError: if there is none, or it has more tokens than the model's vocabulary.
    """
    if not (Path(run) / "tokenizer_config.json").is_file():
        raise UserError(f"{run} has no tokenizer beside the model; put its files there, or convert with --tokenizer.")
    tokenizer = load_tokenizer(run)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"The tokenizer in {run} has {len(tokenizer)} tokens, the model a vocabulary of {model.config.vocab_size}: "
            "they do not belong together."
        )
    return tokenizer


def mask_token(tokenizer: Any, name: object) -> int:
    """The token that stands for those to be predicted.

    Raises:
        UserError: if there is none in the tokenizer, which is called `name`.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(f"The tokenizer in {name} has no mask token.")
    return tokenizer.mask_token_id


def _evaluate_classes(
    model: Any,
    tokenizer: Any,
    data: str,
    seen: LanguageRecipe | None,
    columns: dict[str, str | None],
    context: int,
    batch_size: int,
) -> dict[str, Any]:
    if seen is not None:
        classes, _, texts = load_labelled_texts(data, holdout=seen.holdout, seed=seen.seed, **columns)
        part = "held out"
    else:
        classes, splits = read_labelled_texts(data, **columns)
        part, texts = next(reversed(splits.items()))
        part = part if len(splits) > 1 else "all"
    known = [model.config.id2label[i] for i in range(len(model.config.id2label))]
    strange = [name for name in classes if name not in known]
    if strange:
        raise UserError(f"{data} has classes that the model does not know: {', '.join(strange[:8])}.")
    index = np.array([known.index(name) for name in classes])
    relabelled = LabelledTexts(texts=texts.texts, labels=index[texts.labels])
    logits, labels = classify(model, TextBatches(relabelled, tokenizer, context), batch_size)
    return {"part": part, **accuracy_of(logits, labels, known, unit="texts")}


def _encoded(number: int, prompt: str, tokenizer: Any, run: str) -> list[int]:
    _check_characters(prompt, "prompt")
    found = tokenizer(prompt, add_special_tokens=False)
    ids = found["input_ids"]
    if not ids:
        raise UserError(f"Prompt {number} is empty: give at least one character.")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        span = found.token_to_chars(ids.index(tokenizer.unk_token_id))
        raise UserError(f"The model in {run} does not know {prompt[slice(*span)]!r} in the prompt {prompt!r}.")
    return ids


def _check_characters(text: str, what: str) -> None:
    """Refuse what a shell has passed on of bytes that are no text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"The {what} {text!r} is not UTF-8.")


def _context(recipe: LanguageRecipe | None, model: Any) -> int:
    """The tokens that a model is given at once: as in training, or as many as it was made for."""
    own = model.config.max_position_embeddings
    wanted = (recipe.context if recipe else None) or own
    return wanted if model.config.spatial_weight == "toeplitz" else min(wanted, own)
