# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Tensor parallelism by the machinery of transformers (`from_pretrained(tp_plan="auto")`), for its plan in the
configuration: every process holds some heads of each mixer and a part of each MLP.

What transformers has no style for is whole in every process and works for the process's own heads: the short
convolution (its channels are those of q, k and v side by side), LAM's gates, and GLA's low-rank gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def own_part(x: torch.Tensor, shard: tuple[int, int] | None, dim: int) -> torch.Tensor:
    """The part of `x` along an axis of heads that belongs to process `shard = (rank, size)`; all of it for None."""
    if shard is None:
        return x
    rank, size = shard
    return x.chunk(size, dim)[rank].contiguous()


def check_tensor_parallel(config: Any, size: int) -> None:
    """Raise ValueError with the reason why `size` processes cannot share the layers of a configuration."""
    if not config.base_model_tp_plan:
        raise ValueError(
            f"{config.model_type} has no tensor parallel plan: its layers mix heads of two kinds, or channels that "
            "belong to no head. Shard its weights (FSDP) or the batch (DDP) instead."
        )
    names = ["num_attention_heads", "intermediate_size"]
    names += ["num_key_value_heads"] if {"full_attention", "sliding_attention"} & set(config.layer_types) else []
    for name in names:
        if getattr(config, name) % size:
            raise ValueError(
                f"{name} = {getattr(config, name)} cannot be shared evenly by {size} processes (tp_size): choose a "
                "divisor of it."
            )


def register_styles() -> None:
    """Tell transformers the styles of ours that `LalmConfig.base_model_tp_plan` names."""
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce, TensorParallelLayer

    class OwnPart(ReplicatedWithGradAllReduce):
        """Weights are whole, and the module is told which part of the heads is its own."""

        def install_forward(self, module: Any, mesh: Any) -> nn.Module:
            module.shard = (mesh.get_local_rank(), mesh.size())
            return super().install_forward(module, mesh)

    class OwnHeads(OwnPart):
        """The same for a module that reads the hidden states, with all modules inside."""

        def __init__(self, slices_output: bool):
            self.slices_output = slices_output

        def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
            for part in module.modules():
                super().install_forward(part, mesh)
            return TensorParallelLayer.install_forward(self, module, mesh)

        def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
            x = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
            return (x.to_local(grad_placements=[Partial()]), *args[1:]), kwargs  # gradients are those of own heads

        def transform_output_post_forward(self, module, output, mesh):
            return own_part(output, module.shard, -1) if self.slices_output else output

    styles: dict[str, Any] = {
        "lalm_own_part": OwnPart(),
        "lalm_own_heads": OwnHeads(False),
        "lalm_own_outputs": OwnHeads(True),
    }
    for name, style in styles.items():
        ALL_PARALLEL_STYLES.register(name, style)
