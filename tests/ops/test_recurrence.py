"""The C++ forms of the diagonal recurrences and of the delta rule against their definitions in float64."""

import dataclasses

import pytest
import torch

from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops import dispatch
from lalm.modeling.ops.cpp_kernels import load_kernel
from lalm.modeling.ops.delta.delta_recurrence import recurrent_delta
from lalm.modeling.ops.delta.delta_rule import gated_delta_rule
from lalm.modeling.ops.delta.delta_rule_cpp import cpp_delta
from lalm.modeling.ops.diagonal.diagonal_cpp import cpp_diagonal, diagonal_kernel
from lalm.modeling.ops.diagonal.diagonal_recurrence import recurrent_diagonal
from lalm.modeling.ops.diagonal.gla import gla, recurrent_gla
from lalm.modeling.ops.diagonal.taylor import num_taylor_features, taylor_features
from lalm.modeling.ops.dispatch import choose, in_form
from lalm.modeling.ops.sequence_layout import SequenceLayout

cpp_gated_delta_rule = in_form(gated_delta_rule, "cpp")
cpp_gla = in_form(gla, "cpp")

KINDS = ("linear", "normalized", "normalized decay", "retention", "gla", "taylor", "delta", "gated delta")
EPS = 0.1  # of a normaliser; far smaller ones leave the only token of a text a gradient of rounding errors
BATCH, HEADS = 2, 3
# powers of two and beside them, rows and columns that fill no register, several blocks of columns, a key as of Taylor
SIZES = [(32, 32), (64, 65), (17, 33), (40, 16), (128, 128), (16, 96), (153, 17)]
AWKWARD = [(64, 65), (17, 33), (153, 17)]
pytestmark = pytest.mark.skipif(load_kernel("rms_norm") is None, reason="no C++ compiler on this machine")


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor | None
    state: torch.Tensor | None
    normalized: bool = False
    taylor: bool = False

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}

    def run(self, form: str, dtype, layout, weights=None):
        """o, final state and, given weights of the two, the gradients of all inputs."""
        inputs = [getattr(self, field.name) for field in dataclasses.fields(self)][:6]
        inputs = [None if x is None else x.to(dtype).requires_grad_(weights is not None) for x in inputs]
        q, k, v, g, beta, state = inputs
        if beta is None:
            options = {"eps": EPS} if self.normalized else {}
            core = {"cpp": cpp_diagonal, "recurrent": divided if self.normalized else recurrent_diagonal}[form]
            if self.taylor and form == "cpp":
                options["taylor"] = True
            elif self.taylor:
                q, k = taylor_features(q), taylor_features(k)
            o, final = core(q, k, v, g, 0.3, state, layout, **options)
        else:
            core = {"cpp": cpp_delta, "recurrent": recurrent_delta}[form]
            k, g = layout.freeze(k, None if g is None else g[..., None])
            o, final = core(q, k, v, None if g is None else g[..., 0], beta, 0.3, state, layout)
        if weights is None:
            return [o, final]
        ((o * weights[0].to(dtype)).sum() + (final * weights[1].to(dtype)).sum()).backward()
        return [o.detach(), final.detach(), *(x.grad for x in inputs if x is not None)]


def make(kind: str, key: int, value: int, length: int, state=True, decay=0.5, seed=0) -> Case:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(BATCH, length, HEADS, size) for size in (key, key, value))
    gate = {"retention": (1,), "normalized decay": (1,), "gla": (key,), "gated delta": ()}.get(kind)
    g = None if gate is None else -decay * torch.rand(BATCH, length, HEADS, *gate)
    beta = torch.rand(BATCH, length, HEADS) if "delta" in kind else None
    if kind == "taylor":
        before = taylor_features(torch.randn(BATCH, 5, HEADS, key))
        first = torch.einsum("bthk,bthv->bhkv", before, ones_after(torch.randn(BATCH, 5, HEADS, value)))
        return Case(q, k, v, g, beta, first if state else None, normalized=True, taylor=True)
    first = torch.randn(BATCH, HEADS, key, value) if state else None
    k = k / k.norm(dim=-1, keepdim=True)
    if not kind.startswith("normalized"):
        return Case(q, k, v, g, beta, first)
    first = torch.cat([first, torch.rand(BATCH, HEADS, key, 1)], -1) if state else None
    return Case(q.abs(), k.abs(), v, g, beta, first, normalized=True)


def ones_after(v):
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def divided(q, k, v, g, scale, state, layout, eps):
    """The definition of normalised sums: one more column, whose value is always 1, divides the others."""
    o, final = recurrent_diagonal(q, k, ones_after(v), g, scale, state, layout)
    return o[..., :-1] / (o[..., -1:] + eps), final


