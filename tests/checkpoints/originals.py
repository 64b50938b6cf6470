"""The originals that are installed, small, with random weights: what converted models have to equal."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Original:
    """An original model with an input, and the facts its checkpoints do not store."""

    source: str
    model: nn.Module
    input: Tensor
    facts: dict[str, Any] = field(default_factory=dict)
    sequence_first: bool = False

    def __post_init__(self) -> None:
        draw(self.model)

    @torch.no_grad()
    def output(self, dtype: torch.dtype) -> Tensor:
        """What it computes in a dtype."""
        model = self.model.to(dtype).eval()
        y = model(self.input.to(dtype) if self.input.is_floating_point() else self.input)
        return y[0] if isinstance(y, tuple) else y


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Give every parameter random numbers, so that none hides behind an initial zero or one."""
    for name, parameter in model.named_parameters():
        parameter.normal_(mean=1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0, std=0.3)


def images(in_chans: int, height: int, width: int) -> Tensor:
    """Two images of noise."""
    return torch.randn(2, in_chans, height, width)


def timm_gmlp(
    *, grid: tuple[int, int] = (3, 3), patch: int = 2, dim: int = 8, depth: int = 2, ratio: float = 6, classes: int = 3
) -> Original:
    """timm's gMLP."""
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import SpatialGatingBlock

    return _timm(grid, patch, dim, depth, classes, mlp_ratio=ratio, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)


def timm_mixer(
    *,
    grid: tuple[int, int] = (3, 3),
    patch: int = 2,
    dim: int = 8,
    depth: int = 2,
    ratio: tuple[float, float] = (0.5, 4.0),
    classes: int = 3,
) -> Original:
    """timm's Mixer."""
    return _timm(grid, patch, dim, depth, classes, mlp_ratio=ratio)


def timm_resmlp(
    *, grid: tuple[int, int] = (3, 3), patch: int = 2, dim: int = 8, depth: int = 2, ratio: float = 4, classes: int = 3
) -> Original:
    """timm's ResMLP."""
    from timm.models.mlp_mixer import Affine, ResBlock

    return _timm(grid, patch, dim, depth, classes, mlp_ratio=ratio, block_layer=ResBlock, norm_layer=Affine)


def _timm(grid: tuple[int, int], patch: int, dim: int, depth: int, classes: int, **arguments: Any) -> Original:
    from timm.models.mlp_mixer import MlpMixer

    height, width = grid[0] * patch, grid[1] * patch
    model = MlpMixer(
        num_classes=classes,
        img_size=(height, width),  # type: ignore[arg-type]
        patch_size=patch,
        num_blocks=depth,
        embed_dim=dim,
        **arguments,
    )
    facts = {} if height == width else {"img_size": [height, width]}
    return Original(source="timm", model=model, input=images(3, height, width), facts=facts)


def lucidrains_language(*, length: int | None = None, wrapped: bool = False, **arguments: Any) -> Original:
    """g-mlp-pytorch's language model; `length` is the input's, the model's own by default."""
    from g_mlp_pytorch import gMLP

    arguments = {"num_tokens": 11, "dim": 8, "depth": 2, "seq_len": 9, **arguments}
    facts = {"causal": arguments.get("causal", False), "gate_act": "none"}
    if "shift_tokens" in arguments:
        facts["shift_tokens"] = arguments["shift_tokens"]
    activations: dict[type, str] = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
    if "act" in arguments:
        facts["gate_act"] = activations[type(arguments["act"])]
    tokens = torch.randint(arguments["num_tokens"], (2, length or arguments["seq_len"]))
    return Original(source="lucidrains", model=gMLP(**arguments), input=tokens, facts=facts)


def lucidrains_image(
    *, grid: tuple[int, int] = (3, 3), patch: tuple[int, int] = (2, 2), channels: int = 3, **arguments: Any
) -> Original:
    """g-mlp-pytorch's image classifier."""
    from g_mlp_pytorch import gMLPVision

    size = (grid[0] * patch[0], grid[1] * patch[1])
    arguments = {"num_classes": 3, "dim": 8, "depth": 2, **arguments}
    facts: dict[str, Any] = {}
    if grid[0] != grid[1] or patch[0] != patch[1]:
        facts = {"img_size": list(size), "patch_size": list(patch)}
    if channels != 3:
        facts["in_chans"] = channels
    model = gMLPVision(image_size=size, patch_size=patch, channels=channels, **arguments)
    return Original(source="lucidrains", model=model, input=images(channels, *size), facts=facts)


def lucidrains_mixer(*, grid: tuple[int, int] = (3, 3), patch: int = 2, **arguments: Any) -> Original:
    """mlp-mixer-pytorch."""
    from mlp_mixer_pytorch import MLPMixer

    size = (grid[0] * patch, grid[1] * patch)
    arguments = {"channels": 3, "dim": 8, "depth": 2, "num_classes": 3, **arguments}
    facts: dict[str, Any] = {} if grid[0] == grid[1] else {"img_size": list(size)}
    if arguments["channels"] != 3:
        facts["in_chans"] = arguments["channels"]
    model = MLPMixer(image_size=size, patch_size=patch, **arguments)
    return Original(source="lucidrains", model=model, input=images(arguments["channels"], *size), facts=facts)


def labml(
    *,
    tokens: int = 11,
    dim: int = 8,
    hidden: int = 12,
    depth: int = 2,
    seq_len: int = 9,
    length: int | None = None,
    positions: bool = True,
) -> Original:
    """labml's gMLP language model; `length` is the input's, the model's own by default."""
    from labml_nn.transformers.basic.autoregressive_experiment import AutoregressiveTransformer
    from labml_nn.transformers.gmlp import GMLPBlock
    from labml_nn.transformers.models import EmbeddingsWithPositionalEncoding, Encoder, Generator

    embedding = EmbeddingsWithPositionalEncoding(dim, tokens) if positions else nn.Embedding(tokens, dim)
    model = AutoregressiveTransformer(
        Encoder(GMLPBlock(dim, hidden, seq_len), depth),  # type: ignore[arg-type]
        embedding,
        Generator(tokens, dim),
    )
    x = torch.randint(tokens, (length or seq_len, 2))
    return Original(source="labml", model=model, input=x, sequence_first=True)
