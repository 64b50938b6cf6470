import logging

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from allmlp.errors import UserError
from allmlp.language import GMLPCache, GMLPForCausalLM
from allmlp.language.cache import CACHE
from allmlp.language.generation import extend_visibility, window_start
from tests.language.tiny import CONTEXT, DENSE, OPTIONS, TOEPLITZ, VOCABULARY, tiny_model, tokens
from tests.tolerances import assert_close

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
ROOM = CONTEXT - 5


@pytest.fixture(autouse=True)
def _show_warnings(caplog):
    """transformers' loggers do not pass on what they log; the messages are part of what is tested."""
    logger = logging.getLogger("allmlp.language.generation")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


def greedy(model: GMLPForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@each_option
def test_greedy_takes_the_most_likely_token_each_time(options, caplog) -> None:
    model, prompt = tiny_model(GMLPForCausalLM, **options), tokens(3, 5)
    expected = greedy(model, prompt, ROOM)
    assert torch.equal(model.generate(prompt, max_new_tokens=ROOM, do_sample=False), expected)
    assert torch.equal(model.generate(prompt, max_new_tokens=ROOM, do_sample=False, use_cache=False), expected)
    assert not caplog.records


@each_option
def test_left_padded_prompts_generate_as_alone(options) -> None:
    model = tiny_model(GMLPForCausalLM, **options)
    prompts = [tokens(1, 5), tokens(1, 2), tokens(1, 4)]
    ids = torch.full((3, 5), VOCABULARY - 1)
    mask = torch.zeros(3, 5, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, -prompt.shape[1] :], mask[b, -prompt.shape[1] :] = prompt[0], 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=ROOM, do_sample=False)
    for b, prompt in enumerate(prompts):
        assert torch.equal(out[b, 5:], greedy(model, prompt, ROOM)[0, prompt.shape[1] :])


@each_option
def test_beam_search_with_and_without_a_cache(options) -> None:
    model, prompt = tiny_model(GMLPForCausalLM, **options), tokens(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    wanted = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(prompt, attention_mask=mask, **wanted)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **wanted))


def test_sampling_repeats_with_its_seed_and_follows_the_distribution() -> None:
    model, prompt = tiny_model(GMLPForCausalLM), tokens(1, 3)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(prompt.expand(3000, -1), max_new_tokens=1, do_sample=True, top_k=0)[:, -1])
    assert torch.equal(*draws)
    expected = model(prompt).logits[0, -1].softmax(-1)
    assert (draws[0].bincount(minlength=VOCABULARY) / 3000 - expected).abs().max() < 0.04


def test_assisted_decoding_gives_the_same_text() -> None:
    prompt = tokens(1, 4)
    for options in ({}, {"spatial_weight": "toeplitz", "token_shift": 1, "tiny_attention_size": 4}):
        model = tiny_model(GMLPForCausalLM, **options)
        assistant = tiny_model(GMLPForCausalLM, num_hidden_layers=2, **options)
        wanted = {"max_new_tokens": CONTEXT - 4, "do_sample": False}
        alone = model.generate(prompt, **wanted)
        assert torch.equal(model.generate(prompt, assistant_model=assistant, **wanted), alone)
        # The model's first block drafts.
        assert torch.equal(model.generate(prompt, assistant_early_exit=1, **wanted), alone)
        assert torch.equal(model.generate(prompt, **wanted), alone)


def test_drafts_behind_a_prompt_that_is_not_kept() -> None:
    model = tiny_model(GMLPForCausalLM, spatial_weight="toeplitz")
    ids = tokens(1, 7).repeat(1, 60)
    cache = GMLPCache(model.config)
    expected = greedy(model, ids, 12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, cache=cache), expected)
    assert cache.base > 0
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=5), expected)


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten())

    def end(self) -> None:
        self.ended = True


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_streamers_and_stopping_criteria() -> None:
    model, prompt, streamer = tiny_model(GMLPForCausalLM), tokens(1, 3), Collected()
    criteria = StoppingCriteriaList([StopAt(7)])
    out = model.generate(prompt, max_new_tokens=9, do_sample=False, streamer=streamer, stopping_criteria=criteria)
    assert out.shape == (1, 7)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.parts), out[0])


