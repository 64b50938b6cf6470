"""labml's gMLP language model (labml_nn/transformers/gmlp), sequence-first there, batch-first here.

It is causal, since labml's model masks later tokens itself, unless the fact `causal` says that it was used otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from allmlp.checkpoints.architecture import LanguageArchitecture
from allmlp.checkpoints.layout import CAUSAL, Facts, Layout, Tensors, count, numbered, rename, shape
from allmlp.errors import UserError
from allmlp.language.modeling import sinusoids

_BLOCK = {"norm": "norm", "proj1": "proj_in", "sgu.norm": "sgu.norm", "sgu": "sgu", "proj2": "proj_out"}
_POSITIONS = "src_embed.positional_encodings"


def _labml(tensors: Tensors, facts: Facts) -> tuple[LanguageArchitecture, Tensors]:
    tensors = dict(tensors)
    embedding = "src_embed.linear" if "src_embed.linear.weight" in tensors else "src_embed"
    vocab_size, hidden_size = shape(tensors, f"{embedding}.weight", 2)
    positions = tensors.pop(_POSITIONS, None)
    if positions is not None and not _is_sinusoidal(positions, hidden_size):
        raise UserError(f"'{_POSITIONS}' are learnt; allmlp's gMLP has sinusoidal positions or none.")
    blocks = count(tensors, "encoder.layers.")
    causal = facts.get("causal", True)
    architecture = LanguageArchitecture(
        name="GMLPForCausalLM" if causal else "GMLPForMaskedLM",
        config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": shape(tensors, "encoder.layers.0.proj1.weight", 2)[0],
            "num_hidden_layers": blocks,
            "max_position_embeddings": shape(tensors, "encoder.layers.0.sgu.weight", 2)[0],
            "is_decoder": causal,
            "position_embedding": "none" if positions is None else "sinusoidal",
            "embedding_scale": 1.0 if positions is None else math.sqrt(hidden_size),
            "lm_head_bias": True,
            "tie_word_embeddings": False,
        },
        notes=() if positions is None else (f"'{_POSITIONS}' is the table of sinusoids, which the model computes.",),
    )
    modules = {embedding: "model.embed_tokens", "encoder.norm": "model.norm", "generator.projection": "lm_head"}
    for index in range(blocks):
        modules |= numbered(_BLOCK, f"encoder.layers.{index}", f"model.layers.{index}")
    return architecture, rename(tensors, modules)


def _is_sinusoidal(positions: Tensor, channels: int) -> bool:
    """Whether a table [positions, 1, channels] is the one the model computes, up to float32's rounding of angles."""
    table = sinusoids(torch.arange(len(positions)), channels).unsqueeze(1)
    return positions.shape == table.shape and torch.allclose(positions.float(), table, rtol=0, atol=1e-3)


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.layers.0.proj1.weight" in tensors and "encoder.layers.0.sgu.weight" in tensors


LAYOUTS = (
    Layout(
        source="labml",
        family="gMLP language model",
        recognises=_recognises,
        convert=_labml,
        inferred="vocabulary, widths, depth, length, sinusoidal positions and embedding scale",
        facts=(replace(CAUSAL, assumed="true"),),
    ),
)
