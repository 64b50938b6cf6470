import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from allmlp.benchmark.memory import peak_memory
from allmlp.errors import UserError
from allmlp.language import (
    GMLPForCausalLM,
    GMLPForMaskedLM,
    GMLPForQuestionAnswering,
    GMLPForSequenceClassification,
    GMLPForTokenClassification,
    GMLPModel,
)
from allmlp.language.cache import CACHE
from allmlp.language.modeling import GMLPBlock, sinusoids
from allmlp.ops import visible_tokens
from tests.fused import assert_fused_matches
from tests.language.tiny import CONTEXT, OPTIONS, TOEPLITZ, VOCABULARY, tiny_config, tiny_model, tokens
from tests.tolerances import assert_close

AUTO = {
    AutoModel: GMLPModel,
    AutoModelForCausalLM: GMLPForCausalLM,
    AutoModelForMaskedLM: GMLPForMaskedLM,
    AutoModelForSequenceClassification: GMLPForSequenceClassification,
    AutoModelForTokenClassification: GMLPForTokenClassification,
    AutoModelForQuestionAnswering: GMLPForQuestionAnswering,
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
each_lm = pytest.mark.parametrize("kind", [GMLPForCausalLM, GMLPForMaskedLM])


def first(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, return_dict=False, **kwargs)[0]


def test_the_paper_model_is_its_equations() -> None:
    model = tiny_model(GMLPForCausalLM, num_spatial_heads=1).double()
    p = dict(model.named_parameters())
    ids = tokens(2, CONTEXT)
    x = p["model.embed_tokens.weight"][ids]
    for i in range(3):
        block = {name.split(f"layers.{i}.")[1]: value for name, value in p.items() if f"layers.{i}." in name}
        h = F.layer_norm(x, (10,), block["norm.weight"], block["norm.bias"])
        u, v = F.gelu(h @ block["proj_in.weight"].T + block["proj_in.bias"]).chunk(2, dim=-1)
        v = F.layer_norm(v, (12,), block["sgu.norm.weight"], block["sgu.norm.bias"])
        gate = torch.einsum("ij,bje->bie", block["sgu.weight"][0].tril(), v) + block["sgu.bias"][0][:, None]
        x = x + (u * gate) @ block["proj_out.weight"].T + block["proj_out.bias"]
    x = F.layer_norm(x, (10,), p["model.norm.weight"], p["model.norm.bias"])
    assert_close(first(model, ids), x @ p["model.embed_tokens.weight"].T)


@each_option
def test_causal_means_causal_to_the_bit(options) -> None:
    model = tiny_model(GMLPForCausalLM, **options)
    ids = tokens(3, CONTEXT)
    before = first(model, ids, use_cache=False)
    for t in range(1, CONTEXT):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1 + torch.randint(0, VOCABULARY - 1, (3, CONTEXT - t))) % VOCABULARY
        after = first(model, changed, use_cache=False)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("options", TOEPLITZ.values(), ids=TOEPLITZ.keys())
def test_causal_through_the_fft_to_rounding(options, monkeypatch) -> None:
    monkeypatch.setattr("allmlp.ops.toeplitz.FFT_TOKENS", 1)
    model = tiny_model(GMLPForCausalLM, **options)
    ids = tokens(1, 2 * CONTEXT)
    changed = ids.clone()
    changed[:, CONTEXT:] = (changed[:, CONTEXT:] + 1) % VOCABULARY
    assert_close(first(model, changed)[:, :CONTEXT], first(model, ids)[:, :CONTEXT])


@each_option
def test_masked_models_read_in_both_directions(options) -> None:
    model = tiny_model(GMLPForMaskedLM, **options)
    ids = tokens(1, CONTEXT)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    assert not torch.equal(first(model, changed)[:, 0], first(model, ids)[:, 0])


@each_lm
@each_option
def test_padding_changes_nothing_on_either_side(options, kind) -> None:
    model = tiny_model(kind, **options)
    lengths = [CONTEXT - 2, 4, 1]
    rows = [tokens(1, n) for n in lengths]
    for side in ("left", "right", "middle"):
        ids = torch.full((3, CONTEXT - 2), VOCABULARY - 1)
        mask = torch.zeros(3, CONTEXT - 2, dtype=torch.long)
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            spread = [0, *range(CONTEXT - 1 - n, CONTEXT - 2)] if n > 1 else [3]
            where = {"left": slice(-n, None), "right": slice(0, n), "middle": spread}[side]
            ids[b, where], mask[b, where] = row[0], 1
        out = first(model, ids, attention_mask=mask)
        for b, row in enumerate(rows):
            assert_close(out[b, mask[b].bool()], first(model, row)[0].double())


