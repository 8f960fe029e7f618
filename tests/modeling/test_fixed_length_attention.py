"""Linformer and folded attention: equal to the pip packages' by copied weights, and lengths that do not fit."""

import pytest
import torch
from linear_attention_transformer.linear_attention_transformer import FoldAxially as UpstreamFold
from linear_attention_transformer.linear_attention_transformer import SelfAttention
from linformer import LinformerSelfAttention as Upstream

from lalm.modeling.fixed_length_attention import FoldAxially, LinformerAttention

SIZES = {"dim": 12, "seq_len": 10, "k": 4, "heads": 3}
OPTIONS = {
    "plain": {},
    "one head of keys": {"one_kv_head": True},
    "values are keys": {"share_kv": True, "dim_head": 5},
}


def equal(ours, theirs, *inputs) -> None:
    """Outputs and gradients of the inputs."""
    copies = [x.clone().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    expected, found = theirs(*inputs), ours(*copies)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, other in zip(copies, inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_linformer_equals_upstream(options):
    torch.manual_seed(0)
    theirs = Upstream(**SIZES | options).double()
    ours = LinformerAttention(**SIZES | options).double()
    ours.load_state_dict(theirs.state_dict())
    x, context = torch.randn(2, 10, 12, dtype=torch.float64), torch.randn(2, 10, 12, dtype=torch.float64)
    equal(ours, theirs, x)
    equal(ours, theirs, x.detach()[:, :7], context)


@pytest.mark.parametrize("causal", [False, True])
def test_folded_attention_equals_upstream(causal):
    torch.manual_seed(0)
    theirs = UpstreamFold(4, SelfAttention(8, 2, causal)).double()
    ours = FoldAxially(4, SelfAttention(8, 2, causal)).double()
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(2, 12, 8, dtype=torch.float64), torch.rand(2, 12) < 0.8
    equal(ours, theirs, x)
    torch.testing.assert_close(ours(x, input_mask=mask), theirs(x, input_mask=mask), rtol=0, atol=1e-12)
    assert not torch.allclose(ours(x, input_mask=mask), ours(x))


def test_what_does_not_fit():
    attention = LinformerAttention(**SIZES)
    with pytest.raises(ValueError, match=r"x must be \[batch, 10, 12\] \(seq_len positions.*got \[1, 9, 12\]"):
        attention(torch.randn(1, 9, 12))
    with pytest.raises(ValueError, match=r"context must be \[batch, 10, 12\].*got \[1, 11, 12\]"):
        attention(torch.randn(1, 9, 12), torch.randn(1, 11, 12))
    with pytest.raises(ValueError, match=r"dim, 12, must be a multiple of heads, 5"):
        LinformerAttention(**SIZES | {"heads": 5})
    with pytest.raises(ValueError, match=r"multiple of axial_dim = 4, width\], got \[1, 10, 8\]"):
        FoldAxially(4, torch.nn.Identity())(torch.randn(1, 10, 8))
