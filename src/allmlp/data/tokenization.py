"""Tokenizers as transformers keeps them, made from a word on the command line, and the fast way from text to tokens."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from allmlp.data.text_sources import Readable, TextFile
from allmlp.errors import UserError, first_line
from allmlp.files import NO_ROOM

BYTES, CHARACTERS = "bytes", "characters"
END, MASK, UNKNOWN = "<|endoftext|>", "<|mask|>", "<|unknown|>"
# What a token of a tokenizer made here stands for, kept among transformers' settings of the tokenizer.
_UNIT = "allmlp_unit"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Encoded text.

    Attributes:
        ids: [tokens], on the disk where the text is not small.
        characters: of the text.
        bytes: of the text in UTF-8.
        unknown: how many of the tokens stand for what the vocabulary lacks.
    """

    ids: np.ndarray
    characters: int
    bytes: int
    unknown: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def make_tokenizer(name: str, texts: Iterable[Readable], *, trained_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer that `name` asks for, with an end-of-text token, which also pads, and a mask token.

    Args:
        name: `bytes`, `characters` (those of `texts`), a `tokenizer.json`, a directory, or a name on the Hub.
        texts: what the vocabulary is made from, where it is.
        trained_size: train a byte-level BPE of this many tokens on `texts` instead.

    Raises:
        UserError: if there is no such tokenizer, or the size leaves no room for the bytes.
    """
    if trained_size is not None:
        tokenizer = _trained(texts, trained_size)
    elif name == BYTES:
        tokenizer = _bytes(eos_token=END)
    elif name == CHARACTERS:
        tokenizer = _characters(texts)
    else:
        tokenizer = load_tokenizer(name)
    missing: dict[str, Any] = {}
    if tokenizer.eos_token is None:
        missing["eos_token"] = END
    if tokenizer.mask_token is None:
        missing["mask_token"] = MASK
    tokenizer.add_special_tokens(missing)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # generate() wants the padding on the left, and other tasks do not mind; what is saved are the first settings.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def fitting_tokenizer(name: str, model: Any) -> Any:
    """The tokenizer that `name` asks for, for a model that has its vocabulary already.

    Args:
        name: `bytes`, a `tokenizer.json`, a directory, or a name on the Hub. Of bytes there are 256; end of text and
            mask stand behind them where the vocabulary has room.
        model: a language model.

    Raises:
        UserError: if there is no such tokenizer, it has more tokens than the model, or it would be made of a text; or
            this is no language model.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise UserError("only a language model has a tokenizer")
    if name == CHARACTERS:
        raise UserError("which characters the model knows is not known: give the tokenizer it was trained with")
    if name != BYTES:
        tokenizer = load_tokenizer(name)
    elif vocabulary < 258:
        # No text holds the byte 0.
        tokenizer = _bytes(pad_token=bytes_to_unicode()[0], padding_side="left")
    else:
        tokenizer = make_tokenizer(BYTES, [])
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{name} has {len(tokenizer)} tokens, the model a vocabulary of {vocabulary}: they do not belong together"
        )
    return tokenizer