def compare(case: Case, layout=None, tolerance=2e-6):
    """C++ in float32 against the definition in float64, values and all gradients, relative to the largest number."""
    layout = layout or SequenceLayout()
    columns = case.v.shape[-1] + case.normalized
    rows = num_taylor_features(case.q.shape[-1]) if case.taylor else case.q.shape[-1]
    read, final = torch.randn_like(case.v), torch.randn(BATCH, HEADS, rows, columns)
    real = torch.ones(case.v.shape[:2], dtype=torch.bool) if layout.mask is None else layout.mask
    read *= real[:, :, None, None]  # what stands on padding is unspecified
    expected = case.run("recurrent", torch.float64, layout, (read, final))
    found = case.run("cpp", torch.float32, layout, (read, final))
    for x in (expected, found):
        x[0] = x[0] * real[:, :, None, None]
    assert len(found) == len(expected)
    for index, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == torch.float32
        error = (ours - exact).abs().max() / exact.abs().max().clamp(min=1e-3)
        assert error < tolerance, (index, float(error))


# All kinds share the code for sizes, and each pair is compiled: two kinds take every size, the others three.
SIZES_OF = {kind: SIZES if kind in ("gla", "gated delta") else AWKWARD for kind in KINDS if kind != "taylor"}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), [(kind, sizes) for kind in SIZES_OF for sizes in SIZES_OF[kind]])
def test_values_and_gradients(kind, sizes):
    compare(make(kind, *sizes, length=37))


@pytest.mark.parametrize("kind", ["retention", "gla", "gated delta"])
@pytest.mark.parametrize(("length", "place"), [(37, 0), (37, 20), (37, 36), (300, 200), (300, 255)])
@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
def test_gates_beside_a_large_token(kind, length, place, state):
    """A gate's gradient has the precision of its own size: a hundredfold token leaves no rounding in the others."""
    case = make(kind, 32, 32, length, state, decay=0.05)
    for x in (case.q, case.v) if "delta" in kind else (case.q, case.k, case.v):
        x[:, place] *= 100
    weights = torch.randn_like(case.v), torch.zeros(())
    exact, found = (
        case.run(form, dtype, SequenceLayout(), weights)[5].flatten(2).transpose(0, 1).flatten(1)
        for form, dtype in (("recurrent", torch.float64), ("cpp", torch.float32))
    )
    error = (found - exact).abs().amax(1) / exact.abs().amax(1).clamp(min=1e-3)
    assert error.max() < 5e-5, int(error.argmax())


@pytest.mark.parametrize("sizes", [(8, 32), (15, 33), (16, 64), (17, 16), (33, 40)], ids=lambda sizes: f"{sizes[0]}")
@pytest.mark.slow
def test_taylor_features_of_a_block(sizes):
    compare(make("taylor", *sizes, length=37))


@pytest.mark.slow
def test_nothing_of_a_call_reaches_the_next():
    """What a block leaves in the workspace reaches no later one."""
    ones = torch.ones(BATCH, 20, HEADS, 32), torch.ones(())
    found = []
    for factor in (1.0, torch.nan, 1.0):
        case = make("taylor", 16, 32, 20)
        case.q *= factor
        case.k *= factor
        found.append(case.run("cpp", torch.float32, SequenceLayout(), ones))
    assert all(map(torch.equal, found[0], found[2]))
    assert not any(x.isfinite().all() for x in found[1])


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 600])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_lengths_around_the_anchors_of_the_decay_gradient(kind, length):
    compare(make(kind, 32, 32, length, state=length % 2 == 0), tolerance=4e-6)


@pytest.mark.parametrize("decay", [0.0, 3.0, 20.0, 200.0])
@pytest.mark.parametrize("kind", ["retention", "normalized decay", "gla", "gated delta"])
def test_any_decay_is_safe(kind, decay):
    # Under strong decay the gate's gradient is what is left of reads and writes that nearly cancel.
    compare(make(kind, 32, 32, 300, decay=decay), tolerance=1e-5)


def masks(length: int) -> torch.Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, -9:] = False
    mask[0, 20:23] = False
    return mask


def documents(length: int) -> torch.Tensor:
    segments = torch.zeros(BATCH, length, dtype=torch.long)
    segments[0, 21:] = 1
    segments[0, 41:] = 2
    segments[1, 30:] = 1
    segments[1, length - 4 :] = 2  # begins on padding, where there is padding
    return segments


