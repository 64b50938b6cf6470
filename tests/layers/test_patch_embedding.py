from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from allmlp.layers import PatchDownsampling, PatchEmbedding, PatchMerging, SampleNorm
from tests.layers.parity import assert_matches, normalise


def padded(x, multiple_h, multiple_w):
    """A channels-last map with zeros below and on the right."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // multiple_h) * multiple_h, -(-width // multiple_w) * multiple_w
    out = x.new_zeros(batch, rows, columns, channels)
    out[:, :height, :width] = x
    return out


def patches(p, x, patch):
    """Every patch flattened and projected, one at a time."""
    x = padded(x.permute(0, 2, 3, 1), *patch)
    weight = p["proj.weight"].permute(2, 3, 1, 0).flatten(0, 2)
    rows = []
    for i in range(0, x.shape[1], patch[0]):
        row = [x[:, i : i + patch[0], j : j + patch[1]].flatten(1) @ weight for j in range(0, x.shape[2], patch[1])]
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1) + p["proj.bias"]


@pytest.mark.parametrize("fixed_size", [True, False])
@pytest.mark.parametrize(("size", "patch"), [((8, 8), (4, 4)), ((6, 8), (3, 2)), ((4, 4), (4, 4))])
def test_embedding_matches_reference(size, patch, fixed_size) -> None:
    layer = PatchEmbedding(size, patch, 3, 5, fixed_size=fixed_size)
    assert_matches(layer, lambda p, x: patches(p, x, patch), torch.randn(2, 3, *size))


def test_embedding_pads_to_whole_patches() -> None:
    layer = PatchEmbedding((8, 8), (4, 3), 2, 5, fixed_size=False)
    for size in ((7, 7), (2, 10), (8, 3)):
        assert_matches(layer, lambda p, x: patches(p, x, (4, 3)), torch.randn(2, 2, *size))


def test_embedding_normalises_the_map() -> None:
    def reference(p, x):
        return normalise(patches(p, x, (2, 2)), (1, 2, 3), 1e-5) * p["norm.weight"] + p["norm.bias"]

    layer = PatchEmbedding((6, 4), (2, 2), 3, 5, SampleNorm, fixed_size=False)
    assert_matches(layer, reference, torch.randn(2, 3, 6, 4))


def test_embedding_takes_every_memory_format() -> None:
    layer = PatchEmbedding((8, 8), (4, 4), 3, 5, fixed_size=True)
    x = torch.randn(2, 3, 8, 8)
    out = layer(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous()
    torch.testing.assert_close(out, layer(x))


def test_embedding_names_the_sizes_that_fit() -> None:
    with pytest.raises(ValueError, match=r"an image of 225×30 pixels .* patches of 16×16.* 224×16 and 240×32"):
        PatchEmbedding((225, 30), (16, 16), 3, 8, fixed_size=True)
    with pytest.raises(ValueError, match=r"nearest sizes are 16×16$"):
        PatchEmbedding((3, 5), (16, 16), 3, 8, fixed_size=True)


@pytest.mark.parametrize("size", [0, -4, 4.0, "48", (4, 4, 3), (0, 8), True, np.array([4, 4])], ids=repr)
@pytest.mark.parametrize("argument", ["img_size", "patch_size", "kernel_size"])
@pytest.mark.parametrize("fixed_size", [True, False])
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_size_is_refused_and_changes_nothing(argument, size, fixed_size) -> None:
    name = argument.replace("kernel_size", "patch_kernel")
    allowed = rf"{name} must be a number of pixels from 1 on, or \(height, width\), got "
    with pytest.raises(ValueError, match=allowed):
        PatchEmbedding(
            **{"img_size": 8, "patch_size": 4, argument: size}, in_chans=3, channels=5, fixed_size=fixed_size
        )
    layer = PatchEmbedding(8, 4, 3, 5, fixed_size=fixed_size)
    with pytest.raises(ValueError, match=allowed):
        layer.set_input_size(**{argument: size})
    assert layer(torch.randn(1, 3, 8, 8)).shape == (1, 2, 2, 5)


def test_sizes_may_be_numbers_of_numpy() -> None:
    layer = PatchEmbedding(8, 4, 3, 5, fixed_size=True)
    layer.set_input_size((np.int64(8), np.int32(16)))
    assert layer.img_size == (8, 16)
    assert type(layer.img_size[0]) is int


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fixed_size", [False, True])
def test_an_image_without_a_batch_is_refused(fixed_size) -> None:
    layer = PatchEmbedding(8, 4, 3, 5, fixed_size=fixed_size)
    with pytest.raises(ValueError, match=r"images are \[batch, channels, height, width\], got \[3, 8, 8\]"):
        layer(torch.randn(3, 8, 8))


def test_fixed_embedding_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"the image is 8×12 pixels, this model was built for 8×8; .*img_size"):
        PatchEmbedding((8, 8), (4, 4), 3, 8, fixed_size=True)(torch.randn(1, 3, 8, 12))


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1), (2, 7)], ids=str)
def test_merging_matches_reference(size) -> None:
    def reference(p, x):
        x = padded(x, 2, 2)
        # The checkpoints' order: down the first column, then down the second.
        neighbours = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        normed = normalise(neighbours, (3,), 1e-5) * p["norm.weight"] + p["norm.bias"]
        return torch.einsum("bhwc,oc->bhwo", normed, p["reduction.weight"])

    layer = PatchMerging(3, 5, partial(nn.LayerNorm, eps=1e-5))
    assert_matches(layer, reference, torch.randn(2, *size, 3))


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1), (2, 7)], ids=str)
def test_downsampling_matches_reference(size) -> None:
    def reference(p, x):
        return patches(p, x.permute(0, 3, 1, 2), (2, 2))

    assert_matches(PatchDownsampling(3, 5), reference, torch.randn(2, *size, 3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (PatchEmbedding(None, (4, 4), 3, 5, fixed_size=False), lambda height, width: (2, 3, height, width)),
        (PatchMerging(3, 5, nn.LayerNorm), lambda height, width: (2, height, width, 3)),
        (PatchDownsampling(3, 5), lambda height, width: (2, height, width, 3)),
    ],
    ids=["embedding", "merging", "downsampling"],
)
def test_one_graph_pads_every_size(layer, shape) -> None:
    """And a graph for one size that needs no padding has none."""
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for size in ((32, 28), (33, 28), (32, 29), (37, 50)):
        x = torch.randn(shape(*size))
        torch.testing.assert_close(compiled(x), layer(x))
    torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)(torch.randn(shape(32, 28)))
    assert [any("pad" in target for target in graph) for graph in graphs] == [True, False]


@pytest.mark.parametrize("kernel_size", [(8, 4), (4, 8)])
def test_a_kernel_larger_along_one_side_gives_as_many_patches(kernel_size: tuple[int, int]) -> None:
    layer = PatchEmbedding((16, 24), 4, 3, 8, kernel_size=kernel_size, fixed_size=True)
    assert layer(torch.randn(1, 3, 16, 24)).shape == (1, 4, 6, 8)


def test_a_frozen_embedding_stays_frozen_at_another_patch_size() -> None:
    layer = PatchEmbedding(16, 4, 3, 8, fixed_size=True).requires_grad_(False)
    layer.set_input_size(32, patch_size=8)
    assert not layer.proj.weight.requires_grad
