# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The dual-state delta rule by the kernels of dual_state_kernels.py, with a backward pass that recomputes.

Import this module only where Triton is wanted; it needs the package.
"""

from __future__ import annotations

import torch

from lalm.modeling.ops.diagonal_recurrence import compute_dtype
from lalm.modeling.ops.dual_state_kernels import gradients, interpreted, prepare, read_out, scan, scan_back, triton

# Tokens of a chunk. More of them mean fewer steps of the scans and larger triangular systems.
_CHUNK_SIZE = 32
# Columns of V that one program of a scan holds.
_COLUMNS = 32


class _Launch:
    """Runs the kernels on inputs of one shape, and makes the buffers that they share."""

    def __init__(self, q, v, g, scale, delta, chunk_size):
        batch, self.length, self.heads, self.key_size = q.shape
        self.value_size, self.memories, self.chunk_size = v.shape[-1], g.shape[-1], chunk_size
        self.rows, self.chunks = batch * self.heads, batch * self.heads * triton.cdiv(self.length, chunk_size)
        self.scale, self.delta, self.like = scale, delta, g
        columns = max(16, min(_COLUMNS, triton.next_power_of_2(self.value_size)))
        self.blocks = triton.cdiv(self.value_size, columns)
        # Of bfloat16 and float16, products of TF32 lose nothing.
        self.of_keys = {
            "M": self.memories,
            "C": chunk_size,
            "BK": max(16, triton.next_power_of_2(self.key_size)),
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }
        self.of_values = self.of_keys | {"BV": columns}
        self.sizes = (self.length, self.heads, self.key_size, self.value_size)

    def buffer(self, *shape):
        return self.like.new_empty(self.chunks, *shape)

    def prepare(self, q, k, g, beta, read, leak, starts, keep_between=False):
        """factors, solve, scores, between."""
        pairs = (self.memories, self.memories, self.chunk_size, self.chunk_size)
        made = (
            self.buffer(2 * self.memories**2 + self.memories + 1, self.chunk_size),
            self.buffer(*pairs) if self.delta else None,
            self.buffer(*pairs[1:]),
            self.buffer(*pairs) if keep_between else None,
        )
        tensors = (q, k, g, beta, read, leak, starts, *made)
        prepare[(self.chunks,)](*tensors, self.scale, *self.sizes[:3], **self.of_keys, DELTA=self.delta, num_warps=2)
        return made

    def scan(self, k, v, beta, factors, solve, state):
        """The states that enter the chunks, the updates, and the last states."""
        states = (self.memories, self.key_size, self.value_size)
        made = (
            self.buffer(*states),
            self.buffer(self.memories, self.chunk_size, self.value_size),
            self.like.new_empty(self.rows, *states),
        )
        tensors = (k, v, beta, factors, solve, state, *made)
        scan[(self.rows, self.blocks)](*tensors, *self.sizes, **self.of_values, DELTA=self.delta, num_stages=2)
        return made

    def read_out(self, q, factors, scores, entering, updates):
        o = self.like.new_empty(*q.shape[:3], self.value_size)
        tensors = (q, factors, scores, entering, updates, o)
        read_out[(self.chunks, self.blocks)](*tensors, *self.sizes, **self.of_values)
        return o

    def scan_back(self, q, k, beta, factors, solve, scores, d_o, d_final):
        """The gradients of the states that leave the chunks, the errors, and the gradients of the first states."""
        states = (self.memories, self.key_size, self.value_size)
        made = (
            self.buffer(*states),
            self.buffer(self.memories, self.chunk_size, self.value_size),
            self.like.new_empty(self.rows, *states),
        )
        tensors = (q, k, beta, factors, solve, scores, d_o, d_final, *made)
        scan_back[(self.rows, self.blocks)](*tensors, *self.sizes, **self.of_values, DELTA=self.delta, num_stages=2)
        return made


class _TritonDual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, delta, chunk_size, q, k, v, g, beta, read, leak, state, starts):
        ctx.launch = launch = _Launch(q, v, g, scale, delta, chunk_size)
        with torch.cuda.device_of(q):
            factors, solve, scores, _ = launch.prepare(q, k, g, beta, read, leak, starts)
            entering, updates, final = launch.scan(k, v, beta, factors, solve, state)
            o = launch.read_out(q, factors, scores, entering, updates)
        ctx.save_for_backward(q, k, v, g, beta, read, leak, state, starts)
        ctx.set_materialize_grads(False)
        return o, final.view(q.shape[0], q.shape[2], *final.shape[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o, d_final):
        q, k, v, g, beta, read, leak, state, starts = ctx.saved_tensors
        launch, inputs = ctx.launch, (q, k, v, g, beta, read, leak)
        d_o = g.new_zeros(v.shape) if d_o is None else d_o.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        found = [torch.empty_like(x) for x in inputs]
        with torch.cuda.device_of(q):
            factors, solve, scores, between = launch.prepare(q, k, g, beta, read, leak, starts, keep_between=True)
            entering, updates, _ = launch.scan(k, v, beta, factors, solve, state)
            leaving, errors, d_state = launch.scan_back(q, k, beta, factors, solve, scores, d_o, d_final)
            tensors = (*inputs, starts, factors, between, entering, leaving, updates, errors, d_o, *found)
            options = {"DELTA": launch.delta, "num_warps": 8, "num_stages": 1}
            gradients[(launch.chunks,)](*tensors, launch.scale, *launch.sizes, **launch.of_values, **options)
        return None, None, None, *found, None if state is None else d_state.view(state.shape), None


def triton_dual(
    q, k, v, g, beta, read, leak, scale, state, layout, use_delta_rule=True, chunk_size=_CHUNK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` by Triton kernels; states and sums are float32.

    Raises:
        RuntimeError: float64, or tensors on the CPU (but for Triton's interpreter, TRITON_INTERPRET=1).
    """
    if q.device.type == "cpu" and not interpreted():
        raise RuntimeError("The Triton kernels run on a GPU, and the input is on the CPU: use chunk_dual_state_delta.")
    if compute_dtype(q, k, v, g, beta, read, leak) == torch.float64:
        raise RuntimeError("The Triton kernels have no float64: use chunk_dual_state_delta.")
    tensors = [x.contiguous() for x in (q, k, v)] + [x.float().contiguous() for x in (g, beta, read, leak)]
    state = None if state is None else state.float().contiguous()
    starts = layout.starts()
    starts = None if starts is None else starts.to(torch.uint8).contiguous()
    return _TritonDual.apply(float(scale), bool(use_delta_rule), chunk_size, *tensors, state, starts)
