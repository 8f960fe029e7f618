"""Published formulas on one small fixed input. The numbers were computed once, apart from this code base:
linear attention by Katharopoulos et al. (arXiv 2006.16236), the second-order Taylor map of Based (arXiv 2402.18668),
gated linear attention by Yang et al. (arXiv 2312.06635)."""

import pytest
import torch

from lalm.modeling.ops.delta.delta_rule import chunk_delta_rule, recurrent_delta_rule
from lalm.modeling.ops.diagonal.gla import chunk_gla, recurrent_gla
from lalm.modeling.ops.diagonal.linear_attention import chunk_linear_attention, recurrent_linear_attention

GOLDEN = {
    "delta": [
        [0.122543, 0.248920],
        [0.206935, 0.304841],
        [-0.362917, -0.416033],
        [0.252195, 0.273697],
        [-0.805956, -0.255496],
        [0.298527, -0.149041],
    ],
    "elu": [[0.479425, 0.973847], [0.333266, 0.331100], [0.228420, 0.384475], [0.399890, 0.280961],
            [-0.059999, 0.067589], [0.115339, 0.213875]],
    "taylor": [[0.479426, 0.973848], [0.326594, 0.301763], [-0.271539, 0.240395], [0.317610, 0.181989],
               [-0.089222, 0.115226], [-0.015563, 0.161226]],
    "gla": [[0.218181, 0.443187], [0.337894, 0.625326], [-1.099543, -0.466211], [0.359926, 0.197660],
            [-0.193874, 0.007811], [-0.202219, -0.396130]],
}  # fmt: skip


def inputs():
    index = torch.arange(12, dtype=torch.float64).reshape(1, 6, 1, 2)
    return index, torch.sin(index), torch.cos(0.7 * index), torch.sin(1.3 * index + 0.5)


def assert_golden(out, name):
    expected = torch.tensor(GOLDEN[name], dtype=torch.float64)
    assert out.shape == (1, 6, 1, 2)
    assert (out[0, :, 0] - expected).abs().max() < 6e-7, "golden rows are given to six decimals"


def taylor(x):
    """[1, x / f^(1/4), vec(x x^T) / (sqrt 2 f^(1/2))] for f = 2 features."""
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / 2**0.25, outer / 2], -1)


@pytest.mark.parametrize("fn", [recurrent_linear_attention, chunk_linear_attention])
def test_linear_attention_elu(fn):
    _, q, k, v = inputs()
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    assert_golden(fn(q, k, v, scale=1.0)[0], "elu")


@pytest.mark.parametrize("fn", [recurrent_linear_attention, chunk_linear_attention])
def test_linear_attention_both_ways(fn):
    """The first row is given; the last token has seen all in either form, so its row is the causal one."""
    _, q, k, v = inputs()
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    out = fn(q, k, v, scale=1.0, causal=False)[0][0, :, 0]
    expected = torch.tensor([[0.106224, 0.206272], GOLDEN["elu"][-1]], dtype=torch.float64)
    assert (out[[0, -1]] - expected).abs().max() < 6e-7


@pytest.mark.parametrize("fn", [recurrent_linear_attention, chunk_linear_attention])
def test_linear_attention_taylor(fn):
    _, q, k, v = inputs()
    assert_golden(fn(taylor(q), taylor(k), v, scale=1.0, eps=1e-12)[0], "taylor")


@pytest.mark.parametrize("fn", [recurrent_gla, chunk_gla])
def test_gla(fn):
    index, q, k, v = inputs()
    # alpha = sigma(sin(.3 idx))^(1/16), the normaliser of the paper; the default scale is 2^-1/2 here.
    assert_golden(fn(q, k, v, torch.nn.functional.logsigmoid(torch.sin(0.3 * index)) / 16)[0], "gla")


def test_taylor_products_are_the_series():
    _, q, k, _ = inputs()
    s = (q * k).sum(-1) / 2**0.5
    assert torch.allclose((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2, atol=1e-14)


@pytest.mark.parametrize("fn", [recurrent_delta_rule, chunk_delta_rule])
def test_delta_rule(fn):
    index, q, k, v = inputs()
    beta = torch.sin(index[..., 0]).sigmoid()
    assert_golden(fn(q, torch.nn.functional.normalize(k, dim=-1), v, beta, scale=1.0)[0], "delta")
