"""The Triton kernels of the dual-state delta rule against its definition: on a GPU where there is one, and in Triton's
interpreter, which must be chosen before Triton is imported and therefore runs this file once more in a new process."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lalm.modeling.ops import dispatch
from lalm.modeling.ops.delta.dual_state import dual_state_delta, recurrent_dual_state_delta
from lalm.modeling.ops.dispatch import in_form
from tests.ops.test_dual_state import assert_same, hard_layout, make, run, with_state

triton_dual_state_delta = in_form(dual_state_delta, "triton")

HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# On a GPU float32 is three products of TF32.
TOLERANCE = 5e-6 if INTERPRETED else 5e-5
# The interpreter of older ones does not run with NumPy 2.4.
INTERPRETS = HAVE_TRITON and [int(part) for part in version("triton").split(".")[:2]] >= [3, 7]
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
runs_kernels = pytest.mark.skipif(
    not HAVE_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="there is no GPU; test_in_the_interpreter runs this on the CPU",
)


@pytest.mark.skipif(INTERPRETED or not INTERPRETS, reason="this is the interpreter, or Triton 3.7 is not installed")
def test_in_the_interpreter():
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) >= 20


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 16 tokens for two memories."""
    from lalm.modeling.ops.delta import dual_state_triton

    monkeypatch.setattr(dual_state_triton, "_ROWS", 32)


def on_device(layout=None, **x):
    x = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in x.items()}
    o, state = triton_dual_state_delta(layout=None if layout is None else layout.to(DEVICE), **x)
    return o.cpu(), None if state is None else state.cpu()


def hold(x, layout=None, tolerance=TOLERANCE, **options):
    """Output, last state and every gradient beside those of the definition in float64."""
    mask = None if layout is None else layout.mask
    exact = {name: tensor.double() for name, tensor in x.items()}
    expected = run(recurrent_dual_state_delta, exact, mask, layout=layout, **options)
    assert_same(run(on_device, x, mask, layout=layout, **options), expected, tolerance)


def small(length, **sizes):
    return make(length, **({"batch": 1, "heads": 1, "dtype": torch.float32} | sizes))


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 70])
def test_kernels_are_recurrent(length):
    hold(with_state(small(length)))


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("length", [16, 33])
def test_without_the_delta_rule(length):
    hold(with_state(small(length)), use_delta_rule=False)


@runs_kernels
@pytest.mark.parametrize(("memories", "length"), [(1, 70), (2, 33), (4, 17)])
def test_memories_in_chunks_of_full_size(memories, length):
    hold(small(length, memories=memories))


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "plain"])
def test_padding_documents_rows_and_heads(delta):
    x = with_state(small(20, batch=2, heads=2))
    hold(x, hard_layout(2, 20), use_delta_rule=delta)


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
def test_both_ways():
    hold(small(20, batch=2, causal=False), hard_layout(2, 20), causal=False)


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("key", "value"), [(20, 40), (16, 16), (33, 3)])
def test_sizes_of_keys_and_values(key, value):
    hold(with_state(small(17, key=key, value=value)))


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
def test_packed_documents():
    x = small(21, batch=1)
    boundaries = torch.tensor([0, 3, 3, 21])
    expected = run(
        recurrent_dual_state_delta, {name: tensor.double() for name, tensor in x.items()}, cu_seqlens=boundaries
    )
    assert_same(run(on_device, x, cu_seqlens=boundaries), expected, TOLERANCE)


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
def test_gradients_of_the_output_or_the_state_alone():
    x = with_state(small(17))
    for index in range(2):
        found = []
        for op, dtype in ((recurrent_dual_state_delta, torch.float64), (on_device, torch.float32)):
            leaves = {name: tensor.to(dtype).requires_grad_(name in ("k", "g")) for name, tensor in x.items()}
            result = op(**leaves, output_final_state=True)[index]
            found.append(torch.autograd.grad(result.square().sum(), [leaves["k"], leaves["g"]]))
        for actual, expected in zip(found[1], found[0], strict=True):
            assert_same({"gradient": actual}, {"gradient": expected}, TOLERANCE)


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
def test_equal_keys_do_not_spoil_the_solve():
    """The powers of A of a text that says one thing would be huge; its inverse is not."""
    x = small(32)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    x["beta"], x["g"] = torch.full_like(x["beta"], 0.9), torch.full_like(x["g"], -1e-3)
    hold(x, tolerance=10 * TOLERANCE)


@runs_kernels
@pytest.mark.usefixtures("short_chunks")
def test_bfloat16_products():
    """q, k and v in bfloat16, sums in float32: what is rounded is the result."""
    x = small(20)
    x |= {name: x[name].bfloat16() for name in ("q", "k", "v")}
    hold(x, tolerance=1e-2)


@needs_triton
def test_what_the_kernels_refuse():
    refused = [make(4, memories=3, dtype=torch.float32), make(4, key=257, dtype=torch.float32), make(4)]
    if not INTERPRETED:
        refused.append(make(4, dtype=torch.float32))
    for x in refused:
        with pytest.raises(RuntimeError, match="need a GPU, no float64, 1, 2 or 4 memories"):
            triton_dual_state_delta(**x)


@pytest.mark.skipif(HAVE_TRITON, reason="Triton is installed here")
def test_without_triton_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_reaches_gpu", lambda name, v: True)
    with pytest.raises(ImportError, match="linear_attn_implementation='triton'.*pip install triton"):
        triton_dual_state_delta(**make(4, dtype=torch.float32))


def signature(kernel, constants):
    """Types of a kernel's arguments for bfloat16 inputs."""
    types = dict.fromkeys(("q", "k", "v", "d_q", "d_k", "d_v"), "*bf16") | {"scale": "fp32", "starts": "*u8"}
    types |= dict.fromkeys(("length", "heads", "key_size", "value_size"), "i32")
    return {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_compile_for_a_gpu(monkeypatch, tmp_path):
    """Down to machine code, which needs no GPU; an H100 has 227 KiB of shared memory for a block."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lalm.modeling.ops.delta import dual_state_gradients, dual_state_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"M": 2, "C": 32, "BK": 64, "BV": 32, "DELTA": True, "PRECISION": "tf32"}
    names = ("prepare", "scan", "read_out", "scan_back", "state_gradients", "pair_gradients", "gate_gradients")
    for name in names:
        kernel = getattr(dual_state_kernels, name, None) or getattr(dual_state_gradients, name)
        constants = {key: value for key, value in sizes.items() if key in kernel.arg_names}
        source = ASTSource(kernel, signature(kernel, constants), constants)
        options = {"num_warps": 8 if name in ("prepare", "state_gradients", "pair_gradients") else 4, "num_stages": 2}
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 227 * 1024