@each_lm
def test_a_row_of_padding_alone_harms_nobody(kind) -> None:
    model = tiny_model(kind, tiny_attention_size=4)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert first(model, tokens(2, 3), attention_mask=mask).isfinite().all()


# A token shift reads its neighbours whatever the mask says.
@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if "token_shift" not in o], ids=lambda o: "-".join(o))
def test_a_visibility_mask_makes_a_prefix_language_model(options) -> None:
    model, ids, prefix = tiny_model(GMLPForCausalLM, **options), tokens(2, CONTEXT), 5
    mask = visible_tokens(CONTEXT, causal=True)
    mask[:prefix, :prefix] = True
    before = first(model, ids, visibility_mask=mask)
    for changed_at in range(CONTEXT):
        changed = ids.clone()
        changed[:, changed_at] = (changed[:, changed_at] + 1) % VOCABULARY
        after = first(model, changed, visibility_mask=mask)
        untouched = 0 if changed_at < prefix else changed_at
        assert torch.equal(after[:, :untouched], before[:, :untouched])
        assert not torch.equal(after[:, 0], before[:, 0]) or changed_at >= prefix
    for same in ({"attention_mask": mask.expand(2, -1, -1)}, {"attention_mask": mask.expand(2, 1, -1, -1)}):
        assert torch.equal(first(model, ids, **same), before)
    causal = visible_tokens(CONTEXT, causal=True)
    assert_close(first(model, ids, visibility_mask=causal), first(model, ids).double())


@each_lm
def test_visibility_and_padding_together(kind) -> None:
    model = tiny_model(kind, tiny_attention_size=4, num_spatial_heads=2)
    row, n = tokens(1, 6), 6
    visible = torch.rand(n, n) < 0.7
    expected = first(model, row, visibility_mask=visible)
    padded = torch.cat([tokens(1, 3), row], dim=1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, n)], dim=1)
    wide = torch.ones(n + 3, n + 3, dtype=torch.bool)
    wide[3:, 3:] = visible
    assert_close(first(model, padded, attention_mask=mask, visibility_mask=wide)[:, 3:], expected.double())


@each_lm
@each_option
def test_saved_models_come_back_through_the_auto_classes(options, kind, tmp_path) -> None:
    model = tiny_model(kind, **options)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    auto = AutoModelForCausalLM if kind is GMLPForCausalLM else AutoModelForMaskedLM
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert loaded.config.is_decoder == (kind is GMLPForCausalLM)
    ids = tokens(2, 7)
    assert torch.equal(first(loaded, ids), first(model, ids))
    backbone = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(first(backbone, ids), first(model.model, ids))


@pytest.mark.parametrize(("auto", "kind"), AUTO.items(), ids=lambda c: c.__name__)
def test_auto_classes_build_and_initialise(auto, kind) -> None:
    model = auto.from_config(tiny_config())
    assert type(model) is kind
    for block in model.get_submodule("model.layers" if kind is not GMLPModel else "layers"):
        assert block.sgu.weight.abs().max() <= 1e-3 / CONTEXT
        assert (block.sgu.bias == 1).all()
        assert block.proj_in.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_heads_are_initialised_when_a_backbone_is_fine_tuned(tmp_path) -> None:
    tiny_model(GMLPForMaskedLM).save_pretrained(tmp_path)
    model = GMLPForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.score.weight.shape == (3, 10)
    assert 0 < model.score.weight.std() < 0.1
    assert not model.config.is_decoder


def test_the_callers_configuration_is_left_alone() -> None:
    config = tiny_config()
    assert GMLPForCausalLM(config).config.is_decoder
    assert not config.is_decoder


@each_lm
def test_embeddings_resize_with_the_head(kind) -> None:
    for options in ({}, {"tie_word_embeddings": False, "lm_head_bias": True}):
        model = tiny_model(kind, **options)
        ids = tokens(2, 5)
        before = first(model, ids)
        model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
        after = first(model, ids)
        assert after.shape[-1] == VOCABULARY + 4
        assert_close(after[..., :VOCABULARY], before.double())
        assert model(torch.tensor([[VOCABULARY + 3]])).logits.isfinite().all()


