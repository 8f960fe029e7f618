"""Kimi delta attention and Mamba-2's scan: all forms against the recurrence, and against transformers' functions."""

import inspect

import pytest
import torch
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba

from lalm.modeling.ops import cpp_kernels as cpp
from lalm.modeling.ops.delta.kda import kda
from lalm.modeling.ops.diagonal.ssd import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)
from lalm.modeling.ops.sequence_layout import SequenceLayout
from tests.ops.cases import relative_error

B, T, H, K, V = 2, 37, 6, 12, 20
FORMS = ["chunk", "cpp"]
LAYOUTS = {
    "plain": SequenceLayout(),
    "documents": SequenceLayout(segments=torch.tensor([[0] * 9 + [1] * 20 + [2] * 8, [0] * 30 + [1] * 7])),
    "padding": SequenceLayout(mask=torch.ones(B, T, dtype=torch.bool)),
}
LAYOUTS["padding"].mask[0, :5], LAYOUTS["padding"].mask[1, 20:25], LAYOUTS["padding"].mask[1, -2:] = (
    False,
    False,
    False,
)


@pytest.fixture(autouse=True)
def small_heads_run(monkeypatch):
    monkeypatch.setattr("lalm.modeling.ops.dispatch.SMALLEST_STATE", 1)


def skip_without_compiler(form):
    if form == "cpp" and cpp.load_kernel("rms_norm") is None:
        pytest.skip("this machine has no C++ compiler")


