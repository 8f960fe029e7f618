# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What PEFT has to know of our model types: the modules that an adapter takes where its user names none."""

import sys
from typing import NoReturn

# The norms that every configuration has: the last one of some models is an identity.
_NORMS = ["mixer_norm", "mlp_norm"]
# Projections with other names than Llama's: those of gated convolutions.
_OWN_PROJECTIONS = {"lalm_based": ["in_proj"]}


def tell_peft(model_type: str) -> None:
    """Enter `model_type` into PEFT's tables of defaults, if PEFT is loaded; what a user has entered stays. Our
    projections have the names of Llama's, and get its defaults."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            own = _OWN_PROJECTIONS.get(model_type, []) if "v_proj" in table["llama"] else []
            table.setdefault(model_type, _NORMS if "LNTUNING" in name else table["llama"] + own)
    constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.setdefault(model_type, _refuse_prefix)


def _refuse_prefix(past_key_values) -> NoReturn:
    raise ValueError(
        "Prefix tuning and cartridges put trained keys and values before the text, and linear attention keeps none: "
        "use PromptTuningConfig or PromptEncoderConfig, which train tokens before the text, or LoraConfig."
    )
