# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The one place that decides which code runs: every threshold with its reason, and every choice between forms,
libraries and kernels.

A choice depends on the shapes, dtypes and device of a call, on what surrounds it (autograd, torch.compile, torch.func)
and, where a form is only safe for some numbers, on one look at them. It never depends on what has been compiled
before: with an empty and with a full kernel cache the same call runs the same code.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import operator
import os
from collections.abc import Callable, Mapping
from functools import cache, wraps

import torch
from transformers.utils import logging

from lalm.modeling.ops.autograd import has_open_length, hides_values, is_looked_into
from lalm.modeling.ops.cpp_kernels import HeadKernel, has_library, load_kernel
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout

# Under transformers' own logger, so that its verbosity settings hold.
logger = logging.get_logger("transformers.lalm")

# ---- Recurrences ----
# Tokens. For fewer, stepping through them is faster than preparing one chunk.
SHORT = 8
# State size per head, in numbers. Smaller states are not worth a kernel.
SMALLEST_STATE = 512
# Multiply-adds. A call with more of them earns the seconds of compiling a kernel for its size of head ...
EARNS_COMPILING = 1 << 21
# ... and counts as one of at least so many tokens, for those that will follow it.
TOKENS_TO_COME = 256
# Sum of log decays in a chunk. exp(60) leaves a factor of 10^12 below float32's largest number for products and sums;
# beyond it the chunk form takes exponents that are never positive.
MAX_DECAY = 60.0
# Log of a feature. Sums of numbers up to e^40 = 2e17 stay far from float32's largest; larger keys need a running
# scale.
MAX_LOG_FEATURE = 40.0
# Tokens of a bucket. Smaller buckets have more numbers in their sums than in their tokens.
SMALLEST_GRID = 16
# A token whose numbers exceed the mean of its chunk by this factor is large among them (see `chunks.running_sums`).
LARGE_TOKEN = 8.0
# Tokens of a text from which on an encoder's layer runs in segments if nothing keeps its activations, and tokens of a
# segment. Below, q, k and v of the whole text take little memory; segments project every token twice.
LONG_TEXT, SEGMENT_OF_TEXT = 1 << 14, 1 << 10
# Numbers of one set of pairwise matrices of the dual-state rule to work on at once: what a core's cache holds.
PAIRS_AT_ONCE = 1 << 19

# ---- Matrix products on the CPU ----
# Rows. With fewer, a product waits for the weights to come from memory, and our kernel streams them; where MKL is
# slow, so for short sequences.
FEW_ROWS, SHORT_SEQUENCE = 16, 64
# Numbers of a weight. A smaller one is in the cache anyway.
WORTH_STREAMING = 1 << 16
# Multiply-adds. oneDNN generates code for every new shape in 0.2 to 1 ms; smaller products do not earn that back.
EARNS_ONEDNN = 1 << 25
# A weight gradient with so many times more rows than columns is made transposed: oneDNN copies its first factor.
TALL = 4
# Logits of the chunked cross-entropy that exist at once: 64 MiB in float32.
LOGITS_AT_ONCE = 1 << 24
# Activations of an MLP that exist at once if no backward pass keeps them; if one does, their gradients come in pieces
# so many times larger, since every piece adds to the gradients of the weights.
WIDE_AT_ONCE, WIDER_WITH_GRADIENTS = 1 << 20, 4

# ---- Fused elementwise kernels on the CPU ----
# Numbers. For fewer, torch's operations cost no more than recording the kernel for a backward pass ...
WORTH_A_KERNEL = 1 << 16
# ... which nothing does without gradients: there the kernel of the norm pays for a single token, at 0.6 of the time of
# torch's five operations. Narrower models compile nothing for it.
WORTH_A_KERNEL_WITHOUT_GRADIENTS = 1 << 7
# Multiply-adds of a short convolution that are worth its kernel.
WORTH_A_CONV_KERNEL = 1 << 17
# Numbers of LAM's gates that are worth their kernel.
WORTH_A_GATE_KERNEL = 1 << 9
# Numbers that are worth more than one thread; of LAM's gates, each of which takes longer.
WORTH_THREADS, GATES_WORTH_THREADS = 1 << 16, 1 << 14

