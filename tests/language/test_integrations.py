"""gMLP language models where their users meet them: transformers, PEFT, compilers, 16-bit arithmetic."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from allmlp.language import (
    GMLPCache,
    GMLPForCausalLM,
    GMLPForMaskedLM,
    GMLPForSequenceClassification,
    GMLPForTokenClassification,
)
from tests.language.tiny import CONTEXT, OPTIONS, VOCABULARY, tiny_config, tiny_model, tokens
from tests.tolerances import assert_close

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def letters() -> PreTrainedTokenizerFast:
    vocabulary = {chr(ord("a") + i): i for i in range(26)} | {" ": 26, "?": 27, "[PAD]": 28, "[MASK]": 29}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="?", pad_token="[PAD]", mask_token="[MASK]", padding_side="left"
    )


def test_text_generation_pipeline(tmp_path) -> None:
    tiny_model(GMLPForCausalLM, spatial_weight="toeplitz").save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["hello w", "abc"]
    wanted = {"max_new_tokens": 20, "do_sample": False}
    alone = [generate(prompt, **wanted)[0]["generated_text"] for prompt in prompts]
    together = [answers[0]["generated_text"] for answers in generate(prompts, batch_size=2, **wanted)]
    assert alone == together
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(alone, prompts, strict=True))


def test_fill_mask_and_text_classification_pipelines(tmp_path) -> None:
    tokenizer = letters()
    answers = pipeline("fill-mask", model=tiny_model(GMLPForMaskedLM), tokenizer=tokenizer, device="cpu")("ab[MASK]d")
    assert len(answers) == 5
    model = tiny_model(GMLPForSequenceClassification, id2label={0: "no", 1: "yes"})
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    for answer, text in zip(classify(["abcdef", "xy"], batch_size=2), ("abcdef", "xy"), strict=True):
        alone = classify(text)[0]
        assert answer["label"] == alone["label"]
        assert answer["score"] == pytest.approx(alone["score"], abs=1e-5)


@pytest.mark.parametrize("kind", [GMLPForCausalLM, GMLPForMaskedLM])
def test_trainer_learns_and_its_checkpoint_loads(kind, tmp_path) -> None:
    text = ["abcabcabcabc", "xyzxyzxyz"] * 8
    tokenizer = letters()
    rows = [tokenizer(line) for line in text]
    # By its name since transformers 5.23, or before.
    kept = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    recomputing: dict[str, Any] = {f"{kept}_checkpointing": True}
    recomputing[f"{kept}_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=0.03, report_to=[],
        logging_steps=5, save_strategy="no", use_cpu=True, disable_tqdm=True, **recomputing,
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind(tiny_model(kind).config)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=kind is GMLPForMaskedLM, mlm_probability=0.3)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.evaluate()["eval_loss"] < 0.6 * losses[0]
    trainer.save_model()
    loaded = kind.from_pretrained(tmp_path).eval()
    ids = tokens(1, 5)
    assert_close(loaded(ids).logits, model.eval()(ids).logits.double())


@pytest.mark.parametrize(
    ("kind", "problem", "labels"),
    [
        (GMLPForSequenceClassification, "single_label_classification", lambda i: i % 3),
        (GMLPForSequenceClassification, "multi_label_classification", lambda i: [1.0, 0.0, float(i % 2)]),
        (GMLPForSequenceClassification, "regression", lambda i: [float(i), 1.0, -0.5]),
        (GMLPForTokenClassification, None, lambda i: [0, 2, 1, *([1] if i < 4 else [-100])]),
    ],
    ids=["classes", "several-labels", "regression", "tokens"],
)
def test_a_step_is_the_same_whether_gradients_are_accumulated(kind, problem, labels, tmp_path) -> None:
    rows = [{"input_ids": tokens(4), "labels": torch.tensor(labels(i))} for i in range(7)]
    found = []
    for batch, steps in ((7, 1), (2, 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1,
            learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = tiny_model(kind, num_labels=3, problem_type=problem)
        before = model.score.weight.detach().clone()
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        assert not torch.allclose(model.score.weight, before)
        found.append((trainer.state.log_history[0]["loss"], torch.cat([p.flatten() for p in model.parameters()])))
    (loss, whole), (accumulated_loss, accumulated) = found
    assert loss == pytest.approx(accumulated_loss, rel=1e-4)
    torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-5)


# PEFT asks transformers for this under its former name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_the_projections(tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = tokens(4, CONTEXT)
    base = tiny_model(GMLPForCausalLM, tiny_attention_size=4)
    before = base(ids).logits
    settings = LoraConfig(r=2, target_modules=["proj_in", "proj_out"], task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    assert_close(model(ids).logits, before.double())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 2 * 2
    assert all("lora_" in name and ("proj_in" in name or "proj_out" in name) for name in trained)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    model.eval()
    assert model(ids, labels=ids).loss < base.loss_function(before, ids, VOCABULARY)
    expected = model.generate(input_ids=ids[:, :4], max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(GMLPForCausalLM, tiny_attention_size=4), tmp_path)
    assert torch.equal(again.generate(input_ids=ids[:, :4], max_new_tokens=5, do_sample=False), expected)
    merged = again.merge_and_unload()
    assert_close(merged(ids).logits, model(ids).logits.double())


def spread(model: PreTrainedModel) -> None:
    """Lay a model out over two accelerators, as a `device_map` does; under fake tensors, so that it takes none."""
    parts = dict.fromkeys([model, model.model.norm, model.model.layers[1]], "cuda:1")
    parts |= dict.fromkeys([model.model.embed_tokens, model.model.layers[0]], "cuda:0")
    for part, device in parts.items():
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
    for layer in model.model.layers:
        layer.register_forward_pre_hook(partial(_moved, skipped=model._skip_keys_device_placement), with_kwargs=True)


def _moved(layer: nn.Module, args: tuple, kwargs: dict, skipped: list[str]) -> tuple[tuple, dict]:
    to = partial(send_to_device, device=layer.norm.weight.device)
    return to(args), {name: value if name in skipped else to(value) for name, value in kwargs.items()}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{}, {"tiny_attention_size": 4, "token_shift": 1}], ids=["gmlp", "amlp"])
@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        (GMLPForCausalLM, True),
        (GMLPForMaskedLM, False),
        (GMLPForSequenceClassification, True),
        (GMLPForSequenceClassification, False),
    ],
    ids=["causal", "masked", "causal-classes", "classes"],
)
def test_models_lie_on_two_devices(kind, causal, options, monkeypatch) -> None:
    model = kind(tiny_config(**options, num_hidden_layers=2, is_decoder=causal)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        spread(model)
        ids = torch.zeros(2, 5, dtype=torch.long, device="cuda:0")
        for mask in (None, torch.ones_like(ids), torch.ones(2, 5, 5, dtype=torch.bool, device="cuda:0")):
            logits = model(ids, attention_mask=mask).logits
            assert str(logits.device) == "cuda:1"
        if kind is GMLPForCausalLM:
            assert model(ids, logits_to_keep=ids[0, :2]).logits.shape[1] == 2
            cache = GMLPCache(model.config)
            for n in (4, 1):
                seen = torch.ones(2, cache.longest + n, dtype=torch.long, device="cuda:0")
                assert str(model(ids[:, :n], attention_mask=seen, cache=cache).logits.device) == "cuda:1"
            cache.reorder_cache(ids[:, 0])
            monkeypatch.setattr(cache, "_shortest", lambda: cache.longest)  # which fake tensors know no number of
            cache.crop(-1)
            assert [str(layer.buffers["gate"].device) for layer in cache.kept] == ["cuda:0", "cuda:1"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["attention", "toeplitz"])
def test_compiled_models_compute_the_same(name) -> None:
    model = tiny_model(GMLPForCausalLM, **{**OPTIONS[name], "num_hidden_layers": 1})
    ids, mask = tokens(2, CONTEXT), torch.tensor([[0, 0] + [1] * 10, [1] * 12])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(ids).logits, model(ids).logits.double())
    assert_close(
        compiled(ids, attention_mask=mask).logits[mask.bool()],
        model(ids, attention_mask=mask).logits[mask.bool()].double(),
    )
    compiled(ids, labels=ids).loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert_close(grad, parameter.grad.double())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [GMLPForCausalLM, GMLPForMaskedLM])
@pytest.mark.parametrize("name", ["heads", "toeplitz-heads-attention", "token-shift", "sinusoidal"])
def test_exported_models_take_any_batch_and_length(name, kind) -> None:
    model = tiny_model(kind, **{**OPTIONS[name], "num_hidden_layers": 1})
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=CONTEXT)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    inputs = {"input_ids": tokens(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for size in ((2, CONTEXT), (5, 4)):
        ids, mask = tokens(*size), torch.ones(size, dtype=torch.long)
        mask[0, :2] = 0
        expected = model(ids, attention_mask=mask).logits
        assert_close(exported(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()].double())


@each_option
def test_bfloat16_weights_and_autocast_stay_close(options) -> None:
    model = tiny_model(GMLPForCausalLM, **options)
    ids = tokens(2, CONTEXT)
    exact = model.double()(ids).logits.log_softmax(-1)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, labels=ids)
    mixed.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    half = model.bfloat16()(ids).logits
    assert half.dtype == torch.bfloat16
    for logits in (mixed.logits, half):
        divergence = F.kl_div(logits.double().log_softmax(-1), exact, reduction="batchmean", log_target=True) / CONTEXT
        assert divergence < 0.05
    cached = model.generate(ids[:, :4], max_new_tokens=8, do_sample=False)
    assert cached.shape == (2, CONTEXT)


def test_the_spatial_product_accumulates_in_float32() -> None:
    # In bfloat16 a running sum of ones stops at 256.
    n = 1000
    model = tiny_model(GMLPForCausalLM, max_position_embeddings=n).bfloat16()
    sgu = model.model.layers[0].sgu
    torch.nn.init.ones_(sgu.weight)
    torch.nn.init.zeros_(sgu.bias)
    torch.nn.init.zeros_(sgu.norm.weight)
    torch.nn.init.ones_(sgu.norm.bias)
    out = sgu(torch.ones(1, n, 24, dtype=torch.bfloat16))
    assert_close(out[0, :, 0], torch.arange(1, n + 1).double())


def test_auto_classes_take_a_dtype_and_an_attention_implementation(tmp_path) -> None:
    tiny_model(GMLPForCausalLM).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert model.dtype == torch.bfloat16
    letters().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 30


def test_label_smoothing_is_of_the_next_token(tmp_path) -> None:
    model, ids = tiny_model(GMLPForCausalLM).float(), tokens(3, 8)
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    loss = Trainer(model=model, args=arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_texts_class_is_of_what_the_mask_lets_it_read() -> None:
    model, ids = tiny_model(GMLPForSequenceClassification), tokens(3, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    masked = model(ids, visibility_mask=mask).logits
    assert not torch.allclose(masked, model(ids).logits)
    assert_close(model(ids, attention_mask=mask.expand(3, 1, 6, 6)).logits, masked)
