"""gMLP by Phil Wang (lucidrains/g-mlp-pytorch), every layout from 0.0.1 to 0.1.5: language models and image classifier.

The versions name a block's modules in five ways. What they compute differs in three: the Toeplitz weight
(`circulant_matrix`), multiplied out here; token shift, new in 0.1.5; tiny attention, which before 0.0.16 read the
expanded hidden state, as no model here does, and is refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from allmlp.checkpoints.architecture import LanguageArchitecture, VisionArchitecture, ratio, vision_architecture
from allmlp.checkpoints.layout import (
    CAUSAL,
    IMAGE_FACTS,
    Fact,
    Facts,
    Layout,
    Tensors,
    numbered,
    parse_count,
    patch_of,
    rename,
    shape,
    square_image,
)
from allmlp.errors import UserError, nearest
from allmlp.vision import GMLP, gmlp

# All Toeplitz weights of a model multiplied out may have so many numbers, 2 GiB of them.
_MULTIPLIED_OUT = 2**28


def _names(norm: str, proj_in: str, unit: str, proj_out: str, projection: str = "") -> dict[str, str]:
    return {
        norm: "norm",
        proj_in: "proj_in",
        f"{unit}.norm": "sgu.norm",
        f"{unit}{projection}": "sgu",
        proj_out: "proj_out",
    }


# A block's modules in the versions' names, newest first, and its tiny attention.
_FORMS = (
    (_names("norm", "fn.fn.proj_in.0", "fn.fn.sgu", "fn.fn.proj_out"), "fn.fn.attn"),  # language models of 0.1.5
    (_names("norm", "fn.proj_in.0", "fn.sgu", "fn.proj_out"), "fn.attn"),  # from 0.1.0
    (_names("norm", "fn.proj_in.0", "fn.sgu", "fn.proj_out", ".proj"), "fn.attn"),  # from 0.0.16
    (_names("norm", "fn.0", "fn.2", "fn.3", ".proj"), None),  # from 0.0.11
    (_names("0", "1", "3", "4", ".proj"), None),  # from 0.0.1
)


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """A model's blocks: their paths, the names of their modules and ours, and the sizes the weights have."""

    paths: list[str]
    names: dict[str, str]
    hidden: int
    tokens: int
    heads: int
    attention_size: int
    notes: tuple[str, ...]

    def modules(self, prefix: str) -> dict[str, str]:
        """Their names of all modules, and ours under `prefix`."""
        modules = {}
        for index, path in enumerate(self.paths):
            modules |= numbered(self.names, path, f"{prefix}.{index}")
        return modules


def _blocks(tensors: Tensors) -> tuple[_Blocks, Tensors]:
    """The blocks, and the tensors with one dense spatial weight a block."""
    paths = _paths(tensors)
    present = {name.rpartition(".")[0] for name in tensors}
    if any(f"{path}.{unit}.attn.to_qkv" in present for path in paths for unit in ("3", "fn.2")):
        raise UserError(
            "This model has the tiny attention of g-mlp-pytorch before 0.0.16, which read the expanded hidden state; "
            "allmlp has the paper's alone, which reads the block's input."
        )
    forms = [form for form in _FORMS if all(f"{paths[0]}.{name}" in present for name in form[0])]
    if not forms:
        raise UserError(f"The weights under '{paths[0]}' are of no known version of g-mlp-pytorch.")
    names, attention = forms[0]
    attention_size = 0
    if f"{paths[0]}.{attention}.to_qkv" in present:
        names = {**names, f"{attention}.to_qkv": "sgu.attention.qkv", f"{attention}.to_out": "sgu.attention.proj"}
        attention_size = shape(tensors, f"{paths[0]}.{attention}.to_qkv.weight", 2)[0] // 3
    ours = {our: name for name, our in names.items()}
    unused = [f"{path}.{ours['sgu']}.proj.{name}" for path in paths for name in ("weight", "bias")]
    tensors, given = {name: tensor for name, tensor in tensors.items() if name not in unused}, tensors
    notes = []
    if len(tensors) < len(given):
        notes.append("Every block's 'sgu.proj' is left out: g-mlp-pytorch 0.1.0 and 0.1.1 save it, but do not use it.")
    toeplitz = [_multiply_out(tensors, f"{path}.{ours['sgu']}", len(paths)) for path in paths]
    if any(toeplitz):
        notes.append(
            "The Toeplitz weights are multiplied out with their position factors, in float64 to lose nothing: the "
            "model is in float64."
        )
    *heads, tokens = shape(tensors, f"{paths[0]}.{ours['sgu']}.bias", 1, 2)
    return _Blocks(
        paths=paths,
        names=names,
        hidden=shape(tensors, f"{paths[0]}.{ours['proj_in']}.weight", 2)[0],
        tokens=tokens,
        heads=heads[0] if heads else 1,
        attention_size=attention_size,
        notes=tuple(notes),
    ), tensors