# The CPU features that compute with a 16-bit type.
_INSTRUCTIONS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def choose(
    rule: str,
    implementation: str,
    q: torch.Tensor,
    v: torch.Tensor,
    forms: Mapping[str, Callable],
    kernel: HeadKernel | None = None,
) -> str:
    """The name of the form in which a rule runs.

    Args:
        rule: the name of the op, for the log.
        implementation: "auto" takes "cpp" for heads that are worth `kernel`, else "recurrent" for a few tokens
            (decoding), else "fla" for 16-bit values on a GPU if flash-linear-attention is installed (`lalm[gpu]`) and
            nothing is being compiled, else "chunk". The name of a form takes that form whatever the input.
        q: queries `[B, T, H, K]` as the form gets them.
        v: values `[B, T, H, V]` in the dtype of the model.
        forms: what there is of "recurrent", "chunk", "fla", "triton" and "cpp".
        kernel: the C++ kernel that "cpp" runs on, None if there is none for this call.

    Raises:
        ValueError: "fla" or "triton" for tensors that are not on a GPU, or a form that does not exist for this call.
    """
    runs = kernel is not None and _runs_kernel(kernel, q, must_pay=implementation == "auto")
    name = implementation
    if name == "auto":
        is_short = not has_open_length() and v.shape[1] < SHORT
        name = "cpp" if runs else "recurrent" if is_short else "chunk"
        if name == "chunk" and "fla" in forms and _is_for_fla(v):
            name = "fla"
    if name in ("fla", "triton") and not _reaches_gpu(name, v):
        raise ValueError(
            f"linear_attn_implementation={name!r} runs Triton kernels on a GPU, and the input is on the CPU: move the "
            "model to the GPU or set linear_attn_implementation='auto'."
        )
    if not torch.compiler.is_compiling():
        _announce(rule, name, implementation, v.device.type)
    if name not in forms or (name == "cpp" and not runs):
        reason = f"no {name} kernel for a GPU"
        if name == "cpp":
            reason = (
                "no C++ kernel here, which needs the CPU, a C++ compiler, float32 or less, and heads with a state of "
                f"at least {SMALLEST_STATE} numbers"
            )
        raise ValueError(
            f"linear_attn_implementation={name!r}: {rule} has {reason}; set linear_attn_implementation='auto'."
        )
    return name


def in_form(op: Callable, form: str) -> Callable:
    """`op` with its argument `implementation` fixed: one of the field's pair `recurrent_<rule>` and `chunk_<rule>`."""

    @wraps(op)
    def run(*args, **kwargs):
        return op(*args, implementation=form, **kwargs)

    signature = inspect.signature(op)
    fixed = ("implementation",) if form == "chunk" else ("implementation", "chunk_size")
    kept = [x for x in signature.parameters.values() if x.name not in fixed]
    run.__name__ = run.__qualname__ = f"{form}_{op.__name__}"
    run.__doc__ = f"`{op.__name__}` with `implementation={form!r}`; same arguments and results."
    run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return run


def _runs_kernel(kernel: HeadKernel, q: torch.Tensor, must_pay: bool) -> bool:
    """Whether the C++ kernel runs for heads like those of `q [B, T, H, K]`, in a graph that is compiled too; not in a
    program that is exported, which is to run where there is none."""
    if kernel.state_size < SMALLEST_STATE or not q.is_cpu or q.dtype == torch.float64:
        return False
    if torch.compiler.is_exporting() or is_looked_into():
        return False
    batch, length, heads = q.shape[:3]
    work = batch * max(length, TOKENS_TO_COME) * heads * kernel.state_size
    if must_pay and work < EARNS_COMPILING:
        return False
    sizes = kernel.sizes
    if torch.compiler.is_compiling():  # a graph for open sizes of heads would need a kernel for each
        sizes = tuple((name, operator.index(size)) for name, size in sizes)
    return has_library(kernel.name, sizes)


def _reaches_gpu(name: str, v: torch.Tensor) -> bool:
    """Whether GPU kernels run for `v`: it is not on the CPU, or Triton interprets its kernels there."""
    return v.device.type != "cpu" or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1")


