"""Text as windows of tokens for a language model, every token in one of them.

Legend of the shapes: B windows, N tokens of a window.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from allmlp.data import NAMES
from allmlp.data.sampling import IGNORED, ignored
from allmlp.data.text_sources import find_texts
from allmlp.data.tokenization import Tokens, encode, make_tokenizer
from allmlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TextData:
    """A text cut into what is learnt from and what is held out.

    Attributes:
        tokenizer: a tokenizer of transformers.
        train: what is learnt from; where it streams, its shards (`allmlp.data.text_stream.TextShards`).
        validation: what is held out.
    """

    tokenizer: Any
    train: Any
    validation: Tokens


def load_text(
    data: str,
    *,
    tokenizer: Any = None,
    tokenizer_name: str = "bytes",
    trained_size: int | None = None,
    holdout: float = 0.1,
    text_column: str | None = None,
) -> TextData:
    """The text to train on, with something held out.

    Args:
        data: what `allmlp.data.text_sources.find_texts` takes.
        tokenizer: the tokenizer of a model that is trained further; else one is made of the next two.
        tokenizer_name: `bytes`, `characters`, or a tokenizer's file, directory or name.
        trained_size: train a tokenizer of this many tokens on the text.
        holdout: share held out at the end, where the data has no validation split of its own.
        text_column: column of the texts in a table.

    Raises:
        UserError: if there is no such data or tokenizer, or the text is not UTF-8 and its tokens are not bytes.
    """
    splits = find_texts(data, text_column)
    if tokenizer is None:
        tokenizer = make_tokenizer(tokenizer_name, splits.values(), trained_size=trained_size)
    train, validation = splits["train"], splits.get("validation")
    if validation is None:
        train, validation = train.cut(holdout)
    return TextData(tokenizer=tokenizer, train=encode(train, tokenizer), validation=encode(validation, tokenizer))


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Masked language modelling: of the chosen tokens 80% become the mask, 10% any token, 10% stay (arXiv 1810.04805).

    Attributes:
        share: of the tokens that are chosen and predicted.
        mask_token: what stands in their place.
        vocabulary: tokens of the vocabulary.
    """

    share: float
    mask_token: int
    vocabulary: int

    def apply(
        self, ids: Int[Tensor, " tokens"], generator: torch.Generator
    ) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """A window with some tokens replaced, and the labels: the former tokens there, −100 elsewhere."""
        chosen = torch.rand(ids.shape, generator=generator) < self.share
        fate = torch.rand(ids.shape, generator=generator)
        anything = torch.randint(self.vocabulary, ids.shape, generator=generator)
        masked = torch.where(chosen & (fate < 0.8), self.mask_token, ids)
        masked = torch.where(chosen & (fate >= 0.9), anything, masked)
        return masked, torch.where(chosen, ids, IGNORED)


class TokenWindows(Dataset):
    """Consecutive windows of a text.

    `__getitems__(indices)` gives a batch, `{"input_ids": Int[B, N], "labels": Int[B, N], "names": list[str]}`. Labels
    are the next tokens, under `shift_labels` too, which tells transformers' loss that they are shifted already, so that
    the window's last token predicts the first of the next one; or with `masking` the tokens that were replaced.

    For training (with a seed) the text is a ring, and every epoch's windows begin elsewhere: each epoch takes every
    token at least once, in windows that are all full. For evaluation the last window may be short; it is filled up with
    padding and labels of −100. What is random depends on the seed, the epoch and the window alone.

    Args:
        tokens: the text.
        context: N.
        masking: mask tokens instead of predicting the next ones.
        seed: of the windows' beginning and the masks; None: evaluation, always the same.
        stride: tokens from one window of evaluation to the next; below N the windows overlap, and each token counts
            where it has the most context.

    Raises:
        UserError: if the text is shorter than one window, or has nothing to predict.
    """

    def __init__(
        self,
        tokens: Tokens,
        context: int,
        *,
        masking: Masking | None = None,
        seed: int | None = None,
        stride: int | None = None,
    ) -> None:
        self.ids, self.context, self.masking, self.seed = tokens.ids, context, masking, seed
        self.stride = context if stride is None else stride
        if not 1 <= self.stride <= context or (seed is not None and self.stride != context):
            raise UserError(f"the stride must be from 1 to the context of {context}, got {stride}")
        # The last token has no next one.
        self.positions = len(tokens) - (masking is None)
        if self.positions < 1 or (seed is not None and self.positions < context):
            what = "to predict one" if seed is None else f"for windows of {context}: give more, or a shorter --context"
            raise UserError(f"the text has {len(tokens):,} tokens, too few {what}")
        self.epoch = self.offset = 0
        # The same windows and masks each time.
        if masking is not None and seed is None and all((self[i]["labels"] == IGNORED).all() for i in range(len(self))):
            raise UserError(f"of the text's {len(tokens):,} tokens none is masked: give more text")

    def set_epoch(self, epoch: int) -> None:
        """Let the windows begin where this epoch's do."""
        self.epoch = epoch
        if self.seed is not None:
            self.offset = int(np.random.default_rng((self.seed, epoch)).integers(self.context)) if epoch else 0

    def __len__(self) -> int:
        return 1 + max(0, -(-(self.positions - self.context) // self.stride))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        if not indices:
            return ignored(self.__getitems__([0]))
        places = np.asarray(indices)[:, None] * self.stride + np.arange(self.context) + self.offset
        missing = torch.from_numpy(places >= self.positions) if self.seed is None else None
        places %= self.positions
        ids = torch.from_numpy(self.ids[places].astype(np.int64))
        if self.masking is None:
            labels = torch.from_numpy(self.ids[places + 1].astype(np.int64))
        else:
            masked = [self.masking.apply(row, self._chance(index)) for row, index in zip(ids, indices, strict=True)]
            ids, labels = (torch.stack(rows) for rows in zip(*masked, strict=True))
        names = [f"tokens {row[0]:,} to {row[-1]:,} of the text" for row in places]
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels, NAMES: names}
        if missing is not None and missing.any():
            batch |= {"labels": labels.masked_fill(missing, IGNORED), "attention_mask": (~missing).long()}
        for row, index in enumerate(indices):
            if index and self.stride < self.context:
                batch["labels"][row, : self.context - self.stride] = IGNORED
        return batch if self.masking is not None else {**batch, "shift_labels": batch["labels"]}

    def _chance(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed or 0, self.epoch, int(index))) % 2**63)
