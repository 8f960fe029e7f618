# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Configuration of DeltaNet (Yang et al., arXiv 2406.06484), gated (arXiv 2412.06464), and KDA (arXiv 2510.26692)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from lalm.configuration.configuration_base import LalmConfig


@strict
class DeltaNetConfig(LalmConfig):
    """DeltaNet with the defaults of its paper (section 4.1: short convolutions, SiLU, q and k of unit length).

    `decay="head"` makes it Gated DeltaNet, whose authors use `expand_v=2` and heads of size 256 besides;
    `decay="channel"` has the rule of Kimi delta attention.

    Args:
        decay: what lets the state decay: "none", or content-dependent factors of each token, one per "head" or one per
            "channel" of its keys.
        use_output_gate: multiply the normed output by `swish(x W)`, or with a decay per channel by a sigmoid of a
            projection of low rank with a bias; None means exactly when there is a decay.
        allow_neg_eigval: write strengths up to 2 instead of 1, which lets a state transition have negative eigenvalues
            and so track parity and the like (Grazzi et al., arXiv 2411.12537).
    """

    model_type = "lalm_delta_net"
    supports_bidirectional = True

    use_short_conv: bool = True
    decay: Literal["none", "head", "channel"] = "none"
    use_output_gate: bool | None = None
    allow_neg_eigval: bool = False

    def __post_init__(self, **kwargs):
        if self.use_output_gate is None:
            self.use_output_gate = self.decay != "none"
        super().__post_init__(**kwargs)
