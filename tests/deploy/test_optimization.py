"""The optimised form: the original's output, the fastest of what works, one message for what cannot be."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import allmlp
from allmlp import GMLPConfig, GMLPForCausalLM
from allmlp.deploy import engines
from allmlp.errors import UserError
from allmlp.ops import products
from allmlp.timing import Timing

NANO = "gmlp_nano_patch4_32"


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor has, the library takes it for one that multiplies bfloat16."""
    monkeypatch.setattr(products, "WITHOUT_INSTRUCTIONS", [])


def _model(**arguments) -> nn.Module:
    return timm.create_model(NANO, num_blocks=2, embed_dim=16, **arguments)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ["eager", "openvino", "onnxruntime"])
@pytest.mark.usefixtures("unchecked")
def test_output_is_the_original_s(engine: str, dtype: torch.dtype | None, image: torch.Tensor) -> None:
    if engine != "eager":
        pytest.importorskip(engine)
    model = _model().train()
    before = copy.deepcopy(model.state_dict())
    if engine == "onnxruntime" and dtype is not None:
        with pytest.raises(UserError, match="computes in float32 on a CPU, not in bfloat16"):
            allmlp.optimize(model, image, dtype=dtype, engine=engine)
        return
    form = allmlp.optimize(model, (image,), dtype=dtype, engine=engine)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = torch.randn_like(image)
    with torch.no_grad():
        expected = model.eval()(other)
    got = form(other)
    assert got.dtype == torch.float32
    tolerance = 1e-4 if dtype is None else 5e-2
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    assert form.engine == engine


