"""The table of recurrences under test, their inputs, and one quadratic oracle that shares no code with the ops.

A new op with the shape `S_t = decay * S_{t-1} + k_t v_t^T` adds a row to CASES and inherits every test in this folder.
Letters: B batch, T time, H heads, K key width, V value width, R rows of the state (V, or V + 1 with the normaliser).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lalm.modeling.ops.delta.delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    recurrent_delta_rule,
    recurrent_gated_delta_rule,
)
from lalm.modeling.ops.delta.kda import chunk_kda, recurrent_kda
from lalm.modeling.ops.diagonal.gla import chunk_gla, recurrent_gla
from lalm.modeling.ops.diagonal.linear_attention import chunk_linear_attention, recurrent_linear_attention
from lalm.modeling.ops.diagonal.retention import chunk_retention, recurrent_retention

EPS = 1e-6


@dataclass(frozen=True)
class OpCase:
    """One op in one configuration. `gate` is "none", "head" (g [B,T,H]), "key" (g [B,T,H,K]) or "fixed" (no argument,
    log(1 - 2^(-5 - h)) for every token of head h)."""

    name: str
    recurrent: Callable
    chunk: Callable
    gate: str
    normalize: bool = False
    options: dict = field(default_factory=dict)
    strongest_write: float | None = None  # of a delta rule, which takes beta: 1, or 2 for negative eigenvalues

    @property
    def takes_g(self):
        return self.gate in ("head", "key")

    def log_decay(self, x):
        """What a token leaves of the state, as a natural log that broadcasts over [B, T, H, K]."""
        if self.gate == "fixed":
            per_head = [math.log(1 - 2.0 ** (-5 - h)) for h in range(x["q"].shape[2])]
            return torch.tensor(per_head, dtype=torch.float64)[:, None]
        if x["g"] is None:
            return torch.zeros(1, dtype=torch.float64)
        return x["g"][..., None] if self.gate == "head" else x["g"]


def _linear(name, gate, normalize):
    forms = (recurrent_linear_attention, chunk_linear_attention)
    return OpCase(name, *forms, gate, normalize, {"normalize": normalize})


CASES = (
    _linear("linear", "none", False),
    _linear("linear_gated", "head", False),
    _linear("linear_normalized", "none", True),
    _linear("linear_normalized_gated", "head", True),
    OpCase("gla", recurrent_gla, chunk_gla, "key"),
    OpCase("retention", recurrent_retention, chunk_retention, "fixed"),
    OpCase("delta", recurrent_delta_rule, chunk_delta_rule, "none", strongest_write=1.0),
    OpCase("delta_negative", recurrent_delta_rule, chunk_delta_rule, "none", strongest_write=2.0),
    OpCase("delta_gated", recurrent_gated_delta_rule, chunk_gated_delta_rule, "head", strongest_write=2.0),
    OpCase("kda", recurrent_kda, chunk_kda, "key", strongest_write=1.0),
)
CASE_IDS = [case.name for case in CASES]


def make_inputs(case, length, batch=2, heads=3, key=5, value=7, dtype=torch.float64, seed=0):
    """q, k, v, g and an initial state. Normalised cases get positive features, as a feature map would give."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    x = {"q": rand(batch, length, heads, key), "k": rand(batch, length, heads, key)}
    x["v"] = rand(batch, length, heads, value)
    gate_shape = {"head": (batch, length, heads), "key": (batch, length, heads, key)}.get(case.gate)
    # Decays from 0.999 to 0.05 a step, so that near and far past both matter.
    x["g"] = None if gate_shape is None else -(2 * rand(*gate_shape) - 2).exp().clamp(1e-3, 3.0)
    x["initial_state"] = rand(batch, heads, key, value + case.normalize)
    if case.strongest_write:
        x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
        x["beta"] = case.strongest_write * rand(batch, length, heads).sigmoid()
    if case.normalize:
        x["q"], x["k"] = (torch.nn.functional.elu(x[name]) + 1 for name in ("q", "k"))
        x["initial_state"][..., -1].abs_()
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = {"initial_state": state_dtype}
    return {n: None if t is None else t.to(dtypes.get(n, dtype)) for n, t in x.items()}


def tensors(case, x):
    """What the ops of the case take before `scale`, in order."""
    gate = [] if case.gate == "fixed" or (case.strongest_write and case.gate == "none") else [x["g"]]
    return (x["q"], x["k"], x["v"], *gate, *([x["beta"]] if case.strongest_write else []))


