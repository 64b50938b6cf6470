"""Make the parity cases that were added to the first ones: an original's weights, an input, its output in float64.

    python tests/golden/make.py lucidrains        with any g-mlp-pytorch installed; makes the cases of that version
    python tests/golden/make.py jaketae CLONE     a clone of jaketae/g-mlp
    python tests/golden/make.py google CLONE      a clone of google-research/vision_transformer, with jax and flax
    python tests/golden/make.py deit CLONE        a clone of facebookresearch/deit

Only weights and numbers are kept, never the original's code.
"""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def save(name: str, source: str, package: str, upstream: dict[str, Any], facts: dict[str, Any], arrays: Any) -> Path:
    """Write everything of a case but the checkpoint."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    for file, array in zip(("input.npy", "output.npy"), arrays, strict=True):
        np.save(folder / file, array)
    case = {"source": source, "package": package, "upstream": upstream, "facts": facts}
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    return folder


def torch_case(name: str, source: str, package: str, model: Any, x: Any, upstream: Any, facts: Any) -> None:
    """Draw a PyTorch model's weights so that every one matters, and make the case."""
    import torch

    torch.manual_seed(len(name))
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in key and key.endswith("weight") else 0.0, std=0.3)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model = model.double().eval()
    with torch.no_grad():
        y = model(x.double() if x.is_floating_point() else x)
    folder = save(name, source, package, upstream, facts, (x.numpy(), y.numpy()))
    torch.save(weights, folder / "checkpoint.pth")


def lucidrains() -> None:
    """The layouts of g-mlp-pytorch; each case is made by the version it is of."""
    import torch
    from g_mlp_pytorch import gMLP, gMLPVision

    text = {"num_tokens": 20, "dim": 8, "depth": 2, "seq_len": 12}
    image = {"image_size": 8, "patch_size": 2, "num_classes": 3, "dim": 8, "depth": 2}
    dense, causal = {"causal": False, "gate_act": None}, {"causal": True, "gate_act": None}
    toeplitz = "circulant_matrix" if version("g-mlp-pytorch") >= "0.1.4" else "use_circulant_matrix"
    cases: dict[str, list[tuple[str, Any, dict[str, Any], dict[str, Any]]]] = {
        "0.0.4": [("hidden_states", gMLP, {}, {}), ("vision", gMLPVision, {}, {})],
        "0.0.6": [("hidden_states", gMLP, {}, {"causal": False})],
        "0.0.8": [("causal_lm", gMLP, {"causal": True}, {"causal": True})],
        "0.0.10": [("vision", gMLPVision, {}, {})],
        "0.0.15": [("causal_lm", gMLP, {"causal": True, "act": "tanh"}, {"causal": True, "gate_act": "tanh"})],
        "0.0.16": [("vision", gMLPVision, {"attn_dim": 4}, {})],
        "0.1.0": [("toeplitz_lm", gMLP, {toeplitz: True}, dense)],
        "0.1.1": [("masked_lm", gMLP, {}, dense), ("toeplitz_lm", gMLP, {toeplitz: True}, dense)],
        "0.1.4": [("toeplitz_lm", gMLP, {toeplitz: True, "causal": True, "heads": 2, "attn_dim": 4}, causal)],
    }
    for kind, model_class, extra, facts in cases[version("g-mlp-pytorch")]:
        upstream = {**(text if model_class is gMLP else image), **extra}
        arguments = {**upstream, **({"act": torch.nn.Tanh()} if "act" in extra else {})}
        torch.manual_seed(0)
        x = torch.randint(20, (2, 12)) if model_class is gMLP else torch.randn(2, 3, 8, 8)
        package = f"g-mlp-pytorch {version('g-mlp-pytorch')}"
        name = f"lucidrains_{version('g-mlp-pytorch').replace('.', '_')}_{kind}"
        torch_case(name, "lucidrains", package, model_class(**arguments), x, upstream, facts)


def jaketae(clone: Path) -> None:
    """Its language model, which returns hidden states."""
    import torch

    core = load(clone / "g_mlp" / "core.py")
    upstream = {"num_tokens": 20, "d_model": 8, "d_ffn": 12, "seq_len": 10, "num_layers": 2}
    x = torch.randint(20, (2, 10))
    model = core.gMLPForLanguageModeling(**upstream)
    torch_case("jaketae_hidden_states", "jaketae", "jaketae/g-mlp", model, x, upstream, {})


def deit(clone: Path) -> None:
    """ResMLP by its authors."""
    import torch

    # What old versions of timm had in other places.
    sys.modules["timm.models.registry"] = importlib.import_module("timm.models")
    sys.modules["timm.models.layers"] = importlib.import_module("timm.layers")
    models = load(clone / "resmlp_models.py")
    upstream = {"img_size": 16, "patch_size": 4, "num_classes": 3, "embed_dim": 8, "depth": 2}
    x = torch.randn(2, 3, 16, 16)
    torch_case("deit_resmlp", "deit", "facebookresearch/deit", models.resmlp_models(**upstream), x, upstream, {})


def google(clone: Path) -> None:
    """Mixer by its authors, in JAX."""
    import jax

    jax.config.update("jax_enable_x64", True)
    models = load(clone / "vit_jax" / "models_mixer.py")
    sizes = {"num_classes": 3, "num_blocks": 2, "hidden_dim": 8, "tokens_mlp_dim": 6, "channels_mlp_dim": 20}
    model = models.MlpMixer(patches=type("Patches", (), {"size": (4, 4)}), **sizes)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 16, 16, 3))
    shapes = jax.tree_util.tree_map(np.shape, model.init(jax.random.PRNGKey(0), x, train=False)["params"])
    flat = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda node: isinstance(node, tuple))
    weights, leaves = {}, []
    for path, shape in flat[0]:
        name = "/".join(part.key for part in path)
        weights[name] = draw.normal(float(name.endswith("scale")), 0.3, shape).astype(np.float32)
        leaves.append(weights[name].astype(np.float64))
    y = model.apply({"params": jax.tree_util.tree_unflatten(flat[1], leaves)}, x, train=False)
    upstream = {**sizes, "patch_size": 4, "img_size": 16}
    arrays = (x.transpose(0, 3, 1, 2), np.asarray(y))
    folder = save("google_mixer", "google-mixer", "google-research/vision_transformer", upstream, {}, arrays)
    np.savez(folder / "checkpoint.npz", **weights)


def load(path: Path) -> Any:
    """A module from a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    {"lucidrains": lucidrains, "jaketae": jaketae, "deit": deit, "google": google}[sys.argv[1]](
        *map(Path, sys.argv[2:])
    )