@pytest.mark.usefixtures("unchecked")
def test_bfloat16_is_left_alone_where_the_processor_has_none(
    image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WITHOUT_INSTRUCTIONS", [torch.bfloat16])
    model = _model()
    form = allmlp.optimize(model, image, dtype=torch.bfloat16, engine="eager")
    assert form.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(form(image), model.eval()(image))


@pytest.mark.usefixtures("unchecked")
def test_int8_is_close(image: torch.Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf")
    model = _model()
    form = allmlp.optimize(model, image, dtype=torch.int8)
    assert form.engine == "openvino"
    assert capfd.readouterr().out == ""
    with torch.no_grad():
        expected = model.eval()(image)
    difference = ((form(image) - expected).abs().max() / expected.abs().max()).item()
    assert 1e-5 < difference < 0.25
    reasons = {candidate.engine: candidate.reason for candidate in form.candidates}
    assert reasons["eager"] == "EngineMissingError: engine 'eager' computes in float32 or bfloat16, not in int8"


def test_int8_needs_nncf(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match="in int8 needs: pip install nncf"):
        allmlp.optimize(_model(), image, dtype=torch.int8, engine="openvino")


@pytest.mark.usefixtures("unchecked")
def test_compiled(image: torch.Tensor) -> None:
    model = _model()
    form = allmlp.optimize(model, image, engine="inductor")
    other = torch.randn_like(image)
    with torch.no_grad():
        torch.testing.assert_close(form(other), model.eval()(other), rtol=1e-4, atol=1e-5)


def test_the_fastest_of_those_that_agree_is_taken(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model, examples, dtype):
        return lambda x: [torch.zeros(2, 10)]

    def broken(model, examples, dtype):
        raise ArithmeticError("no such operator\nand a long trace")

    def slow(model, examples, dtype):
        run = engines.eager(model, examples, dtype)
        return lambda x: [run(x) for _ in range(20)][-1]

    monkeypatch.setattr(
        "allmlp.deploy.optimization.ENGINES",
        {
            "slow": slow,
            "eager": engines.eager,
            "wrong": wrong,
            "broken": broken,
        },
    )
    form = allmlp.optimize(_model(), image)
    assert form.engine == "eager"
    reasons = {candidate.engine: candidate.reason for candidate in form.candidates}
    assert reasons["slow"] is reasons["eager"] is None
    assert "off, more than 1e-04" in reasons["wrong"]
    assert reasons["broken"] == "ArithmeticError: no such operator"
    with pytest.raises(RuntimeError, match="wrong: its output is"):
        allmlp.optimize(_model(), image, engine="wrong")


def test_those_close_to_the_fastest_are_timed_again(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([{"one": 1.0, "two": 1.1, "three": 1.3}, {"one": 1.0, "two": 0.9}])
    timed: list[list[str]] = []

    def time_in_turn(contenders: dict, *, rounds: int) -> dict[str, Timing]:
        timed.append(list(contenders))
        return {name: Timing(milliseconds=ratio, ratio=ratio) for name, ratio in next(measured).items()}

    same = engines.ENGINES["eager"]
    monkeypatch.setattr("allmlp.deploy.optimization.ENGINES", {"one": same, "two": same, "three": same})
    monkeypatch.setattr("allmlp.deploy.optimization.time_in_turn", time_in_turn)
    form = allmlp.optimize(_model(), image)
    assert timed == [["one", "two", "three"], ["one", "two"]]
    assert form.engine == "two"
    assert [candidate.milliseconds for candidate in form.candidates] == [1.0, 0.9, 1.3]


def test_missing_compiler_is_named(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none_found() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler and found none: install g\\+\\+ or clang"):
        allmlp.optimize(_model(), image, engine="inductor")


@pytest.mark.parametrize("engine", ["eager", "openvino", "onnxruntime"])
@pytest.mark.usefixtures("unchecked")
def test_text_and_its_mask_by_name(engine: str) -> None:
    if engine != "eager":
        pytest.importorskip(engine)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = GMLPForCausalLM(GMLPConfig(**sizes, max_position_embeddings=12, tiny_attention_size=4))

    def padded(zeros: list[int]) -> dict[str, torch.Tensor]:
        mask = (torch.arange(12) >= torch.tensor(zeros)[:, None]).long()
        return {"input_ids": torch.randint(31, (2, 12)), "attention_mask": mask}

    form = allmlp.optimize(model, padded([3, 0]), engine=engine)
    assert model.config.use_cache
    other = padded([0, 5])
    with torch.no_grad():
        expected = model.eval()(**other).logits
    output = form(**other)
    assert (type(output), list(output)) == (CausalLMOutputWithPast, ["logits"])
    real = other["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected[real], rtol=1e-4, atol=1e-5)
    named = "this form takes input_ids, attention_mask by name, got "
    with pytest.raises(TypeError, match=named + "input_ids"):
        form(input_ids=other["input_ids"])
    with pytest.raises(TypeError, match=named + "an input without a name, an input without a name"):
        form(*other.values())


@pytest.mark.usefixtures("unchecked")
def test_maps_of_several_sizes_come_as_the_model_gives_them() -> None:
    model = timm.create_model("asmlp_nano_patch2_32", features_only=True).eval()
    image = torch.randn(2, 3, 32, 32)
    form = allmlp.optimize(model, image, engine="openvino")
    got, expected = form(image), model(image)
    assert isinstance(got, list)
    assert [y.shape for y in got] == [y.shape for y in expected]
    for y, reference in zip(got, expected, strict=True):
        assert (y - reference).abs().max() < 1e-4 * reference.abs().max()


@pytest.mark.usefixtures("unchecked")
def test_other_inputs_are_refused(image: torch.Tensor) -> None:
    form = allmlp.optimize(_model(), image, engine="eager")
    with pytest.raises(ValueError, match="made for inputs like float32 2 × 3 × 32 × 32 on cpu, got float32 1 × 3"):
        form(image[:1])
    for other, kind in ((image.numpy(), "ndarray"), ("image", "str"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"this form takes tensors, got {kind}"):
            form(other)
    with pytest.raises(TypeError, match="takes 1 inputs without names, got 2"):
        form(image, image)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: {"y": x, "z": "text"}, "output must consist of tensors, it holds str"),
        (lambda x: x / 0, "output for the example is not finite"),
    ],
)
def test_outputs_that_no_form_can_be_checked_against(output, message: str, image: torch.Tensor) -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor):
            return output(x)

    with pytest.raises(UserError, match=message):
        allmlp.optimize(Network(), image)


def test_a_network_may_write_over_its_input(image: torch.Tensor) -> None:
    model = nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(3, 4, 3)).eval()
    given = image.clone()
    form = allmlp.optimize(model, given, engine="eager")
    torch.testing.assert_close(given, image, rtol=0, atol=0)
    torch.testing.assert_close(form(image.clone()), model(image.clone()), rtol=0, atol=0)


def test_an_output_may_hold_tensors_without_numbers(image: torch.Tensor) -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 2 * x, x[:0]

    got, nothing = allmlp.optimize(Network(), image, engine="eager")(image)
    torch.testing.assert_close(got, 2 * image, rtol=0, atol=0)
    assert nothing.shape == (0, 3, 32, 32)


def test_an_output_of_zeros_is_equal_to_zeros(image: torch.Tensor) -> None:
    model = _model()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert not allmlp.optimize(model, image, engine="eager")(image).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "openvin"}, "engine must be one of .*, got 'openvin'. Did you mean 'openvino'"),
        ({"dtype": torch.float16}, "dtype must be one of torch.float32, torch.bfloat16, torch.int8, got torch.float16"),
        ({"example_inputs": "image"}, "example_inputs must be tensors, got str"),
        ({"example_inputs": [torch.zeros(1), 3]}, "example_inputs must be tensors, got Tensor, int"),
        (
            {"example_inputs": torch.zeros(1, 3, 32, 32, dtype=torch.float64)},
            "the example must be float32, got float64",
        ),
        ({"example_inputs": torch.zeros(0, 3, 32, 32)}, "example_inputs is empty"),
        ({"example_inputs": {}}, "example_inputs is empty"),
        ({"example_inputs": torch.zeros(1, device="meta")}, "the example lies on 'meta'"),
        ({"example_inputs": [torch.zeros(1), torch.zeros(1, device="meta")]}, "on one device, it lies on cpu, meta"),
    ],
)
def test_misuse(change: dict, message: str, image: torch.Tensor) -> None:
    with pytest.raises(UserError, match=message):
        allmlp.optimize(_model(), **{"example_inputs": image, **change})