@cache
def has_fla() -> bool:
    """Whether flash-linear-attention and Triton are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def _is_for_fla(v: torch.Tensor) -> bool:
    """Whether to use the kernels of flash-linear-attention for `v`: half precision, on CUDA, not under torch.compile.
    They would round float32 to TF32, which torch does only when asked to, and a compiled graph breaks at them."""
    is_half = v.dtype in (torch.bfloat16, torch.float16)
    return v.device.type == "cuda" and is_half and not torch.compiler.is_compiling() and has_fla()


@cache
def _announce(rule: str, name: str, implementation: str, device: str) -> None:
    logger.info(f"{rule}: the {name} form runs on {device} (linear_attn_implementation={implementation!r}).")


def tokens_of_segments(hidden_states: torch.Tensor, layout: SequenceLayout) -> int | None:
    """Tokens of a segment if a layer that reads in both directions is to take `hidden_states [B, T, D]` in segments,
    None for all at once: texts are long, nothing records gradients, and there is neither padding nor a boundary."""
    if torch.is_grad_enabled() or hides_values() or hidden_states.shape[1] < LONG_TEXT:
        return None
    return SEGMENT_OF_TEXT if layout.mask is None and layout.segments is None else None


# ---- Choices that take one look at the numbers ----


@torch.no_grad()
def chunks_of_decays(g: torch.Tensor | None, chunk_size: int) -> tuple[int, bool]:
    """The size of chunks for log decays `g [B, T, H, D]`, and whether exp of their sums can be factored: in chunks as
    asked for, else in quarters of them. While compiling, which allows no look, the bounded form serves every gate."""
    if g is None or g.numel() == 0:
        return chunk_size, True
    if not hides_values():
        for size in (chunk_size, chunk_size // 4):
            if size and _strongest_decay(g, size) <= MAX_DECAY:
                return size, True
    return chunk_size, False


def _strongest_decay(g: torch.Tensor, size: int) -> float:
    missing = -g.shape[1] % size
    windows = torch.nn.functional.pad(g, (0, 0, 0, 0, 0, missing)) if missing else g
    return -windows.unflatten(1, (-1, size)).sum(2, dtype=compute_dtype(g)).min().item()


@torch.no_grad()
def needs_no_scale(log_features: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether sums of exp(log_features) are safe as they are, on top of a state with the log `scale`. While compiling,
    which allows no look, the answer is no."""
    if hides_values():
        return False
    if log_features.numel() == 0:
        return True
    outside = log_features.amax() > MAX_LOG_FEATURE
    return not bool(outside if scale is None else outside | scale.any())


@torch.no_grad()
def must_separate(layout: SequenceLayout, *tensors: torch.Tensor | None) -> bool:
    """Whether documents must not meet in one product, where those of others get the weight 0: NaN and infinity would
    reach them. It looks only where documents are packed and a look is allowed."""
    if layout.segments is None or hides_values():
        return False
    # A sum is finite if all numbers are (or overflows, which costs time only); float32 holds more of 16-bit numbers.
    sums = [x.sum(dtype=None if x.dtype == torch.float64 else torch.float32) for x in tensors if x is not None]
    return not all(bool(total.isfinite()) for total in sums)


def no_token_is_large(sizes: torch.Tensor) -> bool:
    """Whether the sizes `[..., C, 1]` of the tokens of every chunk are known to be of one order. Elsewhere than on a
    CPU a look would cost more than it saves."""
    if sizes.device.type != "cpu" or hides_values():
        return False
    return bool((sizes.amax(-2) <= LARGE_TOKEN * sizes.mean(-2)).all())


def may_hold(condition: torch.Tensor) -> bool:
    """Whether a condition holds for any row, or might, where a look is not allowed or costs more than it saves."""
    return hides_values() or condition.device.type != "cpu" or bool(condition.any())


def chunks_at_once(pairs: int, chunks: int) -> int | None:
    """How many chunks with so many pairs of tokens each the dual-state rule works on at once; None for all."""
    if has_open_length() or chunks == 1 or pairs * chunks <= PAIRS_AT_ONCE or not pairs:
        return None
    return max(1, PAIRS_AT_ONCE // pairs)


# ---- Matrix products ----


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor computes with numbers of `dtype`; True where nothing is known of it."""
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if found.get("architecture") != "x86_64" or dtype not in _INSTRUCTIONS:
        return True
    return any(found.get(name) for name in _INSTRUCTIONS[dtype])


def product_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to multiply `x [..., D]` with a matrix if the caller asks for `dtype`.

    An x86 processor without instructions for bfloat16 or float16 unpacks each number for every product it enters: a
    product is then 4 (bfloat16) to 10 times (float16) slower than one of both factors cast to float32, which also
    rounds less. A few rows wait for the weights, which casting only delays.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < FEW_ROWS * x.shape[-1]:
        return dtype
    return dtype if has_instructions(dtype) else torch.float32


@cache
def mkl_is_slow() -> bool:
    """Whether MKL leaves this processor's widest registers idle and oneDNN is at hand, as far as is known."""
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()
    idle = found.get("avx512_f") and "AMD" in found.get("cpu_name", "") and torch.backends.mkl.is_available()
    return bool(idle and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def product_library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> ctypes.CDLL | str | None:
    """By what to multiply `x [..., D]` and `weight [N, D]`: "onednn", our kernel for few rows, or None for what torch
    takes. Decoding asks this for every matrix."""
    if torch.compiler.is_compiling():
        return None
    numbers, size = x.numel(), x.shape[-1]
    if numbers >= FEW_ROWS * size and numbers * weight.shape[0] >= EARNS_ONEDNN and mkl_is_slow():
        switched_off = not torch._C._get_mkldnn_enabled()  # by torch.backends.mkldnn.flags
        return None if switched_off or is_looked_into() or not _are_plain(x, weight, bias) else "onednn"
    if weight.numel() < WORTH_STREAMING or numbers >= (SHORT_SEQUENCE if mkl_is_slow() else FEW_ROWS) * size:
        return None
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias)):
        return None
    fits = weight.ndim == 2 and size == weight.shape[1] and weight.is_contiguous()
    return load_kernel("few_rows") if fits and not is_looked_into() and _are_plain(x, weight, bias) else None