def call(fn, case, x, **kwargs):
    """`fn` on the inputs `x`, with the options of the case; returns (o, final_state)."""
    return fn(*tensors(case, x), initial_state=x.get("initial_state"), output_final_state=True,
              **case.options, **kwargs)  # fmt: skip


def quadratic(case, x, scale=None, mask=None, segments=None):
    """The attention-matrix form: W_ij = sum_k q_ik k_jk exp(G_ik - G_jk) for real j <= i of the same document.

    Written from the definitions (systems.md 2.1 and 4.1), dense in [T, T, K], for tiny sizes only.
    """
    if case.strongest_write:
        return transitions(case, x, scale, mask, segments)
    q, k, v = x["q"], x["k"], x["v"]
    length = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = case.log_decay(x).expand_as(k)
    real = torch.ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    total = (g * real[..., None, None]).cumsum(1)

    document = torch.zeros(q.shape[:2], dtype=torch.long)
    if segments is not None:
        document[:, 1:] = (segments.diff(dim=1) != 0).cumsum(1)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, :]
    seen = (seen & (document[:, :, None] == document[:, None, :]))[..., None, None]

    exponent = (total[:, :, None] - total[:, None]).masked_fill(~seen, -torch.inf)
    weights = torch.einsum("bihk,bjhk,bijhk->bijh", q * scale, k, exponent.exp())
    ones = v.new_ones(*v.shape[:-1], 1)
    values = torch.cat([v, ones], -1) if case.normalize else v
    out = torch.einsum("bijh,bjhr->bihr", weights, values)

    last = seen[:, -1, :, 0, 0]
    decay = (total[:, -1:] - total).exp() * last[..., None, None]
    final = torch.einsum("bjhk,bjhk,bjhr->bhkr", k, decay, values)
    if x.get("initial_state") is not None:
        first = (document == 0)[..., None, None]
        out = out + torch.einsum("bihk,bhkr->bihr", q * scale * total.exp() * first, x["initial_state"])
        final = final + (first[:, -1] * total[:, -1].exp())[..., None] * x["initial_state"]
    if case.normalize:
        out = out[..., :-1] / (out[..., -1:] + EPS)
    return out, final


def transitions(case, x, scale, mask, segments):
    """The delta rule by its transition matrices: o_i = sum_j q_i . A_i ... A_{j+1} (beta_j k_j v_j^T), each product of
    A_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) carried along explicitly (arXiv 2412.06464, section 3.1; by channel,
    arXiv 2510.26692, eq. 1)."""
    q, k, v, beta = x["q"], x["k"], x["v"], x["beta"]
    batch, length, heads, keys = q.shape
    scale = keys**-0.5 if scale is None else scale
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    start = torch.zeros(batch, length, dtype=torch.bool)
    if segments is not None:
        start[:, 1:] = segments.diff(dim=1) != 0
    eye = torch.eye(keys, dtype=torch.float64)
    k_k = k[..., :, None] * k[..., None, :]
    decay = case.log_decay(x).expand(batch, length, heads, keys)[..., None, :].exp()
    step = torch.where(real[..., None, None, None], decay * (eye - beta[..., None, None] * k_k), eye)
    written = (real[..., None] * beta)[..., None, None] * k[..., :, None] * v[..., None, :]
    # What every token has written, and first what was there, as it stands at the present token.
    parts = [torch.zeros(batch, heads, keys, v.shape[-1], dtype=torch.float64)]
    if x.get("initial_state") is not None:
        parts[0] = x["initial_state"]
    outputs = []
    for i in range(length):
        reset = start[:, i, None, None, None]
        parts = [step[:, i] @ part.masked_fill(reset, 0) for part in parts] + [written[:, i]]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, i] * scale, torch.stack(parts).sum(0)))
    return torch.stack(outputs, 1), torch.stack(parts).sum(0)


def gradients(fn, x, out_weight, state_weight):
    """d(<o, out_weight> + <final_state, state_weight>) for every floating input; `fn` maps x to (o, final_state)."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items() if t is not None}
    out, final = fn({name: leaves.get(name) for name in x})
    loss = (out.to(out_weight) * out_weight).sum() + (final.to(state_weight) * state_weight).sum()
    return (
        out.detach(),
        final.detach(),
        dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)),
    )


def relative_error(actual, expected, floor=1e-30):
    """max |actual - expected| over max(|expected|, floor), in float64. NaN gives NaN, which fails every `<`."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(floor)).item()
