"""gMLP and aMLP language models: Liu et al., "Pay Attention to MLPs" (arXiv 2105.08050).

Shape suffixes: B batch, N tokens.
"""

import copy
import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from timm.layers import DropPath
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from allmlp.allocator import keep_freed_memory
from allmlp.errors import UserError
from allmlp.language.cache import CACHE, GMLPCache, given_cache
from allmlp.language.configuration import GMLPConfig
from allmlp.language.generation import GMLPGenerationMixin
from allmlp.language.inputs import (
    check_token_ids,
    left_alignment,
    read_masks,
    refuse_packing,
    reordered,
    reordered_mask,
)
from allmlp.layers import SpatialGatingUnit
from allmlp.layers.batch_slices import runs_in_slices, slice_size
from allmlp.layers.recomputing import mapped, pass_unchanged
from allmlp.layers.spatial_gating import Past, gated_feed_forward
from allmlp.ops import token_shift


class GMLPBlock(GradientCheckpointingLayer):
    """`x + V·SGU(act(U·shift(LN(x))))`; nothing after `V`, no shift in the paper (section 2, figure 1)."""

    def __init__(self, config: GMLPConfig) -> None:
        super().__init__()
        self.shift = config.token_shift
        self.causal = config.is_decoder
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.proj_in = nn.Linear(config.hidden_size, config.intermediate_size)
        # torch's own module where it exists: its products may be stored activated.
        self.act = nn.GELU() if config.hidden_act == "gelu" else ACT2FN[config.hidden_act]
        self.sgu = SpatialGatingUnit(
            config.intermediate_size,
            config.max_position_embeddings,
            heads=config.num_spatial_heads,
            causal=config.is_decoder,
            toeplitz=config.spatial_weight == "toeplitz",
            gate_act=ACT2FN[config.gate_act] if config.gate_act else None,
            attention_size=config.tiny_attention_size,
            attention_channels=config.hidden_size if config.tiny_attention_size else None,
            norm_eps=config.layer_norm_eps,
        )
        self.proj_out = nn.Linear(config.intermediate_size // 2, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.drop_path = DropPath(1 - config.survival_probability)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "*rows tokens tokens"] | None = None,
        padding: Bool[Tensor, "batch tokens"] | None = None,
        cache: Past | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """The arguments are those of `SpatialGatingUnit.forward`; `cache` is this layer's past."""
        x = self.norm(hidden_states)
        if self.shift:
            x = self._shifted(x, padding, cache)
        parts = self.proj_in, self.act, self.sgu, self.proj_out
        if pass_unchanged(x, self.dropout, self.drop_path):
            return gated_feed_forward(*parts, x, mask, padding, cache, onto=hidden_states)
        y = gated_feed_forward(*parts, x, mask, padding, cache)
        return hidden_states + self.drop_path(self.dropout(y))

    def _shifted(self, x: Tensor, padding: Tensor | None, past: Past | None) -> Tensor:
        if padding is not None:
            x = x * padding.unsqueeze(-1)
        if past is None or not past.start:
            if past is not None:
                past.append("shift", x)
            return token_shift(x, self.shift, causal=self.causal)
        kept = past.append("shift", x)
        if past.positions is None:
            recent = kept[:, -(x.shape[1] + self.shift) :]
        else:
            steps = torch.arange(-self.shift, x.shape[1], device=x.device)
            places = past.positions[:, :1] + steps - past.first
            rows = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
            recent = kept[rows, places.clamp(min=0)] * (places >= 0).unsqueeze(-1)
        return token_shift(recent, self.shift, causal=True)[:, -x.shape[1] :]


class GMLPPreTrainedModel(PreTrainedModel):
    """What all gMLP language models share: configuration, initialisation, names."""

    config: GMLPConfig  # pyrefly: ignore[bad-override-mutable-attribute] (as every model of transformers does)
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GMLPBlock"]  # noqa: RUF012 (transformers reads these from the class)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: GMLPConfig) -> None:
        super().__init__(config)
        keep_freed_memory()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpatialGatingUnit):
            module.reset_parameters()