def _are_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the product is one of float32 numbers in this machine's memory, and nothing else: subclasses of Tensor
    (quantised or distributed weights) have products of their own, and so has autocast."""
    for y in (x, weight) if bias is None else (x, weight, bias):
        if type(y) not in _PLAIN or y.dtype != torch.float32 or not y.is_cpu:
            return False
    return not torch.is_autocast_enabled("cpu")


def pieces_of_mlp(x: torch.Tensor, width: int) -> int | None:
    """Rows of `x` that an MLP of `width` takes at once, None for all: on a CPU its wide activations then stay in the
    cache and take no memory that grows with the sequence."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    size = max(1, WIDE_AT_ONCE // width) * (WIDER_WITH_GRADIENTS if torch.is_grad_enabled() else 1)
    return size if x.numel() > size * x.shape[-1] else None


def rows_of_logits(vocab_size: int) -> int:
    """Tokens whose logits the chunked cross-entropy makes at once."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


# ---- Fused elementwise kernels ----


def _elementwise(name: str, *tensors: torch.Tensor | None, **sizes: int) -> ctypes.CDLL | None:
    """The kernel `name`, if it can compute with these tensors, which are of no graph that is compiled."""
    if is_looked_into():
        return None
    for x in tensors:  # decoding calls this some 30 times a token: no generator
        if x is not None and not (x.is_cpu and x.dtype != torch.float64):
            return None
    return load_kernel(name, **sizes)


def rms_norm_kernel(x: torch.Tensor, weight: torch.Tensor) -> ctypes.CDLL | None:
    """The kernel for the RMS norm of `x`, None for plain torch."""
    if torch.compiler.is_compiling():
        return None
    fewest = WORTH_A_KERNEL if torch.is_grad_enabled() else WORTH_A_KERNEL_WITHOUT_GRADIENTS
    return None if x.numel() < fewest else _elementwise("rms_norm", x, weight)


def activation_kernel(
    x: torch.Tensor, factor: torch.Tensor | None, number: int, generates_code: bool
) -> ctypes.CDLL | None:
    """The kernel for activation `number` of x, times `factor` if there is one; None for plain torch. `generates_code`:
    torch generates code for each new shape, which takes longer than a few numbers do."""
    if torch.compiler.is_compiling():
        return None
    is_large = x.numel() >= WORTH_A_KERNEL
    pays = factor is not None if is_large else generates_code and not torch.is_grad_enabled()
    if not pays or (factor is not None and factor.shape != x.shape):
        return None
    return _elementwise("activation", x, factor, ACT=number, GATED=int(factor is not None))


def short_conv_kernel(parts, weight: torch.Tensor, bias: torch.Tensor | None, **sizes: int) -> ctypes.CDLL | None:
    """The kernel for the short convolution of `parts [B, T, D_i]` by `weight [D, W]` and `bias`; None, plain torch."""
    if torch.compiler.is_compiling():
        return None
    work = parts[0].shape[0] * parts[0].shape[1] * weight.numel()
    return None if work < WORTH_A_CONV_KERNEL else _elementwise("short_conv", weight, bias, *parts, **sizes)


def runs_lam_gates(x: torch.Tensor, *tensors: torch.Tensor) -> bool:
    """Whether the kernel for LAM's gates from their projection `x` runs, in a graph that is compiled too."""
    if torch.compiler.is_exporting() or is_looked_into() or x.numel() < WORTH_A_GATE_KERNEL:
        return False
    on_cpu = all(y.is_cpu for y in (x, *tensors))
    return on_cpu and compute_dtype(x, *tensors) == torch.float32 and has_library("lam_gates", ())


def threads(numbers: int, worth: int = WORTH_THREADS) -> int:
    """How many threads a kernel over so many numbers uses."""
    return torch.get_num_threads() if numbers >= worth else 1