def test_tied_heads_share_their_weight() -> None:
    assert tiny_model(GMLPForCausalLM).lm_head.weight is not None
    tied, untied = tiny_model(GMLPForCausalLM), tiny_model(GMLPForCausalLM, tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.num_parameters() == tied.num_parameters() + VOCABULARY * 10


@pytest.mark.parametrize(("end", "learns"), [(7, True), ([3, 7], True), (3, False), (None, False)])
def test_an_end_of_text_that_also_pads_is_learnt(end, learns) -> None:
    model = GMLPForCausalLM(tiny_config(pad_token_id=7, eos_token_id=end, tie_word_embeddings=False))
    ids = torch.tensor([[1, 7, 2, 7, 3]])
    loss = model(ids, labels=ids).loss
    loss.backward()
    weight = model.model.embed_tokens.weight
    assert (weight[7].any(), weight.grad[7].any()) == (learns, learns)


def test_a_vocabulary_may_be_cut_in_front_of_the_padding(tmp_path) -> None:
    model = GMLPForCausalLM(tiny_config(pad_token_id=7))
    model.resize_token_embeddings(5)
    model.save_pretrained(tmp_path)
    ids = tokens(2, 5) % 5
    torch.testing.assert_close(GMLPForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model.eval()(ids).logits)


@each_option
def test_embeddings_may_be_given_in_place_of_ids(options) -> None:
    model, ids = tiny_model(GMLPForCausalLM, **options), tokens(2, 5)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(first(model, inputs_embeds=embeds), first(model, ids))


def test_hidden_states_are_the_embedding_and_every_blocks_output() -> None:
    model, ids = tiny_model(GMLPForCausalLM), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = model.model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("kind", [GMLPForCausalLM, GMLPForMaskedLM])
def test_inference_of_more_blocks_needs_no_more_memory(kind) -> None:
    """What a block was given is freed behind it."""
    input_ids = tokens(4, CONTEXT)

    def peak(blocks: int) -> int:
        model = tiny_model(kind, num_hidden_layers=blocks)
        with torch.no_grad():
            return peak_memory(lambda: model(input_ids, use_cache=False), torch.device("cpu"))

    peak(1)  # what is made at the first call stays
    assert peak(9) == peak(3)


@each_option
@pytest.mark.parametrize("kind", [GMLPForCausalLM, GMLPForMaskedLM])
@pytest.mark.parametrize("masked", ["nothing", "padding", "one for all", "one for each"])
@pytest.mark.parametrize("watch", [False, True], ids=["unwatched", "watched"])
def test_large_batches_run_in_slices(options, kind, masked, watch, monkeypatch) -> None:
    model, input_ids = tiny_model(kind, **options), tokens(5, CONTEXT)
    real = torch.arange(CONTEXT) < torch.tensor([12, 3, 7, 12, 1]).unsqueeze(1)
    seen = torch.rand(5, CONTEXT, CONTEXT) < 0.5
    given = {
        "nothing": {},
        "padding": {"attention_mask": real},
        "one for all": {"visibility_mask": seen[0]},
        "one for each": {"visibility_mask": seen, "attention_mask": real},
    }[masked]
    sizes: list[int] = []
    with torch.no_grad():
        expected = model(input_ids, use_cache=False, **given).logits
        sample = 4 * model.get_input_embeddings()(input_ids)[0].numel() * 4
        monkeypatch.setattr("allmlp.layers.batch_slices.LARGEST_KEPT_BYTES", 2 * sample)
        monkeypatch.setattr("allmlp.layers.batch_slices._SLICE_BYTES", 2 * sample)
        run = GMLPBlock.forward
        monkeypatch.setattr(
            GMLPBlock, "forward", lambda self, x, *rest, **named: sizes.append(len(x)) or run(self, x, *rest, **named)
        )
        if watch:
            model.model.layers[0].register_forward_hook(lambda *_: None)
        assert_close(model(input_ids, use_cache=False, **given).logits, expected)
    assert sizes == ([5] * 3 if watch else [2] * 3 + [2] * 3 + [1] * 3)


def test_next_token_loss_shifts_the_labels() -> None:
    model, ids = tiny_model(GMLPForCausalLM), tokens(2, 6)
    labels = ids.clone()
    labels[0, 3] = -100
    out = model(ids, labels=labels)
    targets = labels[:, 1:].flatten()
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets).double())
    assert getattr(out, CACHE) is None
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss
    assert_close(summed, out.loss.double() * 9 / 5)