_NUMBER = re.compile(r"[0-9]{1,6}")


def _paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """The blocks' paths: `layers.0.fn` and on; before 0.0.5 `1.fn` and on (language) or `2.fn` and on (images)."""
    found = {name.split(".fn.")[0] for name in tensors if ".fn." in name}
    prefix = "layers." if all(path.startswith("layers.") for path in found) else ""
    numbers = sorted(int(number) for path in found if _NUMBER.fullmatch(number := path.removeprefix(prefix)))
    if len(numbers) != len(found) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UserError(f"The blocks are not numbered one by one: {', '.join(sorted(found)[:8])}.")
    return [f"{prefix}{number}.fn" for number in numbers]


def _multiply_out(tensors: Tensors, unit: str, blocks: int) -> bool:
    """Put a dense weight in place of the factors of a unit of `circulant_matrix=True`; return whether it is one.

    It has as many weights as biases. `W[i, j] = w[n − 1 − i + j] · pos_x[i] · pos_y[j]` for `j ≤ i`, else 0: lower
    triangular and, but for the positions, Toeplitz, not circulant. In float64, as in the original in float64.
    """
    bias, weight = shape(tensors, f"{unit}.bias", 1, 2), shape(tensors, f"{unit}.weight", 1, 2, 3)
    if len(weight) != len(bias):
        return False
    names = [name for name in ("weight", "circulant_pos_x", "circulant_pos_y") if f"{unit}.{name}" in tensors]
    if len(names) == 2:
        raise UserError(f"Of the position factors of '{unit}' one is missing.")
    for name in names:
        if shape(tensors, f"{unit}.{name}", len(bias)) != bias:
            found = list(tensors[f"{unit}.{name}"].shape)
            raise UserError(f"The weight '{unit}.{name}' has shape {found}, its bias {list(bias)}.")
    if blocks * math.prod(bias) * bias[-1] > _MULTIPLIED_OUT:
        raise UserError(
            f"The Toeplitz weights of '{unit}' have {bias[-1]:,} positions; multiplied out, {blocks} blocks have "
            f"more than {_MULTIPLIED_OUT:,} numbers."
        )
    factors = {name: tensors.pop(f"{unit}.{name}").double() for name in names}
    positions = torch.arange(bias[-1])
    lag = bias[-1] - 1 - positions.unsqueeze(1) + positions
    dense = factors["weight"][..., lag.clamp(max=bias[-1] - 1)] * (lag < bias[-1])
    if "circulant_pos_x" in factors:
        dense = dense * factors["circulant_pos_x"].unsqueeze(-1)
    if "circulant_pos_y" in factors:
        dense = dense * factors["circulant_pos_y"].unsqueeze(-2)
    tensors[f"{unit}.weight"] = dense
    return True


def _language(tensors: Tensors, facts: Facts) -> tuple[LanguageArchitecture, Tensors]:
    embedding = "0" if "0.weight" in tensors else "to_embed"
    if f"{embedding}.weight" not in tensors:
        raise UserError("This model was made without num_tokens: it has no embedding, so it is no language model.")
    vocab_size, hidden_size = shape(tensors, f"{embedding}.weight", 2)
    blocks, tensors = _blocks(tensors)
    # Before 0.0.7 they return hidden states.
    has_head = "to_logits.1.weight" in tensors
    inner = "model." if has_head else ""
    modules = {embedding: f"{inner}embed_tokens", **blocks.modules(f"{inner}layers")}
    if has_head:
        modules |= {"to_logits.0": "model.norm", "to_logits.1": "lm_head"}
    causal = facts.get("causal", False)
    architecture = LanguageArchitecture(
        name="GMLPModel" if not has_head else "GMLPForCausalLM" if causal else "GMLPForMaskedLM",
        config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": blocks.hidden,
            "num_hidden_layers": len(blocks.paths),
            "max_position_embeddings": blocks.tokens,
            "num_spatial_heads": blocks.heads,
            "tiny_attention_size": blocks.attention_size,
            "gate_act": facts.get("gate_act"),
            "is_decoder": causal,
            "token_shift": facts.get("shift_tokens", 0),
            "final_layer_norm": has_head,
            "lm_head_bias": has_head,
            "tie_word_embeddings": False,
        },
        notes=blocks.notes,
    )
    return architecture, rename(tensors, modules)


