# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The matrix products of a model's layers by the library that is fastest on this CPU, as in lalm's own layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lalm.modeling.ops.dense.matrix_product import linear
from lalm.modeling.ops.dispatch import FEW_ROWS, product_dtype


class _FastProducts(TorchFunctionMode):
    """Sends the linear layers in its context to `matrix_product.linear`; in float32 where the processor has no
    arithmetic for the 16-bit type of the weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        return self._linear(*args, **(kwargs or {}))

    @staticmethod
    def _linear(input, weight, bias=None):  # by the names that callers may use
        dtype = weight.dtype if torch.is_autocast_enabled("cpu") else product_dtype(input, weight.dtype)
        if dtype == weight.dtype or input.dtype != weight.dtype:
            return linear(input, weight, bias)
        bias = None if bias is None else bias.to(dtype)
        return linear(input.to(dtype), weight.to(dtype), bias).to(weight.dtype)


def layer_forward(original: Callable) -> Callable:
    """The forward of a decoder layer with fast products on the CPU. It is the whole layer's, so that a checkpointed
    layer runs again as it ran before. For few tokens (decoding) looking at every call costs more than it gains."""

    @wraps(original)
    def forward(self, hidden_states, *args, **kwargs):
        is_few = hidden_states.numel() < FEW_ROWS * hidden_states.shape[-1]
        if is_few or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            return original(self, hidden_states, *args, **kwargs)
        with _FastProducts():
            return original(self, hidden_states, *args, **kwargs)

    return forward
