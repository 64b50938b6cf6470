import pytest
import torch

from allmlp.checkpoints.conversion import LAYOUTS, convert_state_dict
from allmlp.errors import UserError
from allmlp.vision import VisionPermutator, vip
from tests.checkpoints.parity import GOLDEN


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return torch.load(GOLDEN / "vip_small7" / "checkpoint.pth")


def upstream_names(model: VisionPermutator, depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A model's weights as upstream would name them: stages and downsamplings in one list."""
    ends = [sum(depths[: stage + 1]) for stage in range(len(depths))]
    places, entry, block = {}, 0, 0
    for index, module in enumerate(model.blocks):
        if hasattr(module, "attn"):
            places[index] = f"{entry}.{block - ([0, *ends])[sum(end <= block for end in ends)]}"
            block += 1
            entry += block in ends
        else:
            places[index], entry = str(entry), entry + 1
    names = {}
    for name, tensor in model.state_dict().items():
        head, _, rest = name.removeprefix("blocks.").partition(".")
        names[f"network.{places[int(head)]}.{rest}" if name.startswith("blocks.") else name] = tensor
    return {name.replace("stem.", "patch_embed."): tensor for name, tensor in names.items()}


@pytest.mark.parametrize("name", [name for name in vip.VARIANTS if name.endswith("224")])
def test_a_published_size_goes_by_its_name(name: str) -> None:
    with torch.device("meta"):
        model = VisionPermutator(**vip.VARIANTS[name])
    weights = upstream_names(model, vip.VARIANTS[name]["depths"])
    layout = next(layout for layout in LAYOUTS if layout.recognises(weights))
    architecture, renamed = layout.convert(weights, {})
    assert (architecture.name, architecture.model_args) == (name, {})
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in renamed.items()} == wanted


def test_an_image_size_that_does_not_fit_has_to_be_given(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"do not fit a map of 32×32.*give it, img_size="):
        convert_state_dict(weights)
    with pytest.raises(UserError, match=r"cannot be cut into this model's patches of 7×7"):
        convert_state_dict(weights, facts={"img_size": 57})
    assert convert_state_dict(weights, facts={"img_size": 56}).model.stem.grid_size == (8, 8)


def test_the_default_image_size_is_said_to_be_assumed() -> None:
    model = VisionPermutator(depths=(1,), embed_dims=(32,), segments=(32,), downsample_after=(), num_classes=2)
    found = convert_state_dict(upstream_names(model, (1,)))
    assert found.notes == (
        "img_size is not stored; 224×224 pixels is assumed.",
        "skip_lam is not stored; 1 is assumed.",
    )


def test_the_plain_sum_of_branches_is_seen() -> None:
    model = VisionPermutator(
        img_size=14, depths=(1, 1), embed_dims=(4, 6), segments=(2, 1), num_classes=2, mixing="sum"
    ).eval()
    found = convert_state_dict(upstream_names(model, (1, 1)), facts={"img_size": 14})
    x = torch.randn(1, 3, 14, 14)
    assert torch.equal(found.model(x), model(x))


def test_an_odd_map_is_not_halved_as_upstream_does(weights: dict[str, torch.Tensor]) -> None:
    model = VisionPermutator(img_size=35, depths=(1, 1), embed_dims=(20, 30), segments=(5, 3), downsample_after=(1,))
    with pytest.raises(UserError, match=r"'network\.1\.proj' halves a map of 5×5: .*cannot be converted"):
        convert_state_dict(upstream_names(model, (1, 1)), facts={"img_size": 35})


def test_what_the_branches_are_divided_by_may_be_given(weights: dict[str, torch.Tensor]) -> None:
    model = convert_state_dict(weights, facts={"img_size": 56, "skip_lam": 2}).model
    plain = convert_state_dict(weights, facts={"img_size": 56}).model
    block, peer = model.blocks[0], plain.blocks[0]
    x = torch.randn(1, 8, 8, peer.norm1.weight.shape[0])
    u = x + peer.attn(peer.norm1(x)) / 2
    torch.testing.assert_close(block(x), u + peer.mlp(peer.norm2(u)) / 2)
    for value in (0, True, "2", float("nan")):
        with pytest.raises(UserError, match=r"skip_lam is .*; it should be a number above 0"):
            convert_state_dict(weights, facts={"img_size": 56, "skip_lam": value})


def test_a_change_of_width_without_halving_is_refused_by_name(weights: dict[str, torch.Tensor]) -> None:
    weights["network.1.proj.weight"] = weights["network.1.proj.weight"][:, :, :1, :1]
    with pytest.raises(UserError, match=r"'network\.1\.proj' changes the width without halving"):
        convert_state_dict(weights, facts={"img_size": 56})


def test_a_bias_that_the_model_lacks_is_named(weights: dict[str, torch.Tensor]) -> None:
    weights["network.0.0.attn.mlp_h.bias"] = torch.zeros(16)
    with pytest.raises(UserError, match=r"1 unexpected: blocks\.0\.attn\.mlp_h\.bias"):
        convert_state_dict(weights, facts={"img_size": 56})