class GMLPModel(GMLPPreTrainedModel):
    """Embedding, blocks and final layer norm; causal where `config.is_decoder` says so."""

    def __init__(self, config: GMLPConfig) -> None:
        super().__init__(config)
        # Where the end of text fills up as well, texts hold it as any other token, and its embedding is learnt.
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        fills_only = config.pad_token_id in range(config.vocab_size) and config.pad_token_id not in ends
        padding = config.pad_token_id if fills_only else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(GMLPBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_layer_norm else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch tokens channels"] | None = None,
        cache: GMLPCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        visibility_mask: Tensor | None = None,
        past_key_values: GMLPCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states.

        Args:
            input_ids: tokens; with `cache` the new ones.
            attention_mask: [batch, cached + new tokens], 0 where there is padding, on either side or in between: the
                rows are computed as if it were not there. Three or four axes are read as `visibility_mask`.
            inputs_embeds: embeddings in place of `input_ids`.
            cache: the cache of the tokens before these; it is extended.
            use_cache: return the cache; by default as configured, for causal models outside of training. Training with
                gradient checkpointing there is none, asked for or given.
            output_hidden_states: return the embedding and each block's output too.
            visibility_mask: [tokens, tokens] or [batch, tokens, tokens], true where a token reads another. It replaces
                causality: a prefix language model's mask lets a causal model read its prefix in both directions.
            past_key_values: `cache` by its name in transformers before version 5.24.
            kwargs: what transformers passes to every model and this one has no use for. `position_ids` are counted
                here; others than these are refused, but not in compiled and traced models, which cannot ask.

        Raises:
            UserError: if the input is no batch, there are no tokens, more than the context takes, or ids outside the
                vocabulary, a mask or `position_ids` do not fit, or gradient checkpointing meets a cache with tokens.
        """
        refuse_packing(kwargs.get("position_ids"), attention_mask)
        hidden = self._embed(input_ids, inputs_embeds)
        if hidden.dim() != 3:
            raise UserError(
                f"the input must be a batch of texts, [batch, tokens], got one of {list(hidden.shape[:-1])}"
            )
        batch, tokens = hidden.shape[:2]
        if tokens == 0:
            raise UserError("the input is empty: at least one token is needed")
        past = self._past(given_cache(cache, past_key_values), use_cache)
        start = past.longest if past else 0
        self._check_length(start + tokens)
        real, mask = read_masks(attention_mask, visibility_mask, hidden, start)
        undo = None
        if real is not None:
            order, undo = left_alignment(real)
            hidden, real = reordered(hidden, order), real.gather(1, order)
            mask = mask if mask is None else reordered_mask(mask, order)
        # Causality keeps tokens from reading the padding that now lies behind them.
        padding = None if self.config.is_decoder and mask is None else real
        if past is not None:
            past.begin(batch, tokens, real, hidden.device)
        hidden = self.dropout(self._with_positions(hidden, past))

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = []
        if past is None and not output_hidden_states and runs_in_slices(self, hidden):
            hidden = self._blocks_in_slices(hidden, mask, padding)
        else:
            for i, block in enumerate(self._blocks):
                if output_hidden_states:
                    states.append(hidden)
                hidden = block(hidden, mask, padding, cache=past.kept[i] if past else None)
        hidden = self.norm(hidden)
        if past is not None:
            past.finish()
        if undo is not None:
            hidden = reordered(hidden, undo)
            states = [reordered(state, undo) for state in states]
        outputs: dict[str, Any] = {"last_hidden_state": hidden, CACHE: past}
        if output_hidden_states:
            outputs["hidden_states"] = (*states, hidden)
        return BaseModelOutputWithPast(**outputs)

    @property
    def _blocks(self) -> nn.ModuleList:
        # Drafts of transformers' early exit lower the configuration's number.
        return self.layers[: self.config.num_hidden_layers]

    def _blocks_in_slices(self, hidden: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """Through all blocks with a few rows at a time, which do not meet in any of them."""
        size, parts = slice_size(hidden, hidden.shape[0]), []
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            part, padded = hidden[rows], None if padding is None else padding[rows]
            read = mask[rows] if mask is not None and mask.dim() == 3 and mask.shape[0] > 1 else mask
            for block in self._blocks:
                part = block(part, read, padded)
            parts.append(part)
        return torch.cat(parts)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        if input_ids is None or inputs_embeds is not None:
            raise UserError("give either input_ids or inputs_embeds")
        try:
            return self.embed_tokens(input_ids)
        except IndexError:
            # The CPU checks each id; asking here, after the fact, costs nothing while all is well.
            check_token_ids(input_ids, self.config.vocab_size)
            raise

    def _check_length(self, tokens: int) -> None:
        context = self.config.max_position_embeddings
        if self.config.spatial_weight == "dense" and tokens > context:
            beyond = "generate(context_overflow='reprefill') goes on from the last half of a full one; "
            raise UserError(
                f"{tokens} tokens do not fit the model's context of {context}: its spatial weight has one row for each "
                f"absolute position. {beyond if self.config.is_decoder else 'Cut longer texts (truncation=True); '}"
                "models with spatial_weight='toeplitz' have no limit."
            )

    def _past(self, given: GMLPCache | None, use_cache: bool | None) -> GMLPCache | None:
        """The cache that is extended: the given one, a new one where one is wanted, None for none."""
        wanted = given is not None or self._wants_cache(use_cache)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # Backward runs the blocks again, which would keep their tokens twice.
            if given is not None and given.longest:
                raise UserError(
                    f"the cache holds {given.longest} tokens, and training with gradient checkpointing takes none: "
                    "give no cache, or call model.eval() or model.gradient_checkpointing_disable()"
                )
            return None
        return GMLPCache(self.config) if wanted and given is None else given

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if not self.config.is_decoder:
            if use_cache:
                raise UserError("only causal models have a decoding cache; this one reads in both directions")
            return False
        if use_cache is None:
            return self.config.use_cache and not self.training and not torch.compiler.is_compiling()
        return use_cache

    def _with_positions(self, hidden: Tensor, past: GMLPCache | None) -> Tensor:
        if self.config.embedding_scale != 1:
            hidden = hidden * self.config.embedding_scale
        if self.config.position_embedding == "none":
            return hidden
        start = past.start if past else 0
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        if past is not None and past.positions is not None:
            positions = past.positions
        return hidden + sinusoids(positions, hidden.shape[-1]).to(hidden.dtype)


class GMLPForCausalLM(GMLPPreTrainedModel, GMLPGenerationMixin):
    """Causal language model: `generate`, and next-token loss with `labels`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GMLPConfig) -> None:
        super().__init__(_directed(config, causal=True))
        self.model = GMLPModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch tokens channels"] | None = None,
        cache: GMLPCache | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        visibility_mask: Tensor | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        past_key_values: GMLPCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict each next token. The arguments are `GMLPModel.forward`'s, and:

        Args:
            labels: the tokens themselves, shifted here by one; −100 where there is nothing to predict.
            logits_to_keep: logits of the last tokens only, this many (0: all), or of the tokens at these indices.
            kwargs: for the loss function, such as `num_items_in_batch`.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=given_cache(cache, past_key_values),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            visibility_mask=visibility_mask,
            position_ids=kwargs.get("position_ids"),
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        whole = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if whole else logits_to_keep.to(hidden.device)
        logits = mapped(self.lm_head, hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept_cache: dict[str, Any] = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **kept_cache)


