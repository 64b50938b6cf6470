"""allmlp's networks by name, for images and for text: how one is made, and what it is given."""

from typing import Any

import timm
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from allmlp.catalogue import is_language, list_models
from allmlp.errors import UserError, nearest
from allmlp.language import GMLPConfig, GMLPForCausalLM


class Logits(nn.Module):
    """A causal language model of which the logits of all tokens are wanted, and no decoding cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        return self.model(ids, use_cache=False).logits


def make(name: str) -> nn.Module:
    """The network in eval mode, untrained, stochastic depth off."""
    if is_language(name):
        return Logits(GMLPForCausalLM(GMLPConfig.named(name, survival_probability=1.0))).eval()
    return timm.create_model(name, drop_path_rate=0.0).eval()


def example(name: str, batch_size: int) -> Tensor:
    """The same random images, or texts of the full context, at every call."""
    generator = torch.Generator().manual_seed(0)
    if is_language(name):
        config = GMLPConfig.named(name)
        return torch.randint(config.vocab_size, (batch_size, config.max_position_embeddings), generator=generator)
    cfg: Any = timm.get_pretrained_cfg(name)
    return torch.randn(batch_size, *cfg.input_size, generator=generator)


def check_name(name: str) -> None:
    """Refuse a name that is no model's.

    Raises:
        UserError: with the nearest names of those there are.
    """
    known = [card.name for card in list_models()]
    if name not in known:
        raise UserError(f"There is no model '{name}'; `allmlp models` lists them.{nearest(name, known)}")


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in a dtype; token ids as they are."""
    return x.to(dtype) if x.is_floating_point() else x
