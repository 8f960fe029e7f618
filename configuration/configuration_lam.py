# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of LAM, the hierarchical dual-state delta-rule encoder."""

from dataclasses import field
from typing import Literal

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LalmConfig


@strict
class LamConfig(LalmConfig):
    """LAM in the shape of MiniLM-L6 (6 layers of width 384, 12 heads, post-norm): a sentence encoder of 24M weights.

    It reads both sides unless `is_causal=True`, and has no length limit unless positions are learned. Every part of
    the design has a switch, so that its worth can be measured.

    Args:
        num_memories: memories per head: 2 (fast and slow), or 1 (a gated delta rule).
        decay_init: how much each memory keeps from token to token before training, fast one first; in (0, 1).
        use_adaptive_decay: decays that depend on the token; False leaves one learned constant per head and memory.
        use_flux: share the write out between the memories by the resonance flux psi = sigmoid(k^T M v + b); False
            writes to both in full.
        use_leak: let the memories take from each other, by a share that depends on the token and is at most a half.
        use_delta_rule: write the error v - S^T k; False writes v itself (plain linear attention).
        use_output_norm: RMSNorm on the output of every head.
        use_output_gate: multiply the output by `sigmoid(x W)`.
    """

    model_type = "lalm_lam"
    supports_bidirectional = True
    implementations = ("auto", "chunk", "recurrent", "triton", "cpp")
    table_size = 512

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    mlp_type: Literal["gated", "mlp"] = "mlp"
    norm_type: Literal["rmsnorm", "layernorm"] = "layernorm"
    norm_eps: float = 1e-12
    use_short_conv: bool = True
    is_causal: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    num_memories: int = 2
    decay_init: list[float] = field(default_factory=lambda: [0.5, 0.999])
    use_adaptive_decay: bool = True
    use_flux: bool = True
    use_leak: bool = True
    use_delta_rule: bool = True
    use_output_norm: bool = True
    use_output_gate: bool = True

    def validate_memories(self) -> None:
        if self.num_memories not in (1, 2):
            raise ValueError(f"num_memories must be 1 or 2, got {self.num_memories}.")
        if len(self.decay_init) != self.num_memories or not all(0 < decay < 1 for decay in self.decay_init):
            raise ValueError(
                f"decay_init must hold num_memories = {self.num_memories} numbers between 0 and 1, got "
                f"{self.decay_init}."
            )
        if self.num_memories == 1 and (self.use_flux or self.use_leak):
            raise ValueError("One memory has no flux and no leak: set use_flux=False and use_leak=False.")
