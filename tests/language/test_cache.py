import contextlib
import copy

import pytest
import torch

from allmlp.errors import UserError
from allmlp.language import (
    GMLPCache,
    GMLPForCausalLM,
    GMLPForQuestionAnswering,
    GMLPForSequenceClassification,
    GMLPForTokenClassification,
)
from allmlp.language.cache import CACHE
from tests.language.tiny import CONTEXT, OPTIONS, TOEPLITZ, tiny_config, tiny_model, tokens
from tests.tolerances import assert_close

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
each_toeplitz = pytest.mark.parametrize("options", TOEPLITZ.values(), ids=TOEPLITZ.keys())
# How a sequence of 12 tokens is handed over.
CHUNKS = {"one-by-one": [1] * 12, "prompt-then-one-by-one": [5] + [1] * 7, "chunks": [4, 3, 1, 4], "at-once": [12]}


def decode(model: GMLPForCausalLM, ids: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None) -> list:
    """The logits of every token, computed chunk by chunk on a cache, and the cache."""
    cache, logits, done = GMLPCache(model.config), [], 0
    with torch.no_grad():
        for n in chunks:
            seen = None if mask is None else mask[:, : done + n]
            out = model(ids[:, done : done + n], attention_mask=seen, cache=cache)
            assert getattr(out, CACHE) is cache
            logits.append(out.logits)
            done += n
            assert cache.get_seq_length() == done
    return [torch.cat(logits, dim=1), cache]


