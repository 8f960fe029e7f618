# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The dual-state delta rule by the Triton kernels of dual_state_kernels.py, with a backward pass that recomputes.

Import this module only where Triton is wanted; it needs the package.
"""

from __future__ import annotations

import torch

from lalm.modeling.ops.autograd import differentiable_by
from lalm.modeling.ops.delta.dual_recurrence import DualInputs, recurrent_dual
from lalm.modeling.ops.delta.dual_state_gradients import gate_gradients, pair_gradients, state_gradients
from lalm.modeling.ops.delta.dual_state_kernels import interpreted, prepare, read_out, scan, scan_back
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout

# Rows of a chunk, its tokens times their memories: four warps of 16.
_ROWS = 64
# Columns of V that a program of a scan holds; the fewest while there are fewer programs than a large GPU has cores,
# for long keys, and where gradients fill the registers.
_COLUMNS, _FEWEST, _PROGRAMS = 32, 16, 128
_LONGEST_KEY = 256


def _precision(*tensors: torch.Tensor) -> str:
    """Of the matrix products. What is bfloat16 or float16 loses nothing in TF32; float32 takes three such products."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if any(x.dtype == torch.float32 for x in tensors) else "tf32"


class _Launch:
    """Runs the kernels on inputs of one shape, and makes the buffers that they share."""

    def __init__(self, q, k, v, g, scale, delta, chunk_size):
        batch, length, heads, key_size = q.shape
        value_size, memories = v.shape[-1], g.shape[-1]
        sequences, rows = batch * heads, memories * chunk_size
        self.chunks = sequences * -(-length // chunk_size)
        self.scale, self.delta, self.like = scale, delta, g
        few = sequences * -(-value_size // _COLUMNS) < _PROGRAMS
        columns = _FEWEST if few or value_size <= _FEWEST or key_size > _LONGEST_KEY // 2 else _COLUMNS
        blocks = -(-value_size // columns)
        self.scans, self.reads = (sequences, blocks), (self.chunks, blocks)
        precision = _precision(q, k, v)
        self.of_gates = {"length": length, "heads": heads, "M": memories, "C": chunk_size, "PRECISION": precision}
        self.of_keys = self.of_gates | {"key_size": key_size, "BK": max(16, 1 << (key_size - 1).bit_length())}
        self.of_values = self.of_keys | {"value_size": value_size, "BV": columns}
        self.pairs, self.scores = (rows, rows), (rows, chunk_size)
        self.factors, self.shares = (2 * memories + 2, rows), (2 * memories + 4, rows)
        self.states, self.updates = (memories, key_size, value_size), (rows, value_size)
        self.ends = (sequences, *self.states)

    def buffer(self, shape):
        return self.like.new_empty(self.chunks, *shape)

    def prepare(self, q, k, g, beta, read, leak, starts, keep_between=False):
        """factors, solve, scores, between."""
        solve = self.buffer(self.pairs) if self.delta else None
        between = self.buffer(self.pairs) if keep_between else None
        made = (self.buffer(self.factors), solve, self.buffer(self.scores), between)
        prepare[(self.chunks,)](
            q, k, g, beta, read, leak, starts, *made, scale=self.scale, DELTA=self.delta, num_warps=8, **self.of_keys
        )
        return made

    def scan(self, k, v, beta, factors, solve, initial):
        """The states that enter the chunks, U, and the last states."""
        made = (self.buffer(self.states), self.buffer(self.updates), self.like.new_empty(self.ends))
        scan[self.scans](k, v, beta, factors, solve, initial, *made, DELTA=self.delta, num_stages=2, **self.of_values)
        return made

    def read_out(self, q, factors, scores, entering, updates):
        o = self.like.new_empty(*q.shape[:3], self.states[-1])
        warps = max(1, self.scores[1] // 16)
        read_out[self.reads](q, factors, scores, entering, updates, o, num_warps=warps, **self.of_values)
        return o

    def scan_back(self, q, k, beta, factors, solve, scores, d_o, d_final):
        """The gradients of the states that leave the chunks, dR, and the gradients of the first states."""
        made = (self.buffer(self.states), self.buffer(self.updates), self.like.new_empty(self.ends))
        tensors = (q, k, beta, factors, solve, scores, d_o, d_final, *made)
        scan_back[self.scans](*tensors, DELTA=self.delta, num_stages=2, **self.of_values)
        return made

    def gradients(self, inputs, starts, factors, between, entering, leaving, updates, errors, d_o):
        q, k, v, g, beta, read, leak = inputs
        d_q, d_k, d_v, d_g, d_beta, d_read, d_leak = (torch.empty_like(x) for x in inputs)
        shares = (torch.empty_like(q, dtype=g.dtype), torch.empty_like(k, dtype=g.dtype), self.buffer(self.shares))
        options = self.of_values | {"BV": _FEWEST, "scale": self.scale, "DELTA": self.delta}
        options |= {"num_warps": 8, "num_stages": 1}
        gates, states = (beta, read, leak), (entering, leaving, updates, errors)
        state_gradients[(self.chunks,)](q, k, v, *gates, factors, *states, d_o, d_v, *shares, **options)
        d_between, given = torch.empty_like(between), (factors, between, updates, errors, d_o, *shares)
        pair_gradients[(self.chunks,)](q, k, *gates, *given, d_q, d_k, d_beta, d_between, **options)
        of_reach, d_gates = (factors, between, d_between, shares[2]), (d_g, d_read, d_leak)
        gate_gradients[(self.chunks,)](g, read, leak, starts, *of_reach, *d_gates, scale=self.scale, **self.of_gates)
        return d_q, d_k, d_v, d_g, d_beta, d_read, d_leak


def _plain(ctx, q, k, v, g, beta, read, leak, state, starts) -> tuple[torch.Tensor, torch.Tensor]:
    layout = SequenceLayout(segments=None if starts is None else starts.cumsum(1))
    x = DualInputs(q, k, v, g, beta, read, leak)
    return recurrent_dual(x, ctx.launch.scale, state, layout, ctx.launch.delta)


class _TritonDual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, delta, chunk_size, *tensors):
        q, k, v, g, beta, read, leak, state, starts = tensors
        ctx.launch = launch = _Launch(q, k, v, g, scale, delta, chunk_size)
        with torch.cuda.device_of(q):
            factors, solve, scores, _ = launch.prepare(q, k, g, beta, read, leak, starts)
            entering, updates, final = launch.scan(k, v, beta, factors, solve, state)
            o = launch.read_out(q, factors, scores, entering, updates)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return o, final.view(q.shape[0], q.shape[2], *final.shape[1:])

    @staticmethod
    @differentiable_by(_plain, constants=3)
    def backward(ctx, d_o, d_final):
        *inputs, state, starts = ctx.saved_tensors
        (q, k, v, g, beta, read, leak), launch = inputs, ctx.launch
        d_o = g.new_zeros(v.shape) if d_o is None else d_o.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        with torch.cuda.device_of(q):
            factors, solve, scores, between = launch.prepare(q, k, g, beta, read, leak, starts, keep_between=True)
            entering, updates, _ = launch.scan(k, v, beta, factors, solve, state)
            leaving, errors, d_state = launch.scan_back(q, k, beta, factors, solve, scores, d_o, d_final)
            found = launch.gradients(inputs, starts, factors, between, entering, leaving, updates, errors, d_o)
        return None, None, None, *found, None if state is None else d_state.view(state.shape), None


def triton_dual(
    x: DualInputs, scale: float, state: torch.Tensor | None, layout: SequenceLayout, use_delta_rule: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` by Triton kernels; states and sums are float32.

    Raises:
        RuntimeError: tensors on the CPU (but for Triton's interpreter, TRITON_INTERPRET=1), float64, keys of more than
            256 channels, or a number of memories that is not 1, 2 or 4.
    """
    memories = x.g.shape[-1]
    fits = memories in (1, 2, 4) and x.q.shape[-1] <= _LONGEST_KEY
    fits = fits and compute_dtype(*x) == torch.float32
    if not fits or (x.q.device.type == "cpu" and not interpreted()):
        raise RuntimeError(
            f"The Triton kernels need a GPU, no float64, 1, 2 or 4 memories per head and keys of at most "
            f"{_LONGEST_KEY} channels. Use linear_attn_implementation='auto'."
        )
    tensors = [y.contiguous() for y in x[:3]] + [y.float().contiguous() for y in x[3:]]
    state = None if state is None else state.float().contiguous()
    starts = layout.starts()
    starts = None if starts is None else starts.to(torch.uint8).contiguous()
    return _TritonDual.apply(float(scale), bool(use_delta_rule), _ROWS // memories, *tensors, state, starts)
