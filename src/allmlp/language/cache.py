"""What a causal gMLP keeps of the tokens behind it, so that the next one costs matrix-vector products only.

Per layer: the normalised half that the spatial weight reads, for aMLP the keys and values of the tiny attention, and
for models with token shift the blocks' inputs. The rows of a batch lie left-aligned, whatever their padding: place `s`
of a buffer belongs to the real token number `base + s` of its row, the position that the spatial weight has a row for.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from allmlp.errors import UserError
from allmlp.language.configuration import GMLPConfig

# What transformers calls the cache where models are given it and return it: its name since version 5.24, or before.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# Toeplitz models keep this many tokens beyond their reach, so that assisted decoding can take back a rejected draft.
_MARGIN = 128


class GMLPCache(Cache):
    """The decoding cache of `GMLPForCausalLM`, its `cache`. For inference: no gradient goes through it.

    Memory: intermediate_size / 2 + 2·tiny_attention_size numbers (with token shift also hidden_size) for each layer
    and token, allocated once for `max_length` tokens, or by doubling where that is not known. Toeplitz models forget
    what is beyond their reach, of a long prompt too and however long they stream.

    Args:
        config: the model's configuration.
        max_length: tokens to allocate for.
    """

    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(self, config: GMLPConfig, max_length: int | None = None) -> None:
        self.kept = [GMLPCacheLayer(self) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=cast(Any, self.kept))
        self.streams = config.spatial_weight == "toeplitz"
        self.reach = config.max_position_embeddings
        self.window = 2 * (self.reach + _MARGIN) if self.streams else self.reach
        self.capacity = min(max_length or 0, self.window)
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.longest = 0  # places of the longest row, padding included
        self.lengths: Int[Tensor, " batch"] | None = None  # real tokens of each row; None: `longest` in every row
        self.base = 0  # position of the first place kept
        self.window_start = 0  # column that the first place belongs to, see GMLPGenerationMixin
        self.unseen = 0  # tokens kept that generate's input_ids lack, likewise
        for layer in self.kept:
            layer.buffers = {}

    def begin(self, batch: int, new: int, real: Bool[Tensor, "batch new"] | None, device: torch.device) -> None:
        """Make room for `new` places in each row, and find out who reads whom; `finish` ends the step.

        Args:
            batch: rows.
            new: new places of each row, its tokens first.
            real: which of them hold a token; None: all.
            device: where the masks belong.

        Raises:
            UserError: if the batch has another size than before.
        """
        if self.longest and batch != self.batch_size:
            raise UserError(f"the cache holds {self.batch_size} sequences, the input {batch}")
        self.start, self.new, self.real = self.longest, new, real
        self.end = self.start + new
        if real is not None and self.lengths is None:
            self.lengths = torch.full((batch,), self.longest, device=device)
        self._make_room()
        self.first, self.positions, self.visible = self.base, None, None
        if self.start == 0:
            return
        steps = torch.arange(new, device=device)
        earliest = self.start
        if self.lengths is not None:
            self.positions = self.lengths.unsqueeze(-1) + steps
            earliest = int(self.lengths.min()) if self.streams else 0
        if self.streams:
            self.first = max(self.base, earliest - self.reach + 1)
        if self.positions is not None or new > 1:
            written = (self.start + steps if self.positions is None else self.positions).unsqueeze(-1)
            read = torch.arange(self.first, self.end, device=device)
            self.visible = read <= written
            if self.streams:
                self.visible &= read > written - self.reach

    def finish(self) -> None:
        """Count the new tokens, once every layer has kept its own."""
        self.longest = self.end
        if self.lengths is not None:
            self.lengths = self.lengths + (self.new if self.real is None else self.real.sum(-1))

    def _make_room(self) -> None:
        if not torch.is_inference_mode_enabled() and any(x.is_inference() for x in self.kept[0].buffers.values()):
            # What inference mode has made may not be written to outside of it.
            self._each_buffer(torch.clone)
        if self.streams and self.end - self.base > max(self.window, self.capacity):
            drop = self._shortest_read() - self.reach - _MARGIN - self.base
            if drop > 0:
                self.capacity = max(self.window, self.end - self.base - drop)
                self._each_buffer(lambda kept: _resized(kept[:, drop : self.start - self.base], self.capacity))
                self.base += drop
        places = self.end - self.base
        if places > self.capacity:
            self.capacity = min(2 * places, max(places, self.window)) if self.start else places

    def _shortest_read(self) -> int:
        """Tokens of the shortest row when the cache is next read; the first tokens read one another without it."""
        if self.start:
            return self._shortest()
        return self.new if self.real is None else int(self.real.sum(-1).min())

    def _shortest(self) -> int:
        return self.longest if self.lengths is None else int(self.lengths.min())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `−tokens_to_remove` tokens of every row.

        Raises:
            ValueError: if the number is positive or too large, or forgotten tokens would be needed again.
        """
        left = self._shortest() + tokens_to_remove
        if tokens_to_remove > 0 or left < 0:
            raise ValueError(f"crop takes a number from {-self._shortest()} to 0, got {tokens_to_remove}")
        if self.base and left - self.reach + 1 < self.base:
            raise ValueError(f"the cache cannot take back {-tokens_to_remove} tokens: it has forgotten older ones")
        self.longest += tokens_to_remove
        if self.lengths is not None:
            self.lengths = self.lengths + tokens_to_remove
            places = torch.arange(self.base, self.base + self.capacity, device=self.lengths.device)
            gone = (places >= self.lengths.unsqueeze(-1)).unsqueeze(-1)
            self._each_buffer(lambda kept: kept.masked_fill(gone[:, : kept.shape[1]].to(kept.device), 0))

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keep the rows of these indices, in this order."""
        self._each_buffer(lambda kept: kept.index_select(0, indices.to(kept.device)))
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, indices.to(self.lengths.device))

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Let row `b` continue what was row `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._each_buffer(lambda kept: kept.repeat_interleave(repeats, dim=0))
        if self.lengths is not None:
            self.lengths = self.lengths.repeat_interleave(repeats, dim=0)

    def _each_buffer(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.kept:
            layer.buffers = {name: change(kept) for name, kept in layer.buffers.items()}

    @property
    def batch_size(self) -> int:
        """Rows, −1 while empty."""
        return next((kept.shape[0] for kept in self.kept[0].buffers.values()), -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places of the longest row, padding included: what transformers calls the sequence length."""
        return self.longest

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The context, −1 where there is no limit."""
        return -1 if self.streams else self.reach

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of the attention mask, and the first of them."""
        return self.longest + query_length, 0

    def __repr__(self) -> str:
        return f"GMLPCache(layers={len(self.kept)}, tokens={self.longest}, capacity={self.capacity})"