def test_masked_loss_does_not_shift() -> None:
    model, ids = tiny_model(GMLPForMaskedLM), tokens(2, 6)
    labels = torch.where(torch.rand(2, 6) < 0.5, ids, -100)
    labels[0, 0] = ids[0, 0]
    out = model(ids, labels=labels)
    assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()).double())


def test_logits_to_keep() -> None:
    model, ids = tiny_model(GMLPForCausalLM), tokens(2, 6)
    every = first(model, ids)
    assert_close(first(model, ids, logits_to_keep=2), every[:, -2:].double())
    assert_close(first(model, ids, logits_to_keep=torch.tensor([0, 3])), every[:, [0, 3]].double())


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_reads_real_tokens(side, causal) -> None:
    model = tiny_model(GMLPForSequenceClassification, is_decoder=causal, num_labels=3)
    rows = [tokens(1, 5), tokens(1, 3)]
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]])
    ids = tokens(2, 5).masked_scatter(mask.bool(), torch.cat([row[0] for row in rows]))
    out = first(model, ids, attention_mask=mask)
    for b, row in enumerate(rows):
        assert_close(out[b], first(model, row)[0].double())
    hidden = first(model.model, rows[0])[0]
    pooled = hidden[-1] if causal else hidden.mean(0)
    assert_close(out[0], model.score(pooled).detach().double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_texts_are_pooled_in_16_bits(dtype) -> None:
    model = tiny_model(GMLPForSequenceClassification, spatial_weight="toeplitz").to(dtype)
    nn.init.zeros_(model.model.norm.weight)
    nn.init.constant_(model.model.norm.bias, 20)
    ids = tokens(1, 4001)
    expected = model.score(model.model.norm.bias).detach()
    for mask in (None, torch.ones_like(ids)):
        assert_close(first(model, ids, attention_mask=mask)[0], expected.double())


def test_classification_losses() -> None:
    ids = tokens(2, 5)
    model = tiny_model(GMLPForSequenceClassification, num_labels=3)
    out = model(ids, labels=torch.tensor([2, 0]))
    assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([2, 0])).double())
    regression = tiny_model(GMLPForSequenceClassification, num_labels=1)
    out = regression(ids, labels=torch.tensor([0.5, -1.0]))
    assert_close(out.loss, F.mse_loss(out.logits.squeeze(), torch.tensor([0.5, -1.0])).double())
    labels = torch.randint(0, 3, (2, 5))
    tagged = tiny_model(GMLPForTokenClassification, num_labels=3)(ids, labels=labels)
    assert_close(tagged.loss, F.cross_entropy(tagged.logits.flatten(0, 1), labels.flatten()).double())
    start, end = torch.tensor([0, 2]), torch.tensor([1, 4])
    answer = tiny_model(GMLPForQuestionAnswering)(ids, start_positions=start, end_positions=end)
    expected = F.cross_entropy(answer.start_logits, start) + F.cross_entropy(answer.end_logits, end)
    assert_close(answer.loss, expected.double() / 2)


@each_option
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(options) -> None:
    ids = tokens(2, CONTEXT)
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(GMLPForCausalLM, **{**options, "survival_probability": 1.0, "hidden_dropout": 0.0}).train()
        if checkpointing:
            # By its name since transformers 5.23, or before.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.any(), name
        assert_close(grads[1][name], grad.double())


def test_stochastic_depth_drops_blocks_for_single_sequences() -> None:
    model = tiny_model(GMLPForCausalLM, survival_probability=0.5).train()
    ids = tokens(1, 5).expand(400, -1)
    outputs = {tuple(row.flatten().tolist()) for row in first(model, ids)}
    assert len(outputs) == 2**3
    model.eval()
    assert torch.equal(first(model, ids)[0], first(model, ids)[399])
    block = model.model.layers[0].train()
    x = torch.randn(1, 5, 10)
    branch = (block(x.expand(4000, -1, -1)) - x).mean(0)
    torch.testing.assert_close(branch, (block.eval()(x) - x)[0], rtol=0.1, atol=0.1)


