from collections.abc import Iterator

import pytest
import torch
from torch.autograd import forward_ad

from allmlp.ops import backends
from allmlp.ops.backends import set_fused, takes_fused


@pytest.fixture(autouse=True)
def _as_at_the_start() -> Iterator[None]:
    yield
    set_fused(None)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "_HAS_TRITON", True)


def test_auto_takes_what_was_measured_to_be_faster(interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MEASURED_FASTER", {"shift"})
    x = torch.zeros(2)
    assert takes_fused("shift", "auto", x, None)
    assert not takes_fused("gating", "auto", x)


def test_what_auto_means_can_be_set(interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MEASURED_FASTER", {"shift"})
    x = torch.zeros(2)
    set_fused(True)
    assert takes_fused("gating", "auto", x)
    assert not takes_fused("gating", "auto", x.double())
    assert not takes_fused("gating", "auto", x, unfit="it has four axes")
    assert not takes_fused("gating", "torch", x)
    set_fused(False)
    assert not takes_fused("shift", "auto", x)
    assert takes_fused("shift", "triton", x)


@pytest.mark.parametrize(
    ("tensors", "unfit", "reason"),
    [
        ([torch.zeros(2, dtype=torch.float64)], None, "not float64"),
        ([torch.zeros(2, device="meta")], None, "lie on 'meta'"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], None, "lie on cpu, meta"),
        ([torch.zeros(2), torch.zeros(2).half()], None, "several dtypes, float16, float32, and autocast is off"),
        ([torch.fx.Proxy(torch.fx.Graph().placeholder("x"))], None, "a symbolic trace hands it placeholders"),
        ([torch.zeros(2)], "it has four axes", "it has four axes"),
    ],
    ids=["dtype", "device", "devices", "dtypes", "placeholder", "arguments"],
)
def test_a_kernel_that_cannot_run_says_why(interpreted, tensors, unfit, reason) -> None:
    with pytest.raises(ValueError, match=f"cannot run gating: .*{reason}"):
        takes_fused("gating", "triton", *tensors, unfit=unfit)


def test_function_transforms_have_no_kernel(interpreted) -> None:
    with pytest.raises(ValueError, match="know no function transforms"):
        torch.func.grad(lambda x: x.sum() * takes_fused("gating", "triton", x))(torch.zeros(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:FutureWarning")
def test_what_is_traced_for_another_runtime_is_torchs_form(interpreted) -> None:
    set_fused(True)
    taken = []
    traced = lambda x: taken.append(takes_fused("gating", "auto", x)) or x + 1  # noqa: E731
    torch.jit.trace(traced, torch.zeros(2), check_trace=False)
    assert taken == [False]


def test_without_a_gpu_or_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    with pytest.raises(ValueError, match="lie on 'cpu', the kernels run on 'cuda'"):
        takes_fused("gating", "triton", torch.zeros(2))
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        takes_fused("gating", "triton", torch.zeros(2))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="must be 'auto', 'torch' or 'triton', got 'cuda'"):
        takes_fused("gating", "cuda", torch.zeros(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_has_no_kernel(interpreted) -> None:
    x, weight = torch.randn(1, 4, 4, 8), torch.randn(16, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert not takes_fused("permute_linear", "auto", dual, weight)
        with pytest.raises(ValueError, match="no forward-mode gradients"):
            takes_fused("permute_linear", "triton", dual, weight)
