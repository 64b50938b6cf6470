"""timm's model interface, on the small model of every family."""

import copy
import pickle
from itertools import pairwise

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from allmlp.layers import Affine, SampleNorm
from tests.tolerances import assert_close
from tests.vision.nano import ANY_SIZE, NANO, ONE_SIZE, shallow_model


@pytest.fixture(params=NANO)
def name(request) -> str:
    return request.param


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def random_model(name: str, **arguments) -> nn.Module:
    """A model in eval mode with random norms, biases and layer scales, so that none hides behind a zero or one."""
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_forward_is_features_then_head(name, images) -> None:
    model = random_model(name)
    features = model.forward_features(images)
    assert features.shape == (2, *model.pretrained_cfg["pool_size"], model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert_close(pooled, features.flatten(1, 2).mean(1))
    logits = model.forward_head(features)
    assert_close(logits, pooled @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)


def test_a_batch_of_nothing(name, images) -> None:
    model = timm.create_model(name)
    with torch.no_grad():
        assert model.eval()(images[:0]).shape == (0, 10)
    assert model.train()(images[:0]).shape == (0, 10)


def test_classifier_is_replaced_and_removed(name, images) -> None:
    model = random_model(name)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(5)
    assert model.get_classifier().out_features == model.num_classes == 5
    assert not model.head.training
    assert model(images).shape == (2, 5)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.num_classes == 0
    torch.testing.assert_close(model(images), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images), model.forward_features(images))
    model.reset_classifier(4, "avg")
    assert model(images).shape == (2, 4)
    with pytest.raises(ValueError, match=r"global_pool must be one of \('avg', ''\), got 'max'"):
        model.reset_classifier(4, "max")


def test_new_head_follows_dtype(name) -> None:
    model = timm.create_model(name).bfloat16()
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.bfloat16


