# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Linear-attention models for the Hugging Face ecosystem; importing lalm registers them with the Auto classes."""

from __future__ import annotations

from typing import NamedTuple

import transformers

from lalm.configuration.configuration_base import LalmConfig
from lalm.configuration.configuration_based import BasedConfig
from lalm.configuration.configuration_delta_net import DeltaNetConfig
from lalm.configuration.configuration_gla import GLAConfig
from lalm.configuration.configuration_lam import LamConfig
from lalm.configuration.configuration_linear_attention import LinearAttentionConfig
from lalm.configuration.configuration_local_global import LocalGlobalConfig
from lalm.configuration.configuration_retnet import RetNetConfig
from lalm.inspection import HeadReport, Inspection, inspect
from lalm.modeling.modeling_base import LalmPreTrainedModel
from lalm.modeling.modeling_based import (
    BasedForCausalLM,
    BasedForSequenceClassification,
    BasedForTokenClassification,
    BasedModel,
)
from lalm.modeling.modeling_delta_net import (
    DeltaNetForCausalLM,
    DeltaNetForMaskedLM,
    DeltaNetForSequenceClassification,
    DeltaNetForTokenClassification,
    DeltaNetModel,
)
from lalm.modeling.modeling_gla import (
    GLAForCausalLM,
    GLAForMaskedLM,
    GLAForSequenceClassification,
    GLAForTokenClassification,
    GLAModel,
)
from lalm.modeling.modeling_lam import (
    LamForCausalLM,
    LamForMaskedLM,
    LamForSequenceClassification,
    LamForTokenClassification,
    LamModel,
)
from lalm.modeling.modeling_linear_attention import (
    LinearAttentionForCausalLM,
    LinearAttentionForMaskedLM,
    LinearAttentionForSequenceClassification,
    LinearAttentionForTokenClassification,
    LinearAttentionModel,
)
from lalm.modeling.modeling_local_global import (
    LocalGlobalForCausalLM,
    LocalGlobalForMaskedLM,
    LocalGlobalForSequenceClassification,
    LocalGlobalForTokenClassification,
    LocalGlobalModel,
)
from lalm.modeling.modeling_retnet import (
    RetNetForCausalLM,
    RetNetForMaskedLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
)
from lalm.transformers_models import use_in_transformers

__version__ = "0.1.0"


class Variant(NamedTuple):
    """A configuration class and, by the name of the Auto class that builds it, each of its models."""

    config: type[LalmConfig]
    models: dict[str, type[LalmPreTrainedModel]]


VARIANTS = (
    Variant(
        LinearAttentionConfig,
        {
            "AutoModel": LinearAttentionModel,
            "AutoModelForCausalLM": LinearAttentionForCausalLM,
            "AutoModelForMaskedLM": LinearAttentionForMaskedLM,
            "AutoModelForSequenceClassification": LinearAttentionForSequenceClassification,
            "AutoModelForTokenClassification": LinearAttentionForTokenClassification,
        },
    ),
    Variant(
        GLAConfig,
        {
            "AutoModel": GLAModel,
            "AutoModelForCausalLM": GLAForCausalLM,
            "AutoModelForMaskedLM": GLAForMaskedLM,
            "AutoModelForSequenceClassification": GLAForSequenceClassification,
            "AutoModelForTokenClassification": GLAForTokenClassification,
        },
    ),
    Variant(
        RetNetConfig,
        {
            "AutoModel": RetNetModel,
            "AutoModelForCausalLM": RetNetForCausalLM,
            "AutoModelForMaskedLM": RetNetForMaskedLM,
            "AutoModelForSequenceClassification": RetNetForSequenceClassification,
            "AutoModelForTokenClassification": RetNetForTokenClassification,
        },
    ),
    Variant(
        DeltaNetConfig,
        {
            "AutoModel": DeltaNetModel,
            "AutoModelForCausalLM": DeltaNetForCausalLM,
            "AutoModelForMaskedLM": DeltaNetForMaskedLM,
            "AutoModelForSequenceClassification": DeltaNetForSequenceClassification,
            "AutoModelForTokenClassification": DeltaNetForTokenClassification,
        },
    ),
    Variant(
        BasedConfig,
        {
            "AutoModel": BasedModel,
            "AutoModelForCausalLM": BasedForCausalLM,
            "AutoModelForSequenceClassification": BasedForSequenceClassification,
            "AutoModelForTokenClassification": BasedForTokenClassification,
        },
    ),
    Variant(
        LocalGlobalConfig,
        {
            "AutoModel": LocalGlobalModel,
            "AutoModelForCausalLM": LocalGlobalForCausalLM,
            "AutoModelForMaskedLM": LocalGlobalForMaskedLM,
            "AutoModelForSequenceClassification": LocalGlobalForSequenceClassification,
            "AutoModelForTokenClassification": LocalGlobalForTokenClassification,
        },
    ),
    Variant(
        LamConfig,
        {
            "AutoModel": LamModel,
            "AutoModelForCausalLM": LamForCausalLM,
            "AutoModelForMaskedLM": LamForMaskedLM,
            "AutoModelForSequenceClassification": LamForSequenceClassification,
            "AutoModelForTokenClassification": LamForTokenClassification,
        },
    ),
)

for _variant in VARIANTS:
    transformers.AutoConfig.register(_variant.config.model_type, _variant.config, exist_ok=True)
    for _auto_name, _model in _variant.models.items():
        getattr(transformers, _auto_name).register(_variant.config, _model, exist_ok=True)

__all__ = [
    "VARIANTS",
    "BasedConfig",
    "BasedForCausalLM",
    "BasedForSequenceClassification",
    "BasedForTokenClassification",
    "BasedModel",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetForMaskedLM",
    "DeltaNetForSequenceClassification",
    "DeltaNetForTokenClassification",
    "DeltaNetModel",
    "GLAConfig",
    "GLAForCausalLM",
    "GLAForMaskedLM",
    "GLAForSequenceClassification",
    "GLAForTokenClassification",
    "GLAModel",
    "HeadReport",
    "Inspection",
    "LalmConfig",
    "LalmPreTrainedModel",
    "LamConfig",
    "LamForCausalLM",
    "LamForMaskedLM",
    "LamForSequenceClassification",
    "LamForTokenClassification",
    "LamModel",
    "LinearAttentionConfig",
    "LinearAttentionForCausalLM",
    "LinearAttentionForMaskedLM",
    "LinearAttentionForSequenceClassification",
    "LinearAttentionForTokenClassification",
    "LinearAttentionModel",
    "LocalGlobalConfig",
    "LocalGlobalForCausalLM",
    "LocalGlobalForMaskedLM",
    "LocalGlobalForSequenceClassification",
    "LocalGlobalForTokenClassification",
    "LocalGlobalModel",
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetForMaskedLM",
    "RetNetForSequenceClassification",
    "RetNetForTokenClassification",
    "RetNetModel",
    "Variant",
    "__version__",
    "inspect",
    "use_in_transformers",
]
