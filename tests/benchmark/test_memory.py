"""Bytes are counted, and training keeps at most three quarters of what the peers keep."""

import gc

import pytest
import torch
from torch import nn

import allmlp  # noqa: F401
from allmlp.benchmark.memory import activation_bytes, peak_memory
from allmlp.benchmark.networks import is_language
from allmlp.benchmark.peers import PEERS, build_pair

# Those of images; test_measurement.py has a small one of texts.
INSTALLED = [peer for peer in PEERS if not (peer.checkout or is_language(peer.model))]


def test_each_storage_counts_once_and_parameters_do_not() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(16, 8, requires_grad=True)
    assert activation_bytes(layer, lambda: layer(x) + layer(x).relu()) == (16 * 8 + 16 * 8) * 4


def test_what_is_counted_is_freed() -> None:
    layer, x = nn.LayerNorm(977), torch.randn(3, 977, requires_grad=True)
    activation_bytes(layer, lambda: layer(x).relu())
    gc.collect()
    shapes = [o.shape for o in gc.get_objects() if type(o) is torch.Tensor and o is not x]
    assert (3, 977) not in shapes


def test_highest_point_of_a_step() -> None:
    def step() -> None:
        first = torch.zeros(1 << 20, dtype=torch.uint8)
        second = torch.zeros(1 << 20, dtype=torch.uint8)
        del first, second
        torch.zeros(1 << 20, dtype=torch.uint8)

    assert peak_memory(step, torch.device("cpu")) == 2 << 20


@pytest.mark.parametrize("peer", INSTALLED, ids=lambda peer: f"{peer.model}-{peer.name}")
def test_training_keeps_less_than_the_peers(peer) -> None:
    ours, theirs = (model.train() for model in build_pair(peer, {}))
    image = torch.randn(1, 3, 224, 224)
    kept = [activation_bytes(model, lambda model=model: model(image)) for model in (ours, theirs)]
    assert kept[0] <= 0.75 * kept[1]
