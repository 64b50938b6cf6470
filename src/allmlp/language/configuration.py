"""Configuration of gMLP and aMLP language models, and the named sizes (arXiv 2105.08050, section 4 and appendix C)."""

import math
from typing import Any, Literal, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from allmlp.errors import UserError, nearest


# transformers gives the class an __init__ that takes more than its signature says; run-time checkers would not let it.
@no_type_check
@strict
class GMLPConfig(PreTrainedConfig):
    """What a gMLP is made of; the defaults are the paper's base model with a dense spatial weight.

    Args:
        vocab_size: tokens of the vocabulary.
        hidden_size: width of the model, d_model.
        intermediate_size: width of a block's expansion before the split, d_ffn; even.
        num_hidden_layers: blocks.
        max_position_embeddings: trained length, the side of the spatial weight. Toeplitz models go on beyond it: a
            token reads the others less than this many positions away.
        num_spatial_heads: spatial weights per block, each for an equal share of the gate's channels.
        tiny_attention_size: width of aMLP's tiny attention; 0: plain gMLP.
        spatial_weight: `"dense"`, or `"toeplitz"` with one weight a lag and one bias a head.
        hidden_act: activation of the expansion, by transformers' name; `"gelu"` is the exact one.
        gate_act: activation of the gate, by transformers' name; None: none, as in the paper.
        survival_probability: chance of a block to be kept in a training step, for each sequence (stochastic depth).
        hidden_dropout: dropout rate on the embedding, on every block's output and in front of classification heads.
        layer_norm_eps: epsilon of every layer norm.
        initializer_range: standard deviation that embedding and projections are drawn with.
        is_decoder: causal. `GMLPForCausalLM` sets it, `GMLPForMaskedLM` clears it, the other classes follow it.
        position_embedding: `"none"`, as in the paper (the spatial weight knows positions), or `"sinusoidal"`: sine in
            the even and cosine in the odd channels, added to the embedding (labml's form).
        embedding_scale: factor on the token embedding.
        final_layer_norm: whether a layer norm follows the last block.
        lm_head_bias: whether the language modelling head has a bias.
        token_shift: reach of g-mlp-pytorch's token shift in front of every block; 0: none.
        tie_word_embeddings: share the embedding with the language modelling head.
        use_cache: return the decoding cache where the model is causal and not in training.
    """

    model_type = "gmlp"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (transformers reads it from the class)

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 3072
    num_hidden_layers: int = 48
    max_position_embeddings: int = 512
    num_spatial_heads: int = 1
    tiny_attention_size: int = 0
    spatial_weight: Literal["dense", "toeplitz"] = "dense"
    hidden_act: str = "gelu"
    gate_act: str | None = None
    survival_probability: float | int = 1.0
    hidden_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    is_decoder: bool = False
    position_embedding: Literal["none", "sinusoidal"] = "none"
    embedding_scale: float | int = 1.0
    final_layer_norm: bool = True
    lm_head_bias: bool = False
    token_shift: int = 0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("tiny_attention_size", "token_shift"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        # A shift needs a group of channels, and a token that streams far beyond its context reads no further than that.
        below = ["hidden_size", *(["max_position_embeddings"] if self.spatial_weight == "toeplitz" else [])]
        for name in below:
            if self.token_shift >= getattr(self, name):
                raise UserError(f"token_shift must be below {name}, {getattr(self, name)}, got {self.token_shift}")
        if self.intermediate_size % 2:
            raise UserError(f"intermediate_size must be even to be split in halves, got {self.intermediate_size}")
        if self.num_spatial_heads < 1 or self.intermediate_size // 2 % self.num_spatial_heads:
            raise UserError(
                f"num_spatial_heads must divide the gate's {self.intermediate_size // 2} channels, "
                f"got {self.num_spatial_heads}"
            )
        if not 0 <= self.initializer_range < math.inf or not 0 < self.layer_norm_eps < math.inf:
            raise UserError(
                "initializer_range must be at least 0 and layer_norm_eps above 0, "
                f"got {self.initializer_range} and {self.layer_norm_eps}"
            )
        if not 0 < self.survival_probability <= 1:
            raise UserError(f"survival_probability must be above 0 and at most 1, got {self.survival_probability}")
        if not 0 <= self.hidden_dropout < 1:
            raise UserError(f"hidden_dropout must be at least 0 and below 1, got {self.hidden_dropout}")
        for name in ("hidden_act", "gate_act"):
            act = getattr(self, name)
            if act is not None and act not in ACT2FN:
                raise UserError(f"{name} is '{act}', which transformers does not know.{nearest(act, ACT2FN)}")

    @classmethod
    def named(cls, name: str, **overrides: Any) -> "GMLPConfig":
        """The configuration of a named size, with any field changed.

        Raises:
            UserError: if there is no such size or field; the nearest names are offered.
        """
        if name not in VARIANTS:
            raise UserError(f"There is no language model '{name}'.{nearest(name, VARIANTS)}")
        for field in overrides:
            # It would be kept, and the model not read it.
            if field not in MODEL_FIELDS and not hasattr(cls, field):
                raise UserError(f"A GMLPConfig has no field '{field}'.{nearest(field, MODEL_FIELDS)}")
        return cls(**{**VARIANTS[name], **overrides})


MODEL_FIELDS = tuple(GMLPConfig.__annotations__)
"""What says how a model is made, in the order of the class; `PreTrainedConfig` has further fields."""
OF_THE_TOKENIZER = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Those that the tokenizer says: what fills up, begins and ends a text. The vocabulary may be larger than its own."""


def said_by(tokenizer: Any) -> dict[str, int | None]:
    """The fields `OF_THE_TOKENIZER` of a model with this tokenizer of transformers."""
    return {name: getattr(tokenizer, name) for name in OF_THE_TOKENIZER}


# For laptops: dense weights, the tokenizer's vocabulary.
_NANO = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 64}
# Appendix C's models: 32k tied vocabulary, length 512, Toeplitz weights; d_ffn before the split.
_PAPER = {"vocab_size": 32_000, "max_position_embeddings": 512, "spatial_weight": "toeplitz"}
VARIANTS: dict[str, dict[str, Any]] = {
    "gmlp_nano": {**_NANO},
    "amlp_nano": {**_NANO, "tiny_attention_size": 32},
    "gmlp_base": {**_PAPER, "num_hidden_layers": 48, "hidden_size": 512, "intermediate_size": 3072},
    "gmlp_large": {**_PAPER, "num_hidden_layers": 96, "hidden_size": 768, "intermediate_size": 3072},
    "gmlp_xlarge": {**_PAPER, "num_hidden_layers": 144, "hidden_size": 1024, "intermediate_size": 4096},
    "amlp_base": {
        **_PAPER, "num_hidden_layers": 36, "hidden_size": 512, "intermediate_size": 3072, "tiny_attention_size": 64
    },
    "amlp_large": {
        **_PAPER, "num_hidden_layers": 72, "hidden_size": 768, "intermediate_size": 3072, "tiny_attention_size": 128
    },
}  # fmt: skip
