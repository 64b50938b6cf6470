"""gMLP and aMLP language models; importing this registers them with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from allmlp.language.cache import GMLPCache
from allmlp.language.configuration import GMLPConfig
from allmlp.language.modeling import (
    GMLPForCausalLM,
    GMLPForMaskedLM,
    GMLPForQuestionAnswering,
    GMLPForSequenceClassification,
    GMLPForTokenClassification,
    GMLPModel,
)

__all__ = [
    "GMLPCache",
    "GMLPConfig",
    "GMLPForCausalLM",
    "GMLPForMaskedLM",
    "GMLPForQuestionAnswering",
    "GMLPForSequenceClassification",
    "GMLPForTokenClassification",
    "GMLPModel",
]

# By this name the Trainer knows that label smoothing is of the next token.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GMLPConfig.model_type] = GMLPForCausalLM.__name__
AutoConfig.register(GMLPConfig.model_type, GMLPConfig)
AutoModel.register(GMLPConfig, GMLPModel)
AutoModelForCausalLM.register(GMLPConfig, GMLPForCausalLM)
AutoModelForMaskedLM.register(GMLPConfig, GMLPForMaskedLM)
AutoModelForSequenceClassification.register(GMLPConfig, GMLPForSequenceClassification)
AutoModelForTokenClassification.register(GMLPConfig, GMLPForTokenClassification)
AutoModelForQuestionAnswering.register(GMLPConfig, GMLPForQuestionAnswering)