def results(function, inputs, dtype):
    """o and final state of `function(*leaves)`, and the gradients of all leaves."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    torch.manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum() for y in outputs)
    return *outputs, *torch.autograd.grad(loss, leaves)


def assert_same(found, expected, tolerance):
    for y, exact in zip(found, expected, strict=True):
        assert relative_error(y, exact) < tolerance


def kda_inputs(strength, groups=H):
    torch.manual_seed(0)
    q, k = torch.randn(2, B, T, groups, K, dtype=torch.float64)
    g = -strength * torch.rand(B, T, H, K, dtype=torch.float64) ** 4
    return q, k, torch.randn(B, T, H, V).double(), g, torch.rand(B, T, H).double(), torch.randn(B, H, K, V).double()


def run_kda(layout=LAYOUTS["plain"], **options):
    def run(q, k, v, g, beta, state):
        o, final = kda(q, k, v, g, beta, None, state, True, use_qk_l2norm_in_kernel=True, layout=layout, **options)
        return layout.zero_padding(o), final

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [0.0, 2.0, 50.0])
def test_kda_is_the_recurrence_and_that_of_transformers(form, strength):
    skip_without_compiler(form)
    inputs = kda_inputs(strength)
    expected = results(run_kda(implementation="recurrent"), inputs, torch.float64)
    assert_same(results(run_kda(implementation=form), inputs, torch.float32), expected, 2e-6)

    def stock(q, k, v, g, beta, state):
        return kimi.chunk_kimi_delta_attention(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    if strength < 50:  # its differences of running sums lose digits
        assert_same(results(stock, inputs, torch.float32), expected, 2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["documents", "padding"])
def test_kda_layouts_and_groups(form, kind):
    skip_without_compiler(form)
    inputs = kda_inputs(2.0, groups=2)
    expected = results(run_kda(LAYOUTS[kind], implementation="recurrent"), inputs, torch.float64)
    assert_same(results(run_kda(LAYOUTS[kind], implementation=form), inputs, torch.float32), expected, 2e-6)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_share_a_group(threads):
    """Heads that share their keys are several tasks, whose gradients of these are added up."""
    skip_without_compiler("cpp")
    before = torch.get_num_threads()
    inputs = [x[:1] for x in kda_inputs(2.0, groups=1)]
    expected = results(run_kda(implementation="recurrent"), inputs, torch.float64)
    try:
        torch.set_num_threads(threads)
        assert_same(results(run_kda(implementation="cpp"), inputs, torch.float32), expected, 2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_kda_forgets_all(form):
    """Log decays of -50 a token and of minus infinity: every token is alone, and nothing overflows."""
    skip_without_compiler(form)
    q, k, v, g, beta, state = (x.float() for x in kda_inputs(1.0))
    for decay in (-50.0, -torch.inf):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g.new_full(g.shape, decay), beta)]
        o, _ = kda(*leaves, None, state, implementation=form)
        alone = beta[..., None] * v * (q * k).sum(-1, keepdim=True) * K**-0.5
        assert relative_error(o, alone) < 1e-6
        assert all(d.isfinite().all() for d in torch.autograd.grad(o.sum(), leaves))


G, P, N = 2, 20, 12


def scan_inputs():
    torch.manual_seed(0)
    mixed, dt = torch.randn(B, T + 3, H * P + 2 * G * N), torch.randn(B, T, H)
    return [
        x.double() for x in (mixed, dt, -8 * torch.rand(H), torch.randn(H), torch.randn(H), torch.randn(B, H, P, N))
    ]


def run_scan(function=mamba_chunk_scan_combined, layout=LAYOUTS["plain"], **options):
    def run(mixed, dt, A, D, bias, state):
        x, b, c = mixed[:, 3:].split([H * P, G * N, G * N], -1)
        y, final = function(
            x.unflatten(-1, (H, P)), dt, A, b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N)), 16, D=D, dt_bias=bias,
            initial_states=state, dt_softplus=True, dt_limit=(0.01, 2.0), return_final_states=True, **options,
        )  # fmt: skip
        return layout.zero_padding(y), final

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_scan_is_the_recurrence(form, kind):
    skip_without_compiler(form)
    layout = LAYOUTS[kind]
    options = {"mask": layout.mask, "seq_idx": layout.segments}
    expected = results(run_scan(layout=layout, implementation="recurrent", **options), scan_inputs(), torch.float64)
    found = results(run_scan(layout=layout, implementation=form, **options), scan_inputs(), torch.float32)
    assert_same(found, expected, 2e-6 if form == "cpp" else 1e-5)
    if kind == "plain":
        assert_same(results(run_scan(mamba.mamba2_chunk_scan), scan_inputs(), torch.float32), expected, 5e-6)


def test_scan_of_documents_with_states():
    mixed, dt, A, D, bias, _ = scan_inputs()
    x, b, c = mixed[:1, 3:].split([H * P, G * N, G * N], -1)
    tensors = (x.unflatten(-1, (H, P)), dt[:1], A, b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N)))
    options = {"D": D, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}
    states = torch.randn(2, H, P, N).double()
    y, final = mamba_chunk_scan_combined(
        *tensors, initial_states=states, cu_seqlens=torch.tensor([0, 14, T]), **options
    )
    for part, document in ((slice(0, 14), slice(0, 1)), (slice(14, T), slice(1, 2))):
        own = [t[:, part] if t.ndim > 1 else t for t in tensors]
        alone = mamba_chunk_scan_combined(*own, initial_states=states[document], **options)
        assert_same((y[:, part], final[document]), alone, 1e-12)


def test_update_is_a_step_of_the_scan_and_that_of_transformers():
    mixed, dt, A, D, bias, state = scan_inputs()
    x, b, c = mixed[:, 3].split([H * P, G * N, G * N], -1)
    x, b, c = x.unflatten(-1, (H, P)), b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
    wide = [y[..., None].expand(*y.shape, P) for y in (dt[:, 0], D, bias)]
    arguments = (x, wide[0], A[:, None, None].expand(H, P, N), b, c, wide[1])
    ours, theirs = (
        state.transpose(2, 3).contiguous().transpose(2, 3),
        state.clone(),
    )  # as a cache may hold it, and plain
    y = selective_state_update(ours, *arguments, dt_bias=wide[2], dt_softplus=True)
    stock = mamba.mamba2_selective_state_update(theirs, *arguments, dt_bias=wide[2], dt_softplus=True)
    scan, final = mamba_chunk_scan_combined(
        x[:, None], dt[:, :1], A, b[:, None], c[:, None], D=D, dt_bias=bias, initial_states=state, dt_softplus=True,
        return_final_states=True,
    )  # fmt: skip
    assert_same((y, ours), (scan[:, 0], final), 1e-12)
    assert_same((stock, theirs), (y, ours), 1e-6)
    free = [t.contiguous() for t in arguments]  # a number of its own for every channel, as Mamba has
    assert_same((selective_state_update(state, *free, dt_bias=wide[2].contiguous(), dt_softplus=True),), (y,), 1e-12)


def test_whole_layer_is_its_parts():
    if "group_size" not in inspect.signature(mamba.MambaRMSNormGated).parameters:
        pytest.skip("the norm of this transformers knows no groups")
    torch.manual_seed(0)
    inner, channels = H * P, H * P + 2 * G * N
    zxbcdt, weight, bias = torch.randn(B, T, inner + channels + H), torch.randn(channels, 4), torch.randn(channels)
    A, D, dt_bias, norm, out = (
        -torch.rand(H),
        torch.randn(H),
        torch.randn(H),
        torch.randn(inner),
        torch.randn(7, inner),
    )
    found = mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, headdim=P, ngroups=G, rmsnorm_weight=norm, outproj_weight=out,
        norm_before_gate=False,
    )  # fmt: skip
    z, mixed, dt = zxbcdt.split([inner, channels, H], -1)
    mixed = mamba.causal_conv1d_fn(mixed.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    x, b, c = mixed.split([inner, G * N, G * N], -1)
    y = mamba.mamba2_chunk_scan(x.unflatten(-1, (H, P)), dt, A, b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N)), 16,
                                D=D, dt_bias=dt_bias, dt_softplus=True)  # fmt: skip
    gated = mamba.MambaRMSNormGated(inner, group_size=inner // G, eps=1e-6)
    gated.weight.data = norm
    assert relative_error(found, gated(y.flatten(2), z) @ out.T) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.ones(B, T, 3)}, r"dt must be one time step per token and head, \[B, T, H\] = \(2, 37, 6\)"),
        ({"A": torch.ones(3)}, r"A must be \[H\] = \(6,\)"),
        ({"B": torch.ones(B, T, 4, N), "C": torch.ones(B, T, 4, N)}, "v must have a multiple of the 4 heads of q"),
        ({"initial_states": torch.ones(B, H, N, P + 1)}, "initial_state must be"),
    ],
)
def test_what_does_not_fit(change, message):
    arguments = {"x": torch.ones(B, T, H, P), "dt": torch.ones(B, T, H), "A": torch.ones(H)}
    arguments |= {"B": torch.ones(B, T, G, N), "C": torch.ones(B, T, G, N)} | change
    with pytest.raises(ValueError, match=message):
        mamba_chunk_scan_combined(**arguments)