def _image(tensors: Tensors, facts: Facts) -> tuple[VisionArchitecture, Tensors]:
    blocks, tensors = _blocks(tensors)
    if "1.weight" in tensors:
        stem, norm, head = "1", str(2 + len(blocks.paths)), str(4 + len(blocks.paths))
    else:
        stem, norm, head = "to_patch_embed.1", "to_logits.0", "to_logits.2"
    embed_dim, pixels = shape(tensors, f"{stem}.weight", 2)
    in_chans, patch_size = patch_of(pixels, facts)
    architecture = vision_architecture(
        GMLP,
        gmlp.VARIANTS,
        num_classes=shape(tensors, f"{head}.weight", 2)[0],
        img_size=square_image(blocks.tokens, patch_size, facts),
        in_chans=in_chans,
        patch_size=patch_size,
        num_blocks=len(blocks.paths),
        embed_dim=embed_dim,
        mlp_ratio=ratio(blocks.hidden, embed_dim),
        num_spatial_heads=blocks.heads,
        attention_size=blocks.attention_size,
        norm_eps=1e-5,
    )
    renamed = rename(tensors, {stem: "stem.proj", norm: "norm", head: "head", **blocks.modules("blocks")})
    # A linear map of patches flattened as (channel, row, column) is the convolution.
    renamed["stem.proj.weight"] = renamed["stem.proj.weight"].reshape(embed_dim, in_chans, *patch_size)
    return replace(architecture, notes=blocks.notes), renamed


def _parse_gate_act(value: Any) -> str | None:
    if value is None or value in ("none", "identity", "linear"):
        return None
    if not isinstance(value, str) or value not in ACT2FN:
        raise ValueError(f"'none' or an activation by transformers' name.{nearest(str(value), ACT2FN)}")
    return value


_GATE_ACT = Fact(
    name="gate_act",
    help="the gate's activation (`act` in g-mlp-pytorch): none, tanh, sigmoid, …",
    parse=_parse_gate_act,
)
_SHIFT_TOKENS = Fact(
    name="shift_tokens",
    help="reach of the token shift (`shift_tokens` in g-mlp-pytorch)",
    parse=parse_count,
    assumed="0",
)
# What a version can vary has to be given; what it cannot may be given all the same.
_ASKED = {fact.name: replace(fact, required=True) for fact in (CAUSAL, _GATE_ACT)}
_LANGUAGE = "gMLP and aMLP language model"
_INFERRED = "vocabulary, widths, depth, length, spatial heads, tiny attention, Toeplitz weight"


def _is_image(tensors: Mapping[str, Tensor]) -> bool:
    return "to_patch_embed.1.weight" in tensors or ("1.bias" in tensors and "2.fn.3.norm.weight" in tensors)


def _is_sequential(tensors: Mapping[str, Tensor]) -> bool:
    return "1.fn.3.norm.weight" in tensors


def _has(name: str) -> Any:
    return lambda tensors: f"layers.0.fn.{name}.weight" in tensors and not _is_image(tensors)


def _layout(versions: str, recognises: Any, *facts: Fact) -> Layout:
    return Layout(
        source="lucidrains",
        family=f"{_LANGUAGE}, g-mlp-pytorch {versions}",
        recognises=recognises,
        convert=_language,
        inferred=_INFERRED,
        facts=facts,
    )


LAYOUTS = (
    _layout("0.1.5", _has("fn.fn.proj_in.0"), *_ASKED.values(), _SHIFT_TOKENS),
    _layout("0.0.16 to 0.1.4", _has("fn.proj_in.0"), *_ASKED.values()),
    _layout("0.0.11 to 0.0.15", _has("fn.0"), *_ASKED.values()),
    _layout("0.0.5 to 0.0.10", _has("3.norm"), _ASKED["causal"], _GATE_ACT),
    _layout("0.0.1 to 0.0.4", _is_sequential, CAUSAL, _GATE_ACT),
    Layout(
        source="lucidrains",
        family="gMLP and aMLP for images",
        recognises=_is_image,
        convert=_image,
        inferred="widths, depth, spatial heads, tiny attention, square patch and image size, classes",
        facts=IMAGE_FACTS,
    ),
)