def test_features_only_follows_feature_info(name, images) -> None:
    model = timm.create_model(name, features_only=True).eval()
    maps = model(images)
    assert [y.shape[1] for y in maps] == model.feature_info.channels()
    assert [32 // y.shape[2] for y in maps] == model.feature_info.reduction()
    assert [32 // y.shape[3] for y in maps] == model.feature_info.reduction()


PYRAMIDS = {
    "asmlp_nano_patch2_32": ([32, 64, 128], [2, 4, 8]),
    "gmlp_nano_patch4_32": ([96] * 3, [4] * 3),
    "mixer_nano_patch4_32": ([128] * 3, [4] * 3),
    "resmlp_nano_patch4_32": ([96] * 3, [4] * 3),
    "s2mlp_nano_patch4_32": ([96] * 3, [4] * 3),
    "s2mlpv2_nano_patch2_32": ([48, 96], [2, 4]),
    "vip_nano_patch4_32": ([96] * 4, [4] * 4),
    "asmlp_tiny_patch4_224": ([96, 192, 384, 768], [4, 8, 16, 32]),
    "s2mlpv2_small_patch7_224": ([192, 384], [7, 14]),
    "vip_small_patch7_224": ([192, 384, 384, 384], [7, 14, 14, 14]),
    "vip_medium_patch7_224": ([256, 256, 512, 512], [7, 7, 14, 14]),
    "gmlp_small_patch16_224": ([256] * 3, [16] * 3),
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_default_feature_levels(name) -> None:
    with torch.device("meta"):
        info = timm.create_model(name, features_only=True).feature_info
    assert (info.channels(), info.reduction()) == PYRAMIDS[name]


@pytest.mark.parametrize("indices", [(0, 1), (-1,), 1, (0, -1), (1, 0)], ids=str)
def test_features_only_with_chosen_levels(name, images, indices) -> None:
    whole = random_model(name)
    model = timm.create_model(name, features_only=True, out_indices=indices).eval()
    model.model.load_state_dict(whole.state_dict(), strict=False)
    levels = range(len(whole.feature_info))[-indices:] if isinstance(indices, int) else indices
    every = whole.forward_intermediates(images, intermediates_only=True)
    maps = model(images)
    assert len(maps) == len(list(levels))
    for level, y in zip(levels, maps, strict=True):
        torch.testing.assert_close(y, every[level], rtol=0, atol=0)


def test_intermediates(name, images) -> None:
    model = random_model(name)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images), rtol=0, atol=0)
    assert len(maps) == len(model.feature_info)
    for y, info in zip(maps, model.feature_info, strict=True):
        assert y.shape == (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
        assert y.is_contiguous()
    assert [info["module"] for info in model.feature_info] == [f"blocks.{i}" for i in model.level_indices]


def test_intermediates_of_chosen_levels(name, images) -> None:
    model = random_model(name)
    _, maps = model.forward_intermediates(images)
    for indices, levels in (([0], [0]), (1, [-1]), ([1, -1], [1, -1])):
        kept = model.forward_intermediates(images, indices, intermediates_only=True)
        for level, y in zip(levels, kept, strict=True):
            torch.testing.assert_close(y, maps[level], rtol=0, atol=0)


def test_intermediates_channels_last(name, images) -> None:
    model = random_model(name)
    _, first = model.forward_intermediates(images)
    _, last = model.forward_intermediates(images, output_fmt="NHWC")
    for x, y in zip(first, last, strict=True):
        torch.testing.assert_close(y.permute(0, 3, 1, 2), x, rtol=0, atol=0)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_intermediates_with_final_norm(name, images) -> None:
    model = random_model(name)
    final, maps = model.forward_intermediates(images, norm=True, output_fmt="NHWC")
    torch.testing.assert_close(maps[-1], final, rtol=0, atol=0)
    _, bare = model.forward_intermediates(images, output_fmt="NHWC")
    for x, y in zip(bare, maps, strict=True):
        fits = x.shape[-1] == model.num_features
        torch.testing.assert_close(y, model.norm(x) if fits else x, rtol=0, atol=0)


def test_intermediates_stop_early(name, images) -> None:
    model = random_model(name)
    calls = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    maps = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
    assert calls == list(range(model.level_indices[0] + 1))
    torch.testing.assert_close(maps[0], model.forward_intermediates(images, [0])[1][0], rtol=0, atol=0)


def test_stopped_early_the_final_map_is_normalised_at_the_norms_width(name, images) -> None:
    model = random_model(name)
    final, (kept,) = model.forward_intermediates(images, [0], stop_early=True, output_fmt="NHWC")
    fits = kept.shape[-1] == model.num_features
    torch.testing.assert_close(final, model.norm(kept) if fits else kept, rtol=0, atol=0)


@pytest.mark.parametrize("prune_head", [False, True], ids=["head kept", "head pruned"])
def test_a_pruned_model_runs_and_takes_a_new_head(name, images, prune_head) -> None:
    model = random_model(name)
    (first,) = model.forward_intermediates(images, [0], output_fmt="NHWC", intermediates_only=True)
    fits = first.shape[-1] == model.num_features
    norm = model.norm if fits else nn.Identity()
    model.prune_intermediate_layers([0], prune_head=prune_head)
    features = norm(first)
    torch.testing.assert_close(model.forward_features(images), features, rtol=0, atol=0)
    torch.testing.assert_close(model.forward_intermediates(images, [0])[0], features, rtol=0, atol=0)
    assert model.num_features == model.head_hidden_size == model.embed_dim == first.shape[-1]
    assert model(images).shape == ((2, 10) if fits and not prune_head else features.shape)
    model.reset_classifier(5, "avg")
    assert model(images).shape == (2, 5)


def test_pruning_keeps_what_the_levels_need(name, images) -> None:
    model = random_model(name)
    expected = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.blocks) == model.level_indices[1] + 1
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    for x, y in zip(model.forward_intermediates(images, [0, 1], intermediates_only=True), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert len(model.forward_intermediates(images, intermediates_only=True)) == 2


def test_levels_of_a_pruned_model_are_counted_among_what_is_left(name, images) -> None:
    model = random_model(name)
    (first,) = model.forward_intermediates(images, [0], intermediates_only=True)
    model.prune_intermediate_layers([0])
    for indices in (1, [-1], [0], None):
        (kept,) = model.forward_intermediates(images, indices, intermediates_only=True)
        torch.testing.assert_close(kept, first, rtol=0, atol=0)
    assert len(model.feature_info) == 1
    assert model.prune_intermediate_layers(1) == [0]
    model.reset_classifier(5, "avg")
    assert model(images).shape == (2, 5)


def test_gradient_checkpointing_changes_nothing(name, images) -> None:
    def run(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        out = model(images)
        out.square().sum().backward()
        return out.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    model = timm.create_model(name, drop_path_rate=0.5, proj_drop_rate=0.2).train()
    kept, recomputed = run(False), run(True)
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)
    model.eval()
    expected = model.set_grad_checkpointing(False) or model.forward_intermediates(images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(images), expected, rtol=0, atol=0)


def test_gradient_checkpointing_recomputes_each_block(name, images) -> None:
    model = timm.create_model(name)
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    model(images).sum().backward()
    assert len(calls) == 2


def test_every_parameter_belongs_to_a_group(name) -> None:
    model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher())
    grouped = [parameter for parameters in groups.values() for parameter in parameters]
    assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    depths = {key: depth for depth, parameters in groups.items() for key in parameters}
    assert depths["stem.proj.weight"] == 0
    for key, depth in depths.items():
        if key.startswith("blocks."):
            assert depth == 1 + int(key.split(".")[1])
    # The last norm moves with the last block, the head is a group of its own.
    assert depths["norm.weight" if "norm.weight" in depths else "norm.alpha"] == len(model.blocks)
    assert depths["head.weight"] == depths["head.bias"] == len(model.blocks) + 1


def test_layer_wise_decay(name) -> None:
    model = timm.create_model(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    rates = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.head.weight)] == 1
    assert rates[id(model.stem.proj.weight)] == min(rates.values())
    blocks = [rates[id(next(block.parameters()))] for block in model.blocks]
    assert all(after == pytest.approx(2 * before) for before, after in pairwise(blocks))