class GMLPCacheLayer:
    """One layer's share of a `GMLPCache`: the `Past` of its spatial gating unit."""

    def __init__(self, cache: GMLPCache) -> None:
        self.cache = cache
        self.buffers: dict[str, Tensor] = {}

    @property
    def start(self) -> int:
        return self.cache.start

    @property
    def first(self) -> int:
        return self.cache.first

    @property
    def positions(self) -> Int[Tensor, "batch new"] | None:
        return self._here(self.cache.positions)

    @property
    def visible(self) -> Bool[Tensor, "*rows new read"] | None:
        return self._here(self.cache.visible)

    def append(self, name: str, x: Float[Tensor, "batch new channels"]) -> Float[Tensor, "batch read channels"]:
        """Keep the new places' `x`, zero where there is no token; returns it behind that of the earlier tokens."""
        cache = self.cache
        x = x.detach()
        if cache.real is not None:
            x = x * cache.real.to(x.device).unsqueeze(-1)
        kept = self.buffers.get(name)
        if kept is None or kept.shape[1] < cache.capacity:
            kept = self.buffers[name] = _resized(x[:, :0] if kept is None else kept, cache.capacity)
        positions = self.positions
        if positions is None:
            # Of a long prompt, what is out of reach behind it is not kept.
            first = max(cache.start, cache.base)
            kept[:, first - cache.base : cache.end - cache.base] = x[:, first - cache.start :]
        else:
            rows = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
            kept[rows, positions - cache.base] = x
        return kept[:, cache.first - cache.base : cache.end - cache.base]

    def _here(self, x: Tensor | None) -> Tensor | None:
        """On the device of this layer, which a `device_map` may have put elsewhere than the first one."""
        return x if x is None else x.to(next(iter(self.buffers.values())).device)


def given_cache(cache: GMLPCache | None, past_key_values: GMLPCache | None) -> GMLPCache | None:
    """The cache that a model is given, by transformers' name of today or by that before version 5.24.

    Raises:
        UserError: if it is given by both, or is another model's.
    """
    if cache is not None and past_key_values is not None:
        raise UserError("give one cache: as cache, or as past_key_values, its older name")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, GMLPCache):
        raise UserError(f"gMLP models decode on a GMLPCache of their own, got {type(given).__name__}")
    return given


def _resized(kept: Float[Tensor, "batch places channels"], places: int) -> Float[Tensor, "batch more_places channels"]:
    grown = kept.new_zeros(kept.shape[0], places, kept.shape[2])
    grown[:, : kept.shape[1]] = kept
    return grown
