# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of gated linear attention (Yang et al., arXiv 2312.06635)."""

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LalmConfig


@strict
class GLAConfig(LalmConfig):
    """Gated linear attention with the paper's defaults (section 4.4 and table 5: 4 heads, keys of half the width).

    Args:
        gate_low_rank_dim: rank of the projection that makes the decay gates.
        gate_logit_normalizer: tau; a gate is `sigmoid(x W1 W2 + b) ** (1 / tau)`, so larger means slower decay.
        use_output_gate: multiply the normed output by `swish(x W)`.
    """

    model_type = "lalm_gla"
    supports_bidirectional = True

    expand_k: float | int = 0.5
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float | int = 16
    use_output_gate: bool = True

    def validate_gate(self) -> None:
        if self.gate_low_rank_dim < 1:
            raise ValueError(f"gate_low_rank_dim must be at least 1, got {self.gate_low_rank_dim}.")
        if self.gate_logit_normalizer <= 0:
            raise ValueError(f"gate_logit_normalizer must be positive, got {self.gate_logit_normalizer}.")