def of(n: int, length: int) -> list[int]:
    """Chunks of `n` tokens, and one of what is left over."""
    return [n] * (length // n) + [length % n] * (length % n > 0)


def whole(model: GMLPForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@each_option
def test_cached_logits_are_the_uncached_ones_at_every_position(options, chunks) -> None:
    model, ids = tiny_model(GMLPForCausalLM, **options), tokens(2, CONTEXT)
    assert_close(decode(model, ids, chunks)[0], whole(model, ids).double())


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@each_option
def test_so_are_those_of_padded_batches(options, chunks) -> None:
    model, ids = tiny_model(GMLPForCausalLM, **options), tokens(4, CONTEXT)
    mask = torch.ones(4, CONTEXT, dtype=torch.long)
    mask[0, :6] = 0  # left, across several chunks
    mask[1, 0] = 0
    mask[2, [2, 3, 7]] = 0  # in between
    logits = decode(model, ids, chunks, mask)[0]
    for b in range(4):
        real = mask[b].bool()
        assert_close(logits[b, real], whole(model, ids[b : b + 1, real])[0].double())


def test_a_mask_may_come_and_go() -> None:
    model, ids = tiny_model(GMLPForCausalLM, tiny_attention_size=4, token_shift=1), tokens(2, 8)
    cache, expected = GMLPCache(model.config), whole(model, ids)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        model(ids[:, 4:6], attention_mask=torch.ones(2, 6), cache=cache)
        out = model(ids[:, 6:], cache=cache)
    assert_close(out.logits, expected[:, 6:].double())


@pytest.mark.parametrize("length", [40, CONTEXT + 290])
@each_toeplitz
def test_toeplitz_streams_exactly_beyond_its_trained_length(options, length) -> None:
    model, ids = tiny_model(GMLPForCausalLM, **options), tokens(2, length)
    expected = whole(model, ids)
    for chunks in ([1] * length, [30, 1, 5, *of(3, length - 36)], [length - 2, 1, 1]):
        logits = decode(model, ids, chunks)[0]
        assert_close(logits, expected.double())
    mask = torch.ones(2, length)
    mask[0, :7] = 0
    logits = decode(model, ids, [20, *of(4, length - 20)], mask)[0]
    assert_close(logits[1], expected[1].double())
    assert_close(logits[0, 7:], whole(model, ids[:1, 7:])[0].double())


def test_streaming_takes_no_more_memory_than_the_reach() -> None:
    model = tiny_model(GMLPForCausalLM, spatial_weight="toeplitz")
    cache = decode(model, tokens(1, 700), of(10, 700))[1]
    assert cache.kept[0].buffers["gate"].shape[1] == cache.window == 2 * (CONTEXT + 128)
    assert cache.base > 400


@pytest.mark.parametrize("padded", [False, True])
def test_no_more_is_kept_of_a_long_prompt(padded) -> None:
    model = tiny_model(GMLPForCausalLM, spatial_weight="toeplitz", tiny_attention_size=4, token_shift=2)
    ids, mask = tokens(2, 1004), torch.ones(2, 1004)
    if padded:
        mask[0, :60] = 0
    given = mask if padded else None
    for layer in decode(model, ids[:, :900], [900], None if given is None else given[:, :900])[1].kept:
        assert {kept.shape[1] for kept in layer.buffers.values()} == {2 * (CONTEXT + 128)}
    logits, cache = decode(model, ids, [900, *of(26, 104)], given)
    cache.crop(-100)
    with torch.no_grad():
        again = model(ids[:, 904:], attention_mask=given, cache=cache).logits
    for b in range(2):
        real = mask[b].bool()
        expected = whole(model, ids[b : b + 1, real])[0].double()
        assert_close(logits[b, real], expected)
        assert_close(again[b], expected[-100:])


def test_a_short_row_keeps_what_it_reads_of_a_long_prompt() -> None:
    model, ids = tiny_model(GMLPForCausalLM, spatial_weight="toeplitz", tiny_attention_size=4), tokens(2, 600)
    mask = torch.ones(2, 600)
    mask[0, :560] = 0
    logits = decode(model, ids, [590, *of(1, 10)], mask)[0]
    assert_close(logits[0, 560:], whole(model, ids[:1, 560:])[0].double())
    assert_close(logits[1], whole(model, ids[1:])[0].double())


def test_memory_is_allocated_once() -> None:
    model, ids = tiny_model(GMLPForCausalLM), tokens(1, CONTEXT)
    cache = GMLPCache(model.config, CONTEXT)
    with torch.no_grad():
        model(ids[:, :3], cache=cache)
        before = [layer.buffers["gate"].data_ptr() for layer in cache.kept]
        for t in range(3, CONTEXT):
            model(ids[:, t : t + 1], cache=cache)
    assert [layer.buffers["gate"].data_ptr() for layer in cache.kept] == before
    assert cache.kept[0].buffers["gate"].shape == (1, CONTEXT, 12)
    growing = decode(model, ids, [1] * CONTEXT)[1]
    assert growing.capacity == CONTEXT


@each_option
def test_taken_back_tokens_leave_no_trace(options) -> None:
    model, ids, other = tiny_model(GMLPForCausalLM, **options), tokens(2, CONTEXT), tokens(2, CONTEXT)
    for mask in (None, torch.tensor([[0, 0] + [1] * 10, [1] * 12])):
        cache = decode(model, torch.cat([ids[:, :5], other[:, 5:9]], dim=1), [6, 1, 2], mask)[1]
        cache.crop(-4)
        with torch.no_grad():
            seen = None if mask is None else mask[:, :7]
            out = model(ids[:, 5:7], attention_mask=seen, cache=cache).logits
        assert_close(out, whole(model, ids[:, :7], seen)[:, 5:].double())


def test_crop_refuses_what_it_cannot_do() -> None:
    model = tiny_model(GMLPForCausalLM, spatial_weight="toeplitz")
    cache = decode(model, tokens(1, 600), of(10, 600))[1]
    with pytest.raises(ValueError, match="cannot take back 590 tokens"):
        cache.crop(-590)
    with pytest.raises(ValueError, match="crop takes a number from -600 to 0, got 1"):
        cache.crop(1)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_can_be_reordered_selected_and_repeated(padded) -> None:
    model, ids = tiny_model(GMLPForCausalLM, tiny_attention_size=4, token_shift=1), tokens(3, 7)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask = mask if padded else None
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = decode(model, ids, [4, 2], mask)[1]
        change(cache)
        assert cache.batch_size == len(rows)
        seen = None if mask is None else mask[rows]
        with torch.no_grad():
            out = model(ids[rows, 6:], attention_mask=seen, cache=cache).logits
        assert_close(out, whole(model, ids[rows], seen)[:, 6:].double())


def test_a_prefix_mask_at_the_prompt_is_kept_while_decoding() -> None:
    model, ids, prefix = tiny_model(GMLPForCausalLM, tiny_attention_size=4), tokens(2, 8), 5
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    cache = GMLPCache(model.config)
    with torch.no_grad():
        expected = model(ids, visibility_mask=mask, use_cache=False).logits
        model(ids[:, :prefix], visibility_mask=mask[:prefix, :prefix], cache=cache)
        assert_close(model(ids[:, prefix:], cache=cache).logits, expected[:, prefix:].double())
        with pytest.raises(UserError, match="belongs to the first tokens"):
            model(ids[:, :2], visibility_mask=mask[:2, :2], cache=cache)


def test_a_cache_from_inference_mode_goes_on_outside_of_it() -> None:
    model, ids = tiny_model(GMLPForCausalLM, tiny_attention_size=4), tokens(2, 6)
    cache = GMLPCache(model.config, CONTEXT)
    with torch.inference_mode():
        model(ids[:, :4], cache=cache)
    assert_close(model(ids[:, 4:], cache=cache).logits, model(ids).logits[:, 4:].double())


def test_transformers_face() -> None:
    cache = GMLPCache(tiny_config())
    assert (len(cache), cache.get_max_length(), cache.batch_size) == (3, CONTEXT, -1)
    assert GMLPCache(tiny_config(spatial_weight="toeplitz")).get_max_length() == -1
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    assert repr(cache) == "GMLPCache(layers=3, tokens=0, capacity=0)"
    filled = decode(tiny_model(GMLPForCausalLM), tokens(2, 4), [4])[1]
    filled.reset()
    assert filled.get_seq_length() == 0


def test_the_context_and_the_batch_are_guarded() -> None:
    model = tiny_model(GMLPForCausalLM)
    cache = decode(model, tokens(2, CONTEXT), [CONTEXT])[1]
    with pytest.raises(UserError, match="13 tokens do not fit the model's context of 12"):
        model(tokens(2, 1), cache=cache)
    cache.crop(-1)
    with pytest.raises(UserError, match="the cache holds 2 sequences, the input 3"):
        model(tokens(3, 1), cache=cache)
    with pytest.raises(UserError, match=r"attention_mask must be of shape \[2, 12\] .* got \[2, 1\]"):
        model(tokens(2, 1), attention_mask=torch.ones(2, 1), cache=cache)


def test_training_returns_no_cache() -> None:
    model, ids = tiny_model(GMLPForCausalLM), tokens(1, 4)
    assert getattr(model.train()(ids), CACHE) is None
    assert getattr(model.eval()(ids, use_cache=False), CACHE) is None
    assert getattr(model(ids), CACHE).get_seq_length() == 4
    model.config.use_cache = False
    assert getattr(model(ids), CACHE) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_takes_no_cache(reentrant) -> None:
    model, ids = tiny_model(GMLPForCausalLM, tiny_attention_size=4, token_shift=1).train(), tokens(2, 8)
    filled = decode(model, ids, [5])[1]
    expected = model(ids)
    expected.logits.sum().backward()
    gradient = model.model.layers[0].proj_in.weight.grad.clone()
    model.zero_grad()
    # By its name since transformers 5.23, or before.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    for given in ({"use_cache": True}, {"cache": GMLPCache(model.config)}):
        out = model(ids, **given)
        assert getattr(out, CACHE) is None
        assert_close(out.logits, expected.logits.double())
        out.logits.sum().backward()
        assert_close(model.model.layers[0].proj_in.weight.grad, gradient.double())
        model.zero_grad()
    with pytest.raises(UserError, match="holds 5 tokens, and training with gradient checkpointing takes none"):
        model(ids[:, 5:], cache=filled)
    for without_gradients in (torch.no_grad(), contextlib.nullcontext(model.eval())):
        with without_gradients:
            assert_close(model(ids[:, 5:], cache=copy.deepcopy(filled)).logits, expected.logits[:, 5:].double())


@pytest.mark.parametrize(
    "kind", [GMLPForSequenceClassification, GMLPForTokenClassification, GMLPForQuestionAnswering, GMLPForCausalLM]
)
def test_heads_that_decode_nothing_fill_no_cache(kind, monkeypatch) -> None:
    begun, begin = [], GMLPCache.begin
    monkeypatch.setattr(GMLPCache, "begin", lambda cache, *given: begun.append(cache) or begin(cache, *given))
    with torch.no_grad():
        tiny_model(kind, is_decoder=True)(tokens(1, 4))
    assert bool(begun) == (kind is GMLPForCausalLM)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_of_transformers_names_are_taken(name) -> None:
    model, ids = tiny_model(GMLPForCausalLM), tokens(2, 6)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    cache = GMLPCache(model.config)
    with torch.no_grad():
        for one in (model.model, model):
            cache.reset()
            assert getattr(one(ids[:, :4], **{name: cache}), CACHE) is cache
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, **{name: cache}), expected)
    assert cache.get_seq_length() == 8
    with pytest.raises(UserError, match="give one cache"):
        model(ids[:, 4:], cache=cache, past_key_values=cache)