@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout",
    [
        SequenceLayout(mask=masks(70)),
        SequenceLayout(segments=documents(70)),
        SequenceLayout(mask=masks(70), segments=documents(70)),
    ],
    ids=["padding", "documents", "both"],
)
def test_padding_and_documents(kind, layout, state):
    compare(make(kind, 32, 48, 70, state), layout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_padding_passes_its_state_on(kind):
    case, mask = make(kind, 32, 32, 12), torch.ones(BATCH, 12, dtype=torch.bool)
    mask[1] = False
    compare(case, SequenceLayout(mask=mask))
    _, final = case.run("cpp", torch.float32, SequenceLayout(mask=mask))
    assert torch.equal(final[1], case.state[1])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(kind):
    """The delta rule goes token by token, to the last bit; blocks of the others begin anew with a piece."""
    case = make(kind, 32, 32, 50)
    whole, last = case.run("cpp", torch.float32, SequenceLayout())
    state, pieces = case.state, []
    for start, stop in ((0, 1), (1, 30), (30, 50)):
        part = {name: x[:, start:stop] for name, x in case.tensors().items()} | {"state": state}
        o, state = dataclasses.replace(case, **part).run("cpp", torch.float32, SequenceLayout())
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, last, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind):
    case, threads = make(kind, 32, 32, 50), torch.get_num_threads()
    weights = [torch.randn_like(x) for x in case.run("cpp", torch.float32, SequenceLayout())]
    alone = case.run("cpp", torch.float32, SequenceLayout(), weights)
    try:
        torch.set_num_threads(threads + 2)
        together = case.run("cpp", torch.float32, SequenceLayout(), weights)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, together, alone))


def test_decays_that_differ_by_key_and_by_head():
    """One key of one head forgets at once, some tokens forget all: blocks end at other places in every head."""
    case = make("gla", 32, 32, 90, decay=0.1)
    case.g[:, :, 1, 5] = -9.0
    case.g[:, ::7, 2] = -300.0
    compare(case, SequenceLayout(mask=masks(90), segments=documents(90)), tolerance=4e-6)


@pytest.mark.parametrize("kind", ["normalized decay", "gla", "taylor", "gated delta"])
@pytest.mark.parametrize("processor", ["x86-64-v2", "x86-64-v3"])
@pytest.mark.slow
def test_narrower_registers(processor, kind, compile_for):
    """Vectors of 4 and of 8 numbers, as processors without AVX and without AVX-512 have them."""
    compile_for(processor)
    compare(make(kind, 13 if kind == "taylor" else 40, 48, 37))


def test_views_and_half_precision_are_accepted():
    case = make("gla", 32, 32, 20)
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in case.tensors().items()}
    expected = case.run("cpp", torch.float32, SequenceLayout())
    found = dataclasses.replace(case, **strided).run("cpp", torch.float32, SequenceLayout())
    assert torch.equal(found[0], expected[0])
    q, k, v = (x.bfloat16() for x in (case.q, case.k, case.v))
    o, state = cpp_gla(q, k, v, case.g, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = recurrent_gla(q.float(), k.float(), v.float(), case.g)
    assert (o.float() - exact).abs().max() < 2e-2 * exact.abs().max()


def test_a_gradient_of_a_part_of_the_inputs():
    case = make("gated delta", 32, 32, 20)
    v = case.v.clone().requires_grad_()
    o, _ = cpp_gated_delta_rule(case.q, case.k, v, case.g, case.beta)
    o.sum().backward()
    expected = case.v.clone().requires_grad_()
    recurrent, _ = recurrent_delta(case.q, case.k, expected, case.g, case.beta, 32**-0.5, None, SequenceLayout())
    recurrent.sum().backward()
    torch.testing.assert_close(v.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_without_a_kernel_the_other_forms_run(monkeypatch):
    q, forms = torch.zeros(1, 1, 1, 32), {"recurrent": None, "cpp": None}
    assert choose("gla", "auto", q, q, forms, diagonal_kernel(32, 32, 32)) == "cpp"
    assert choose("gla", "auto", q.double(), q, forms, diagonal_kernel(32, 32, 32)) == "recurrent"
    small = q[..., :4]  # not worth a kernel
    assert choose("gla", "auto", small, small, forms, diagonal_kernel(4, 8, 4)) == "recurrent"
    monkeypatch.setenv("LALM_CPP", "0")
    cpp._plan.cache_clear()
    try:
        assert choose("gla", "auto", q, q, forms, diagonal_kernel(32, 32, 32)) == "recurrent"
        with pytest.raises(ValueError, match="linear_attn_implementation='auto'"):
            cpp_gla(q, q, q, q)
    finally:
        cpp._plan.cache_clear()


def test_float64_is_refused_rather_than_rounded():
    q = torch.zeros(1, 1, 1, 32)
    with pytest.raises(RuntimeError, match="float32"):
        cpp_gla(q, q, q.double(), q)


def test_memory_of_the_backward_pass_grows_with_the_inputs_only():
    """Nothing of size T x K x V is kept: what autograd saves are the inputs and, of the delta rule, a few states."""
    case = make("gated delta", 32, 32, 600)
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.g, case.beta)]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cpp_delta(*inputs, 1.0, None, SequenceLayout())
    assert sum(x.numel() for x in saved) <= 2 * sum(x.numel() for x in inputs)
    assert dispatch.SMALLEST_STATE <= 32 * 32