def test_weight_decay_spares_biases_and_scales(name) -> None:
    model = timm.create_model(name)
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}
    spared, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for parameter in spared["params"]:
        assert parameter.ndim == 1 or names[id(parameter)].endswith("bias")
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight")


def test_initial_weights(name) -> None:
    model = timm.create_model(name, num_classes=1000)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.bias is None or not module.bias.any()
            if key != "head":
                bound = (6 / (module.in_features + module.out_features)) ** 0.5
                assert module.weight.abs().max() <= bound
                assert module.weight.abs().max() > 0.95 * bound
        elif isinstance(module, nn.LayerNorm | SampleNorm):
            assert (module.weight == 1).all()
        elif isinstance(module, Affine):
            assert (module.alpha == 1).all()


def test_a_model_brought_from_the_meta_device_begins_as_any_other(name) -> None:
    torch.manual_seed(0)
    expected = timm.create_model(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    for key, parameter in model.named_parameters():
        like = expected.get_parameter(key)
        spread = like.std(correction=0).item()
        assert parameter.std(correction=0).item() == pytest.approx(spread, rel=0.3, abs=1e-6)
        assert parameter.mean().item() == pytest.approx(like.mean().item(), abs=spread + 1e-6)


@pytest.mark.parametrize("img_size", [(8, 16), (24, 8)], ids=str)
@pytest.mark.parametrize("patch_size", [(2, 4), (4, 2), 4], ids=str)
def test_non_square_images_and_patches(name, img_size, patch_size) -> None:
    model = timm.create_model(name, img_size=img_size, patch_size=patch_size)
    out = model(torch.randn(2, 3, *img_size))
    out.sum().backward()
    assert out.shape == (2, 10)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_grey_images(name) -> None:
    assert timm.create_model(name, in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_without_pooling_the_head_sees_every_position(name, images) -> None:
    model = random_model(name, global_pool="")
    features = model.forward_features(images)
    torch.testing.assert_close(model(images), model.head(features), rtol=0, atol=0)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        timm.create_model(name, global_pool="token")


@pytest.mark.parametrize("name", ONE_SIZE)
def test_models_of_one_size_refuse_another(name) -> None:
    with pytest.raises(ValueError, match=r"the image is 32×36 pixels, this model was built for 32×32.*img_size"):
        timm.create_model(name)(torch.randn(1, 3, 32, 36))


@pytest.mark.parametrize("name", ANY_SIZE)
def test_models_of_any_size_take_batch_after_batch(name) -> None:
    model = timm.create_model(name).eval()
    for size in ((32, 32), (17, 40), (5, 6), (33, 5)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "least"), [("s2mlp_nano_patch4_32", 2), ("s2mlpv2_small_patch7_224", 7), ("asmlp_tiny_patch4_224", 16)]
)
def test_images_too_small_for_the_last_stage_are_refused(name, least) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        model(torch.randn(1, 3, least, 40))
        with pytest.raises(ValueError, match=rf"{least - 1}×40 pixels is too small .* at least {least}×{least}"):
            model(torch.randn(1, 3, least - 1, 40))
        shallow = timm.create_model(name, features_only=True, out_indices=(0,))
        assert len(shallow(torch.randn(1, 3, 5, 5))) == 1


def test_stochastic_depth_and_dropout_act_in_training_only(name, images) -> None:
    model = timm.create_model(name, drop_path_rate=0.5, drop_rate=0.5).train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)