def test_each_layer_keeps_its_mode(image: torch.Tensor) -> None:
    model = _model().train()
    model.norm.eval()
    allmlp.optimize(model, image, engine="eager")
    assert [name for name, module in model.named_modules() if not module.training] == ["norm"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What torch's compiler is given, and runs as it is: generating code takes long."""
    compiled, given = torch.compile, []

    def quickly(model: nn.Module, *, fullgraph: bool, dynamic: bool, options: dict[str, Any]) -> object:
        def backend(graph: torch.fx.GraphModule, inputs: object, **_: object) -> object:
            given.append(graph)
            return graph.forward

        return compiled(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic, options=options)

    monkeypatch.setattr(torch, "compile", quickly)
    torch.compiler.reset()
    return given


@pytest.mark.usefixtures("graphs")
def test_any_number_of_forms_of_one_class() -> None:
    """One class's `forward` is compiled for each of them, and stays so however it is called."""
    model = nn.Sequential(nn.Linear(4, 4))
    forms = [allmlp.optimize(model, torch.ones(n, 4), engine="inductor") for n in range(1, 12)]
    with torch.inference_mode(), torch.autocast("cpu"):
        for n, form in enumerate(forms, 1):
            assert form(torch.ones(n, 4)).dtype == torch.float32
    for n, form in enumerate(forms, 1):
        assert not form(torch.ones(n, 4, requires_grad=True)).requires_grad


@pytest.mark.usefixtures("graphs")
def test_a_network_that_would_be_compiled_at_every_call_is_left_to_other_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for engine in ("openvino", "onnxruntime"):
        monkeypatch.delitem(engines.ENGINES, engine)
    model, seen = nn.Linear(4, 4), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.raises(UserError, match="compile this network anew at every call"):
        allmlp.optimize(model, torch.ones(1, 4), engine="inductor")
    assert allmlp.optimize(model, torch.ones(1, 4)).engine == "eager"


def test_a_form_is_compiled_once_whatever_the_process_changes(graphs: list[torch.fx.GraphModule]) -> None:
    models = [nn.Sequential(nn.Linear(4, outputs)).eval() for outputs in range(1, 10)]
    x, threads = torch.ones(1, 4), torch.get_num_threads()
    forms = [allmlp.optimize(model, x, engine="inductor") for model in models]
    try:
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            for form, model in zip(forms, models, strict=True):
                assert torch.equal(form(x), model(x))
        assert len(graphs) == len(forms)
        torch.set_default_dtype(torch.float32)
        allmlp.optimize(models[0], x, engine="inductor")
        assert len(graphs) == len(forms) + 1, "other threads are another program"
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.usefixtures("unchecked")
def test_inputs_may_know_of_gradients(engine: str, image: torch.Tensor) -> None:
    pytest.importorskip(engine)
    form = allmlp.optimize(_model(), image.requires_grad_(), engine=engine)
    assert not form(image).requires_grad


def test_a_form_says_why_it_cannot_be_saved(image: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="belongs to this process and machine"):
        torch.save(allmlp.optimize(_model(), image, engine="eager"), tmp_path / "form.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.bfloat16(), "the model must be float32, stem.proj.weight is bfloat16; give model.float"),
        (lambda model: model.to("meta"), "the model's stem.proj.weight lies on 'meta', the example on 'cpu'"),
    ],
)
def test_models_that_do_not_go_with_the_example(change, message: str, image: torch.Tensor) -> None:
    with pytest.raises(UserError, match=message):
        allmlp.optimize(change(_model()), image)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_form_that_gives_no_numbers_is_not_taken(
    outputs: int, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(x + number for number in range(outputs))

    def broken(model: nn.Module, examples: object, dtype: torch.dtype) -> object:
        run = engines.eager(model, examples, dtype)
        return lambda x: [*run(x)[:-1], torch.full_like(run(x)[-1], torch.nan)]

    monkeypatch.setattr("allmlp.deploy.optimization.ENGINES", {"broken": broken, "eager": engines.eager})
    form = allmlp.optimize(Model(), image)
    assert form.engine == "eager"
    assert form.candidates[0].reason


def test_a_form_keeps_its_precision_under_autocast(image: torch.Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(image[0].numel(), 3))
    form = allmlp.optimize(model, image, engine="eager")
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(form(image), expected, rtol=1e-6, atol=1e-6)