def test_sinusoids_alternate_sine_and_cosine() -> None:
    table = sinusoids(torch.arange(50), 7)
    for p in (0, 1, 49):
        for c in range(7):
            angle = p / 10_000 ** ((c - c % 2) / 7)
            assert table[p, c].item() == pytest.approx(math.cos(angle) if c % 2 else math.sin(angle), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sinusoids_do_not_depend_on_the_default_dtype(dtype) -> None:
    expected = sinusoids(torch.arange(600), 8)
    try:
        torch.set_default_dtype(dtype)
        found = sinusoids(torch.arange(600), 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_bad_input_is_refused_in_a_sentence() -> None:
    model = tiny_model(GMLPForCausalLM)
    with pytest.raises(UserError, match="token ids must lie between 0 and 30, got 31; does the tokenizer belong"):
        model(torch.tensor([[3, VOCABULARY]]))
    with pytest.raises(UserError, match="between 0 and 30, got -1"):
        model(torch.tensor([[3, -1]]))
    with pytest.raises(UserError, match="the input is empty"):
        model(tokens(2, 0))
    with pytest.raises(UserError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens do not fit the model's context of {CONTEXT}"):
        model(tokens(1, CONTEXT + 1))
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens do not fit the model's context of {CONTEXT}"):
        tiny_model(GMLPForMaskedLM)(tokens(1, CONTEXT + 1))
    with pytest.raises(UserError, match="only causal models have a decoding cache"):
        tiny_model(GMLPModel)(tokens(1, 3), use_cache=True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [GMLPModel, GMLPForCausalLM, GMLPForMaskedLM, GMLPForSequenceClassification])
def test_a_configuration_may_ask_for_tuples(kind) -> None:
    model, ids = tiny_model(kind), tokens(2, 5)
    expected = model(ids)[0]
    model.config.return_dict = False
    out = model(ids)
    assert type(out) is tuple
    assert torch.equal(out[0], expected)
    assert not isinstance(model(ids, return_dict=True), tuple)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [GMLPForCausalLM, GMLPForMaskedLM])
def test_what_is_no_batch_is_refused_in_a_sentence(kind) -> None:
    model, ids = tiny_model(kind), tokens(1, 2, 5)
    for wrong, shape in ((ids[0, 0], r"\[5\]"), (ids, r"\[1, 2, 5\]")):
        with pytest.raises(UserError, match=rf"must be a batch of texts, \[batch, tokens\], got one of {shape}"):
            model(wrong)


@pytest.mark.parametrize("kind", AUTO.values())
def test_positions_are_counted_and_those_of_packed_texts_refused(kind) -> None:
    model, ids = tiny_model(kind), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    assert torch.equal(model(ids, attention_mask=mask, position_ids=counted)[0], model(ids, attention_mask=mask)[0])
    for packed in ([0, 1, 2, 0, 1], [0, 0, 0, 1, 2]):
        with pytest.raises(UserError, match="position_ids must go up by one"):
            model(ids[:1], position_ids=torch.tensor([packed]))


@pytest.mark.parametrize("options", [{}, {"num_spatial_heads": 3}], ids=["plain", "heads"])
def test_fused_operators_change_nothing(options) -> None:
    model = tiny_model(GMLPForCausalLM, **options)
    ids = tokens(2, CONTEXT - 1)
    kernels = {"token_statistics", "gated_product", "gated_product_backward_read", "gated_product_backward_weight"}
    assert_fused_matches(model, lambda: model(ids, use_cache=False).logits, kernels)


def test_blocks_survive_by_the_probability_that_is_given() -> None:
    layers = tiny_model(GMLPForCausalLM, survival_probability=0.9).model.layers
    assert [block.drop_path.drop_prob for block in layers] == pytest.approx([0.1] * len(layers))


def test_dropout_stands_behind_the_embedding_and_in_front_of_heads() -> None:
    model = tiny_model(GMLPForMaskedLM, hidden_dropout=0.5).train()
    embedded = model(tokens(50, 5), output_hidden_states=True).hidden_states[0]
    assert 0.4 < (embedded == 0).float().mean() < 0.6
    classifier = tiny_model(GMLPForSequenceClassification, hidden_dropout=0.5).train()
    classifier.model.eval()
    assert classifier(tokens(1, 5).expand(8, -1)).logits.std(0).max() > 1e-3


def test_a_text_of_padding_alone_has_a_class_too() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert tiny_model(GMLPForSequenceClassification)(tokens(2, 3), attention_mask=mask).logits.isfinite().all()
