"""The floor holds every matrix product, and nothing else."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import allmlp  # noqa: F401
from allmlp.benchmark import record_products, replay

NANO = ("gmlp_nano_patch4_32", "mixer_nano_patch4_32", "resmlp_nano_patch4_32", "asmlp_nano_patch2_32")


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NANO)
def test_multiply_adds_are_those_torch_counts(name: str, training: bool) -> None:
    model = timm.create_model(name)
    image = torch.randn(2, 3, 32, 32)

    def step() -> None:
        with torch.set_grad_enabled(training):
            out = model(image)
        if training:
            out.sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    products = record_products(step)
    assert sum(product.macs for product in products) == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_fused_attention_is_its_products(training: bool) -> None:
    q, k, v = (torch.randn(2, 3, tokens, 8, requires_grad=training) for tokens in (5, 7, 7))

    def step() -> None:
        out = F.scaled_dot_product_attention(q, k, v)
        if training:
            out.sum().backward()

    with torch.set_grad_enabled(training):
        products = record_products(step)
    assert [product.macs for product in products] == [2 * 3 * 5 * 7 * 8] * (7 if training else 2)
    with FlopCounterMode(display=False) as counter:
        replay(products)()
    assert counter.get_total_flops() / 2 == sum(product.macs for product in products)


def test_convolution_is_the_product_of_its_unfolded_input() -> None:
    layer = nn.Conv2d(3, 8, 4, stride=4)
    with torch.no_grad():
        (product,) = record_products(lambda: layer(torch.randn(2, 3, 8, 12)))
    assert product.left.shape == (2 * 2 * 3, 3 * 16)
    assert product.right.shape == (48, 8)


def test_factors_lie_in_memory_as_they_did() -> None:
    x, weight = torch.randn(4, 6), torch.randn(5, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        (product,) = record_products(lambda: x.bfloat16() @ weight.t())
    right = product.right.make()
    assert (right.shape, right.stride(), right.dtype) == ((6, 5), (1, 6), torch.bfloat16)


def test_replay_computes_the_products() -> None:
    with torch.no_grad():
        products = record_products(lambda: torch.bmm(torch.randn(2, 3, 4), torch.randn(2, 4, 5)) @ torch.randn(5, 6))
    with FlopCounterMode(display=False) as counter:
        replay(products)()
    assert counter.get_total_flops() / 2 == sum(product.macs for product in products) == 2 * 3 * 4 * 5 + 6 * 5 * 6