def test_samples_do_not_see_each_other(name, images) -> None:
    model = random_model(name)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_memory_format_does_not_matter(name, images) -> None:
    model = random_model(name)
    expected = model(images)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(images), expected)


def test_copies_and_pickles(name, images) -> None:
    model = random_model(name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)
        assert other.head.weight.data_ptr() != model.head.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, images, dtype) -> None:
    model = random_model(name)
    exact = copy.deepcopy(model).double()(images.double())
    scale = exact.abs().max()
    out = copy.deepcopy(model).to(dtype)(images.to(dtype))
    assert out.dtype == dtype
    assert_close(out / scale.to(dtype), exact / scale)
    with torch.autocast("cpu", dtype):
        out = model(images)
    assert_close(out / scale.to(dtype), exact / scale)
    out.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_single_precision_is_close_to_double(name, images) -> None:
    model = random_model(name)
    exact = copy.deepcopy(model).double()(images.double())
    scale = exact.abs().max()
    assert_close(model(images) / scale, exact / scale)


def test_building_without_memory(name, images) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(images.to("meta")).shape == (2, 10)
    trained = random_model(name)
    model.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(images), trained(images), rtol=0, atol=0)


def test_sample_gradients_through_function_transforms(name, images) -> None:
    """Per-sample gradients by vmap, as differential privacy libraries take them."""
    model = random_model(name)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, image[None]).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    model(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(per_sample[key].sum(0), parameter.grad, rtol=1e-3, atol=1e-3)


def test_vectorised_jacobians(name, images) -> None:
    """All rows at once, by a batch of gradients; they go through the backward of every function of our own."""
    model = shallow_model(name)
    rows = torch.autograd.functional.jacobian(model, images[:1])
    torch.testing.assert_close(torch.autograd.functional.jacobian(model, images[:1], vectorize=True), rows)


@pytest.mark.parametrize("watch", [False, True], ids=["unwatched", "watched"])
def test_large_batches_run_in_slices(name, watch, monkeypatch) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(5, *model.pretrained_cfg["input_size"])
    sizes: list[int] = []
    with torch.no_grad():
        expected = model(images)
        # Two samples of the first map at once; later maps are smaller, and more of them fit.
        sample = 4 * model.stem(images)[0].numel() * images.element_size()
        monkeypatch.setattr("allmlp.layers.batch_slices.LARGEST_KEPT_BYTES", 2 * sample)
        monkeypatch.setattr("allmlp.layers.batch_slices._SLICE_BYTES", 2 * sample)
        run_block = type(model.blocks[0]).forward
        monkeypatch.setattr(
            type(model.blocks[0]), "forward", lambda self, x: sizes.append(x.shape[0]) or run_block(self, x)
        )
        if watch:
            model.blocks[0].register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(images), expected)
    assert sizes[:3] == ([5] * 3 if watch else [2, 2, 1])


def test_every_block_is_called_once_where_all_modules_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = timm.create_model("mixer_nano_patch4_32", num_blocks=1).eval(), []
    monkeypatch.setattr("allmlp.layers.batch_slices.LARGEST_KEPT_BYTES", 1)
    monkeypatch.setattr("allmlp.layers.batch_slices._SLICE_BYTES", 1)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            model(torch.randn(3, 3, 32, 32))
    finally:
        handle.remove()
    assert seen.count(model.blocks[0]) == 1


def test_gradients_of_gradients_of_checkpointed_blocks(name, images) -> None:
    def run(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [x.grad, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]

    model = shallow_model(name)
    for recomputed, kept in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


class Adapted(nn.Module):
    """As adapters wrap a layer: it has neither the layer's weight nor its sizes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_an_adapter_around_the_patch_embedding(name, images) -> None:
    model = shallow_model(name, num_classes=3)
    expected = model(images)
    model.stem.proj = Adapted(model.stem.proj)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    twin.reset_classifier(5)
    assert twin(images).shape == (2, 5)
    size = model.stem.img_size
    with pytest.raises(ValueError, match="its proj has no weight of its own"):
        model.set_input_size(64, patch_size=2 * model.stem.patch_size[0])
    assert model.stem.img_size == size
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    model.set_input_size(48)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 3)


def test_another_module_in_place_of_the_patch_embedding(name, images) -> None:
    model = shallow_model(name)
    expected = model(images)
    model.stem = Adapted(model.stem)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    twin.prune_intermediate_layers(1)
    twin.reset_classifier(5, "avg")
    assert twin(images).shape == (2, 5)
