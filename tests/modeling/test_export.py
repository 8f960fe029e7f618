# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""torch.export with a dynamic number of tokens and rows: one program for every length, below and above a chunk."""

import pytest
import torch
from torch import nn

from tests.modeling.exact import assert_close, tokens
from tests.variants import ROWS

pytestmark = pytest.mark.slow

# One row of each recurrence, and of each layer that looks at neighbours.
NAMES = (
    "linear_conv_qk_norm_rope",
    "gla_plain",
    "delta_net_gated",
    "delta_net_channel",
    "based_plain",
    "linear_hybrid_both",
    "lam_plain",
    "local_global_plain",
)
# `strict=True` traces Python code too, which takes longer: one row of each chunk form.
STRICT = ("linear_conv_qk_norm_rope", "delta_net_gated")


class Logits(nn.Module):
    """What is exported of a model: ids `[B, T]` -> logits `[B, T, V]`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("row", "strict"),
    [pytest.param(row, False, id=row.name) for row in ROWS if row.name in NAMES]
    + [pytest.param(row, True, id=f"{row.name}-strict") for row in ROWS if row.name in STRICT],
)
def test_one_program_for_every_length(row, strict):
    model = Logits(row.build(max_position_embeddings=256))
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(2, 9),), dynamic_shapes=shapes, strict=strict).module()
        for batch, length in ((2, 9), (3, 21), (1, 64), (2, 130)):
            ids = tokens(batch, length)
            assert_close(program(ids), model(ids), f"{batch} x {length}")
