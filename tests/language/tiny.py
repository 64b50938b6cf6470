"""Tiny language models with every option, their weights far from the gentle start that would hide mistakes."""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from allmlp.language import GMLPConfig

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

VOCABULARY, CONTEXT = 31, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads": {"num_spatial_heads": 3},
    "attention": {"tiny_attention_size": 4},
    "toeplitz": {"spatial_weight": "toeplitz"},
    "toeplitz-heads-attention": {"spatial_weight": "toeplitz", "num_spatial_heads": 2, "tiny_attention_size": 4},
    "gate-activation": {"gate_act": "tanh", "hidden_act": "relu"},
    "token-shift": {"token_shift": 2},
    "token-shift-toeplitz-attention": {"token_shift": 1, "spatial_weight": "toeplitz", "tiny_attention_size": 4},
    "sinusoidal": {"position_embedding": "sinusoidal", "embedding_scale": 3.0},
    "bare": {"final_layer_norm": False},
    "untied-head": {"tie_word_embeddings": False, "lm_head_bias": True},
    "stochastic-depth-dropout": {"survival_probability": 0.5, "hidden_dropout": 0.3},
}
DENSE = {name: options for name, options in OPTIONS.items() if "spatial_weight" not in options}
TOEPLITZ = {name: options for name, options in OPTIONS.items() if "spatial_weight" in options}


def tiny_config(**options: Any) -> GMLPConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 10, "intermediate_size": 24, "num_hidden_layers": 3}
    return GMLPConfig(**{**sizes, "max_position_embeddings": CONTEXT, **options})


def tiny_model(kind: type[ModelT], **options: Any) -> ModelT:
    """A model with random parameters in evaluation mode; the same call gives the same model."""
    torch.manual_seed(1)
    model = kind(tiny_config(**options)).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            gain = 1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0
            nn.init.normal_(parameter, mean=gain, std=0.4)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape)