def test_end_of_sequence_stops_a_row_and_pads_it() -> None:
    model, prompt = tiny_model(GMLPForCausalLM), tokens(2, 3)
    expected = greedy(model, prompt, 6)[:, 3:].tolist()
    end = expected[0][2]
    out = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=30)[:, 3:].tolist()
    for row, full in zip(out, expected, strict=True):
        cut = full[: full.index(end) + 1] if end in full else full
        assert row == (cut + [30] * 6)[: len(row)]


def test_embeddings_as_prompt() -> None:
    model, prompt = tiny_model(GMLPForCausalLM), tokens(2, 5)
    expected = greedy(model, prompt, ROOM)[:, 5:]
    embeds = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=ROOM, do_sample=False), expected)
    assert model.generate(inputs_embeds=embeds, max_new_tokens=99, do_sample=False).shape == (2, ROOM)


def test_the_returned_cache_goes_on() -> None:
    model, prompt = tiny_model(GMLPForCausalLM, tiny_attention_size=4), tokens(2, 3)
    expected = greedy(model, prompt, 7)
    part = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = getattr(part, CACHE)
    assert isinstance(cache, GMLPCache)
    assert torch.equal(model.generate(part.sequences, cache=cache, max_new_tokens=3, do_sample=False), expected)


def test_a_cache_goes_on_with_the_new_tokens_alone_up_to_the_context(caplog) -> None:
    model, text = tiny_model(GMLPForCausalLM), tokens(1, 6)
    cache = GMLPCache(model.config)
    model(text[:, :4], cache=cache)
    wanted = {"max_new_tokens": 20, "do_sample": False}
    out = model.generate(text[:, 4:], attention_mask=torch.ones_like(text), cache=cache, **wanted)
    assert "generation stops at the model's context of 12 tokens, 14 short" in caplog.text
    assert torch.equal(out[:, 2:], model.generate(text, **wanted)[:, 6:])


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE.keys())
def test_a_cache_goes_on_behind_a_window_that_has_moved(options) -> None:
    model, prompt = tiny_model(GMLPForCausalLM, **options), tokens(2, 4)
    wanted = {"do_sample": False, "context_overflow": "reprefill"}
    part = model.generate(prompt, max_new_tokens=12, return_dict_in_generate=True, **wanted)
    text = torch.cat([part.sequences, tokens(2, 2)], dim=1)
    expected = model.generate(text, max_new_tokens=9, **wanted)
    assert torch.equal(model.generate(text, cache=getattr(part, CACHE), max_new_tokens=9, **wanted), expected)


def test_what_a_cache_cannot_go_on_with_is_refused_in_a_sentence() -> None:
    model, text = tiny_model(GMLPForCausalLM), tokens(1, 6)
    cache = GMLPCache(model.config)
    model(text, cache=cache)
    for prompt in (text, text[:, :2]):
        with pytest.raises(UserError, match=rf"already holds 6 tokens, the text has {prompt.shape[1]}"):
            model.generate(prompt, cache=cache, max_new_tokens=2)
    more = torch.cat([text, tokens(1, 1)], dim=1)
    for drafts in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}, {"assistant_early_exit": 1}):
        with pytest.raises(UserError, match=f"{next(iter(drafts))} begins with the whole text"):
            model.generate(more, cache=cache, max_new_tokens=2, **drafts)
    with pytest.raises(UserError, match="reprefill' needs the whole text"):
        model.generate(
            more[:, 6:], attention_mask=torch.ones_like(more), cache=cache, max_new_tokens=2,
            context_overflow="reprefill",
        )  # fmt: skip
    assert model.generate(more, cache=cache, max_new_tokens=2, do_sample=False).shape == (1, 9)


