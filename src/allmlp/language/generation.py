"""`generate()` on the model's own cache, up to the context limit and, if asked, beyond it."""

from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import MaxLengthCriteria, PromptLookupCandidateGenerator, StoppingCriteriaList
from transformers.utils import logging

from allmlp.errors import UserError
from allmlp.language.cache import CACHE, GMLPCache, given_cache
from allmlp.language.configuration import GMLPConfig
from allmlp.language.inputs import check_token_ids

logger = logging.get_logger(__name__)

ContextOverflow = Literal["stop", "reprefill"]
# What has transformers draft tokens, some of which are taken back.
_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class GMLPGenerationMixin(GenerationMixin):
    """transformers' generation, which a dense spatial weight ends at the context: its rows are absolute positions."""

    config: GMLPConfig

    def generate(
        self,
        inputs: Int[Tensor, "batch tokens"] | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        context_overflow: ContextOverflow = "stop",
        **kwargs: Any,
    ) -> Any:
        """Generate as `transformers.GenerationMixin.generate` does.

        Args:
            inputs: prompts, padded on the left. With a cache the whole text, the tokens in it too; or the new tokens
                alone, and an `attention_mask` of the whole.
            generation_config: how to generate.
            args: further positional arguments of transformers' `generate`.
            context_overflow: what to do when the context is full. `"stop"` ends there. `"reprefill"` drops the older
                half and goes on; each time costs one forward pass over the other half, whose tokens move to the first
                positions. Toeplitz models have no limit and take no notice. Drafts of an assistant or of the prompt
                itself cannot be taken back over such a step: with them there is `"stop"` alone.
            kwargs: further arguments of transformers' `generate`.

        Returns:
            What transformers' `generate` returns.

        Raises:
            UserError: if the prompt is no batch of tokens, empty, longer than the context, has ids outside the
                vocabulary or none that the cache lacks, or what is asked for does not go with the model's own cache.
        """
        if context_overflow not in ("stop", "reprefill"):
            raise UserError(f"context_overflow must be 'stop' or 'reprefill', got {context_overflow!r}")
        reprefills = context_overflow == "reprefill" and self._context is not None

        def asks(name: str) -> bool:
            own, given = (getattr(config, name, None) for config in (self.generation_config, generation_config))
            return kwargs.get(name, own if given is None else given) is not None

        if asks("cache_implementation"):
            raise UserError("gMLP models decode on their own cache: leave cache_implementation out")
        drafts = [name for name in _DRAFTS if asks(name)]
        if reprefills:
            # Drafts are taken back and parts of a prompt counted as if no earlier token had left the window.
            for name in [*drafts, *filter(asks, ["prefill_chunk_size"])]:
                raise UserError(f"context_overflow='reprefill' does not go with {name}: leave one of them out")
            kwargs["context_overflow"] = context_overflow
        cache = given_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE], cache.unseen = cache, 0
            if drafts and cache.longest:
                raise UserError(f"{drafts[0]} begins with the whole text: leave out either it or the cache")
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        start = prompt if prompt is not None else kwargs.get("inputs_embeds")
        if prompt is not None:
            self._check_prompt(prompt, kwargs.get("attention_mask"), cache, reprefills)
        elif start is not None and reprefills:
            raise UserError("context_overflow='reprefill' needs the prompt as input_ids, to compute it again")
        mask = kwargs.get("visibility_mask")
        if mask is not None and mask.dim() == 2 and start is not None:
            # transformers repeats every argument's first axis for beams and returned sequences.
            kwargs["visibility_mask"] = mask.expand(start.shape[0], *mask.shape)
        return cast(Any, super()).generate(inputs, generation_config, *args, **kwargs)

    @property
    def _context(self) -> int | None:
        """Columns that fit, None: any number."""
        return None if self.config.spatial_weight == "toeplitz" else self.config.max_position_embeddings

    def _check_prompt(self, prompt: Tensor, mask: Tensor | None, cache: GMLPCache | None, reprefills: bool) -> None:
        if not isinstance(prompt, Tensor) or prompt.dim() != 2:
            raise UserError(f"the prompt must be a tensor [batch, tokens] of token ids, got {_described(prompt)}")
        if prompt.numel() == 0:
            raise UserError("the prompt is empty: give at least one token")
        check_token_ids(prompt, self.config.vocab_size)
        tokens = prompt.shape[1] if mask is None else max(prompt.shape[1], mask.shape[-1])
        if cache is not None:
            cache.unseen = tokens - prompt.shape[1]
            kept = cache.window_start + cache.longest
            if kept >= tokens:
                raise UserError(
                    f"the cache already holds {kept} tokens, the text has {tokens}: give the tokens in the cache and "
                    "at least one more"
                )
            if cache.unseen and reprefills:
                raise UserError("context_overflow='reprefill' needs the whole text, to compute it again")
        if self._context is not None and not reprefills and tokens >= self._context:
            raise UserError(
                f"the prompt has {tokens} tokens and leaves no room in the model's context of {self._context}; shorten "
                "it, or generate with context_overflow='reprefill' (--context-overflow reprefill), which reads the end "
                "of it"
            )

    def prepare_inputs_for_generation(  # pyrefly: ignore[bad-override-param-name] (transformers passes all by name)
        self,
        input_ids: Int[Tensor, "batch tokens"],
        cache: GMLPCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        visibility_mask: Tensor | None = None,
        context_overflow: ContextOverflow = "stop",
        past_key_values: GMLPCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next forward pass's arguments; where the context is full, those of a fresh start from the last half."""
        cache = given_cache(cache, past_key_values)
        tokens, start = input_ids.shape[1], 0
        if context_overflow == "reprefill" and self._context is not None:
            start = window_start(tokens, self._context)
        if cache is not None and cache.window_start != start:
            cache.reset()
            cache.window_start = start
        if cache is not None and start:
            # transformers counts the tokens in front of the window as well.
            kwargs["next_sequence_length"] = tokens - start - cache.longest if cache.longest else None
        if visibility_mask is not None:
            is_first = cache is None or cache.get_seq_length() == 0
            visibility_mask = extend_visibility(visibility_mask, tokens)[:, start:, start:] if is_first else None
        return cast(Any, super()).prepare_inputs_for_generation(
            input_ids[:, start:],
            attention_mask=None if attention_mask is None else attention_mask[:, start:],
            inputs_embeds=inputs_embeds,
            visibility_mask=visibility_mask,
            **{**kwargs, CACHE: cache},
        )

    def _prepare_cache_for_generation(  # pyrefly: ignore[bad-override] (transformers' own returns nothing either)
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make the cache, and end generation where the context does; `max_cache_length` + 1 tokens are wanted."""
        cache = model_kwargs.get(CACHE)
        if self._context is not None and model_kwargs.get("context_overflow") != "reprefill":
            excess = max_cache_length + 1 - self._context + (cache.unseen if cache is not None else 0)
            if excess > 0:
                generation_config.max_length -= excess
                max_cache_length -= excess
                logger.warning(
                    f"generation stops at the model's context of {self._context} tokens, {excess} short of the length "
                    "asked for; generate with context_overflow='reprefill' (--context-overflow reprefill) to go on "
                    "from the last half of it"
                )
        if generation_config.use_cache is not False and cache is None:
            model_kwargs[CACHE] = GMLPCache(self.config, max_cache_length)

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        generator = cast(Any, super())._get_candidate_generator(generation_config, *args, **kwargs)
        if self._context is not None and isinstance(generator, PromptLookupCandidateGenerator):
            # transformers drafts beyond the length asked for, and takes it back; there is no room for that here.
            found, last = generator.get_candidates, generation_config.max_length - 1
            cast(Any, generator).get_candidates = lambda ids, **given: (found(ids, **given)[0][:, :last], None)
        return generator

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = cast(Any, super())._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                # It would warn of lengths beyond the context, which are either cut above or wanted.
                criterion.max_position_embeddings = None
        return criteria


def window_start(tokens: int, context: int) -> int:
    """The first token that still counts when `tokens` do not fit: starts are as far apart as half a context."""
    step = context + 1 - max(1, context // 2)
    return max(0, -(-(tokens - context) // step)) * step


def _described(given: object) -> str:
    return f"one of shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def extend_visibility(mask: Tensor, tokens: int) -> Tensor:
    """A prompt's visibility mask [batch, prompt, prompt] with causal rows for the tokens generated since."""
    prompt = mask.shape[-1]
    full = torch.ones(mask.shape[0], tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    full[:, :prompt, :prompt] = mask
    return full