class GMLPForMaskedLM(GMLPPreTrainedModel):
    """Masked language model: reads in both directions; `labels` are −100 but at the masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GMLPConfig) -> None:
        super().__init__(_directed(config, causal=False))
        self.model = GMLPModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch tokens channels"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        output_hidden_states: bool | None = None,
        visibility_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict the tokens themselves; the arguments are `GMLPModel.forward`'s and `GMLPForCausalLM.forward`'s."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            visibility_mask=visibility_mask,
            position_ids=kwargs.get("position_ids"),
            return_dict=True,
        )
        logits = mapped(self.lm_head, outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class GMLPForSequenceClassification(GMLPPreTrainedModel):
    """Classes (or `num_labels` regression targets) of whole texts.

    The head reads the mean of the real tokens' hidden states, or in causal models the last real token's, the only one
    that has seen them all. What is real the `attention_mask` says.
    """

    def __init__(self, config: GMLPConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 2
        self.model = GMLPModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch tokens channels"] | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        visibility_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Score each text; the arguments are those of `GMLPModel.forward`, and `labels` one class or target a text."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            visibility_mask=visibility_mask,
            use_cache=False,
            position_ids=kwargs.get("position_ids"),
            return_dict=True,
        )
        logits = self.score(self.dropout(self._pooled(outputs.last_hidden_state, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            items = kwargs.get("num_items_in_batch")
            if items is not None and self.config.problem_type != "single_label_classification":
                # Of targets transformers' loss is the mean, whatever it is told: a batch's share of the items is due.
                loss = loss * (labels.numel() / torch.as_tensor(items, device=loss.device))
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _pooled(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        # One of more axes says who reads whom, not what is real.
        if attention_mask is None or attention_mask.dim() > 2:
            return hidden[:, -1] if self.config.is_decoder else hidden.mean(1)
        attention_mask = attention_mask.to(hidden.device)
        real = attention_mask.to(hidden.dtype)
        if not self.config.is_decoder:
            # A long text's sum, and the number of its tokens, need not fit into 16 bits.
            wide = torch.promote_types(hidden.dtype, torch.float32)
            total, count = (x.sum(1, dtype=wide) for x in (hidden * real.unsqueeze(-1), real.unsqueeze(-1)))
            return (total / count.clamp(min=1)).to(hidden.dtype)
        last = (attention_mask.bool() * torch.arange(hidden.shape[1], device=hidden.device)).argmax(-1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


class GMLPForTokenClassification(GenericForTokenClassification, GMLPPreTrainedModel):
    """A class for each token; transformers' own head."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch tokens channels"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Score each token; the arguments are those of `GMLPModel.forward`, and `labels` one class a token or −100."""
        outputs = super().forward(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "use_cache": False, "return_dict": True},
        )
        if labels is not None:
            # transformers' own head keeps the number of items, by which the Trainer wants it divided, from its loss.
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels, config=self.config, **kwargs)
        return outputs


class GMLPForQuestionAnswering(GenericForQuestionAnswering, GMLPPreTrainedModel):
    """Start and end of an answer in the text; transformers' own head."""

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch tokens channels"] | None = None,
        start_positions: Int[Tensor, " batch"] | None = None,
        end_positions: Int[Tensor, " batch"] | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Score each token as start and end; `GMLPModel.forward`'s arguments, and where the answers start and end."""
        return super().forward(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            **{**kwargs, "use_cache": False},
        )


def _directed(config: GMLPConfig, *, causal: bool) -> GMLPConfig:
    """The configuration with this direction; the caller's own is left as it is."""
    if config.is_decoder == causal:
        return config
    config = copy.deepcopy(config)
    config.is_decoder = causal
    return config


def sinusoids(positions: Int[Tensor, "*batch tokens"], channels: int) -> Float[Tensor, "*batch tokens channels"]:
    """Sine in the even and cosine in the odd channels, of wavelengths from 2π to 20000π (arXiv 1706.03762, 3.5).

    In float32.
    """
    # Neither coarser nor finer than the tables that models are trained with, whatever torch's default dtype is.
    steps = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    angles = positions.unsqueeze(-1) * torch.exp(steps * (-math.log(10_000) / channels))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :channels]