def test_drafts_of_the_prompt_end_at_the_context() -> None:
    model, part = tiny_model(GMLPForCausalLM), tokens(1, 2)
    for first in range(VOCABULARY):
        part[0, 0] = first
        prompt = part.repeat(1, 2)
        alone = model.generate(prompt, max_new_tokens=20, do_sample=False)
        drafted = model.generate(prompt, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=6)
        assert torch.equal(drafted, alone)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE.keys())
def test_a_full_context_stops_with_a_message(options, use_cache, caplog) -> None:
    model, prompt = tiny_model(GMLPForCausalLM, **options), tokens(2, 5)
    out = model.generate(prompt, max_new_tokens=50, do_sample=False, use_cache=use_cache)
    assert torch.equal(out, greedy(model, prompt, ROOM))
    assert "generation stops at the model's context of 12 tokens, 43 short" in caplog.text
    assert "context_overflow='reprefill'" in caplog.text


def by_hand(model: GMLPForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    """A context that starts over from its last half whenever it is full."""
    start = 0
    for _ in range(new):
        if ids.shape[1] - start > CONTEXT:
            start = ids.shape[1] - CONTEXT // 2
        ids = torch.cat([ids, model(ids[:, start:], use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE.keys())
def test_reprefill_goes_on_from_the_last_half(options, use_cache, caplog) -> None:
    model, prompt = tiny_model(GMLPForCausalLM, **options), tokens(2, 5)
    wanted = {"max_new_tokens": 40, "do_sample": False, "context_overflow": "reprefill", "use_cache": use_cache}
    assert torch.equal(model.generate(prompt, **wanted), by_hand(model, prompt, 40))
    long = tokens(1, 3 * CONTEXT)
    out = model.generate(long, **wanted)
    assert torch.equal(out[:, :-40], long)
    assert torch.equal(out, model.generate(long, **{**wanted, "use_cache": not use_cache}))
    assert not caplog.records


def test_reprefill_with_padding_and_beams() -> None:
    model, prompt = tiny_model(GMLPForCausalLM, tiny_attention_size=4), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for how in ({"num_beams": 2}, {}):
        wanted = {"max_new_tokens": 30, "do_sample": False, "context_overflow": "reprefill", **how}
        cached = model.generate(prompt, attention_mask=mask, **wanted)
        assert cached.shape == (2, 35)
        assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **wanted))


@pytest.mark.parametrize("options", TOEPLITZ.values(), ids=TOEPLITZ.keys())
def test_toeplitz_models_generate_without_limit(options, caplog) -> None:
    model, prompt = tiny_model(GMLPForCausalLM, **options), tokens(1, 5)
    out = model.generate(prompt, max_new_tokens=400, do_sample=False)
    assert out.shape == (1, 405)
    with torch.no_grad():
        logits = model(out[:, :-1], use_cache=False).logits[0, 4:]
    chosen = logits.gather(-1, out[0, 5:].unsqueeze(-1)).squeeze(-1)
    assert_close(chosen, logits.max(-1).values.double())
    assert not caplog.records


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prefix_mask_goes_with_the_prompt(use_cache) -> None:
    model, prompt = tiny_model(GMLPForCausalLM, tiny_attention_size=4), tokens(2, 4)
    prefix = torch.ones(4, 4, dtype=torch.bool)
    ids = prompt
    for _ in range(5):
        mask = extend_visibility(prefix.expand(2, 4, 4), ids.shape[1])
        ids = torch.cat([ids, model(ids, visibility_mask=mask).logits[:, -1:].argmax(-1)], dim=1)
    wanted = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache, "visibility_mask": prefix}
    assert torch.equal(model.generate(prompt, **wanted), ids)
    beams = model.generate(prompt, num_beams=2, **wanted)
    assert torch.equal(beams, model.generate(prompt, num_beams=2, **{**wanted, "use_cache": not use_cache}))


