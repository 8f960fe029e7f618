# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of retentive networks (Sun et al., arXiv 2307.08621)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LalmConfig


@strict
class RetNetConfig(LalmConfig):
    """Retention with the paper's proportions (section 3.1): heads of 256 keys and 512 values at the default width, an
    MLP half as wide as usual in return for the wide values, rotary positions.

    Args:
        use_output_gate: multiply the normed output by `swish(x W)`.
    """

    model_type = "lalm_retnet"
    supports_bidirectional = True

    expand_v: float | int = 2.0
    hidden_ratio: float | int = 2
    position_embedding_type: Literal["none", "learned", "sinusoidal", "rope"] = "rope"
    use_output_gate: bool = True