def load_tokenizer(name: str | Path) -> Any:
    """A tokenizer of a directory, a `tokenizer.json`, or the Hub; one without padding pads with its end of text.

    Raises:
        UserError: if there is none that transformers can load.
    """
    try:
        # Without the word transformers would ask whether to run the code that a directory names.
        tokenizer: Any = (
            PreTrainedTokenizerFast(tokenizer_file=str(name))
            if Path(name).is_file()
            else AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        )
    # A broken file raises tokenizers' bare Exception.
    except Exception as error:
        raise UserError(
            f"'{name}' is no tokenizer: neither {BYTES} nor {CHARACTERS}, nor a file, a directory or a name on the Hub "
            f"that transformers can load ({first_line(error)})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(texts: Readable, tokenizer: Any) -> Tokens:
    """All of a text as tokens, an end-of-text token behind each of several documents.

    The tokens lie in a temporary file, so that a text may be larger than memory; bytes of a plain file are not copied.

    Raises:
        UserError: if the text is not UTF-8 and the tokens are not bytes; or the tokenizer has no end of text.
    """
    unit = tokenizer.init_kwargs.get(_UNIT)
    if unit == BYTES and isinstance(texts, TextFile):
        ids = texts.raw()
        characters = sum(int(np.count_nonzero(ids[at : at + 2**24] & 0xC0 != 0x80)) for at in range(0, len(ids), 2**24))
        return Tokens(ids=ids, characters=characters, bytes=len(ids))
    end = None
    if texts.separated:
        end = tokenizer.eos_token_id
        if end is None:
            raise UserError("the tokenizer has no end-of-text token to put between documents")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    characters = size = unknown = 0
    try:
        with tempfile.TemporaryFile() as file:
            for batch in _batches(texts):
                characters += sum(len(text) for text in batch)
                size += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
                for ids in _encoded(batch, tokenizer, unit):
                    if tokenizer.unk_token_id is not None:
                        unknown += int(np.count_nonzero(ids == tokenizer.unk_token_id))
                    # numpy's own way into a file does not say why it cannot write.
                    file.write(ids.astype(dtype).data)
                    if end is not None:
                        file.write(np.array([end], dtype).data)
            file.flush()
            count = file.tell() // dtype.itemsize
            # The map keeps the nameless file alive.
            ids = np.memmap(file, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"The tokens of the text do not fit into {tempfile.gettempdir()}, where temporary files go: "
            f"{error.strerror}. Name a folder with more room in TMPDIR."
        ) from error
    return Tokens(ids=ids, characters=characters, bytes=size, unknown=unknown)


def token_ids(texts: list[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """The tokens of each text, without any around it."""
    return _encoded(texts, tokenizer, tokenizer.init_kwargs.get(_UNIT))


def first_tokens(texts: Sequence[str], tokenizer: Any, count: int) -> list[np.ndarray]:
    """The first `count` tokens of each text, [tokens] int64, with those around it that the tokenizer knows.

    A text without tokens, such as an empty one, is an end of text.

    Raises:
        UserError: if the tokenizer has no token to fill up shorter texts with.
    """
    end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has neither padding nor an end of text to fill up shorter texts with")
    if tokenizer.init_kwargs.get(_UNIT) is not None:
        # A token is a byte, a character, or one of those that are written out: what is behind need not be looked at.
        longest = max(map(len, tokenizer.get_vocab()))
        texts = [text[: count * longest] for text in texts]
    found: list[np.ndarray] = []
    for batch in _batches(texts):
        ids = tokenizer(batch, truncation=True, max_length=count, return_attention_mask=False)["input_ids"]
        found += [np.array(each or [end], np.int64) for each in ids]
    return found


def _encoded(batch: list[str], tokenizer: Any, unit: str | None) -> Iterator[np.ndarray]:
    if unit == BYTES:
        yield from (np.frombuffer(text.encode("utf-8"), np.uint8) for text in batch)
    elif unit == CHARACTERS:
        vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if len(token) == 1}
        points = np.array(sorted(map(ord, vocabulary)), np.uint32)
        numbers = np.array([vocabulary[chr(point)] for point in points], np.uint32)
        for text in batch:
            wanted = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            places = np.searchsorted(points, wanted).clip(max=len(points) - 1)
            yield np.where(points[places] == wanted, numbers[places], tokenizer.unk_token_id)
    else:
        found = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from (np.array(ids, np.uint32) for ids in found["input_ids"])


def _batches(texts: Iterable[str], characters: int = 2**22) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes(**settings: Any) -> PreTrainedTokenizerFast:
    """A token for each byte, its number the byte's value."""
    backend = Tokenizer(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **{_UNIT: BYTES}, **settings
    )


def _characters(texts: Iterable[Readable]) -> PreTrainedTokenizerFast:
    """A token for each character of the texts, in the order of their code points."""
    alphabet: set[str] = set()
    for part in texts:
        for text in part:
            alphabet |= set(text)
    vocabulary = {character: number for number, character in enumerate(sorted(alphabet))}
    vocabulary[UNKNOWN] = len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        **{_UNIT: CHARACTERS},
    )


def _trained(texts: Iterable[Readable], size: int) -> PreTrainedTokenizerFast:
    if size < 257:
        raise UserError(f"a trained tokenizer needs at least 257 tokens, for all bytes and the end of text; got {size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for part in texts for text in part), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, clean_up_tokenization_spaces=False)