def test_windows_start_half_a_context_apart() -> None:
    assert [window_start(n, 12) for n in (1, 12, 13, 19, 20, 26, 27)] == [0, 0, 7, 7, 14, 14, 21]
    for context in (1, 2, 3, 7, 12):
        for n in range(1, 60):
            assert 1 <= n - window_start(n, context) <= context


def test_extended_visibility_is_causal_beyond_the_prompt() -> None:
    mask = extend_visibility(torch.tensor([[[1, 1], [0, 1]]]).bool(), 3)
    assert mask.int().tolist() == [[[1, 1, 0], [0, 1, 0], [1, 1, 1]]]


def test_bad_prompts_are_refused_in_a_sentence() -> None:
    model = tiny_model(GMLPForCausalLM)
    config = GenerationConfig(max_new_tokens=3)
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate(tokens(1, 0), config)
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate(tokens(0, 3), config)
    with pytest.raises(UserError, match="the prompt has 12 tokens and leaves no room in the model's context of 12"):
        model.generate(tokens(1, CONTEXT), config)
    with pytest.raises(UserError, match="token ids must lie between 0 and 30, got 77"):
        model.generate(torch.tensor([[3, 77]]), config)
    with pytest.raises(UserError, match="context_overflow must be 'stop' or 'reprefill', got 'slide'"):
        model.generate(tokens(1, 3), config, context_overflow="slide")
    with pytest.raises(UserError, match="leave cache_implementation out"):
        model.generate(tokens(1, 3), config, cache_implementation="static")
    with pytest.raises(UserError, match="needs the prompt as input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 10), max_new_tokens=3, context_overflow="reprefill")


@pytest.mark.usefixtures("unchecked")
def test_a_prompt_that_is_no_batch_of_tokens_is_refused_in_a_sentence() -> None:
    model = tiny_model(GMLPForCausalLM)
    for prompt, named in ((tokens(3), r"one of shape \[3\]"), ([[1, 2]], "list")):
        with pytest.raises(UserError, match=rf"a tensor \[batch, tokens\] of token ids, got {named}"):
            model.generate(prompt, max_new_tokens=3)


def test_drafts_do_not_go_with_reprefill_but_with_other_models() -> None:
    model, prompt = tiny_model(GMLPForCausalLM), tokens(1, 5)
    asked = {
        "prompt_lookup_num_tokens": 2, "assistant_model": tiny_model(GMLPForCausalLM), "assistant_early_exit": 1,
        "prefill_chunk_size": 3,
    }  # fmt: skip
    for drafts in ({name: value} for name, value in asked.items()):
        with pytest.raises(UserError, match=f"reprefill' does not go with {next(iter(drafts))}"):
            model.generate(prompt, max_new_tokens=20, context_overflow="reprefill", **drafts)
    model.generation_config.prompt_lookup_num_tokens = 2
    with pytest.raises(UserError, match="reprefill' does not go with prompt_lookup_num_tokens"):
        model.generate(prompt, max_new_tokens=20, context_overflow="reprefill")
    model.generation_config.prompt_lookup_num_tokens = None
    sizes = {"n_embd": 8, "n_head": 1, "n_layer": 1, "bos_token_id": None, "eos_token_id": None}
    other = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()
    wanted = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, assistant_model=other, **wanted), model.generate(prompt, **wanted))


def test_other_caches_are_refused() -> None:
    model, prompt = tiny_model(GMLPForCausalLM), tokens(1, 5)
    with pytest.raises(UserError, match="on a GMLPCache of their own, got DynamicCache"):
        model.generate(prompt, past_key_values=DynamicCache())
    with pytest.raises(UserError, match="leave cache_implementation out"):
        model.generate(prompt, generation_config=GenerationConfig(cache_implementation="static", max_new_tokens=2))
