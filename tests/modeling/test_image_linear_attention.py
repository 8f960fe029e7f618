"""Attention over pixels: equal to the pip package's by copied weights, and sides that do not fit."""

import pytest
import torch
from linear_attention_transformer.images import ImageLinearAttention as Upstream

from lalm import LocalGlobalConfig
from lalm.modeling.image_linear_attention import ImageLinearAttention

SIZES = {"chan": 5, "heads": 2, "key_dim": 3, "value_dim": 4}
OPTIONS = {
    "plain": {},
    "queries as they are": {"norm_queries": False},
    "another width": {"chan_out": 7},
    "neighbours": {"kernel_size": 3, "padding": 1, "chan_out": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_upstream(options):
    torch.manual_seed(0)
    theirs = Upstream(**SIZES | options).double()
    ours = ImageLinearAttention(**SIZES | options).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, found = theirs(x), ours(y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=1e-10)


def test_a_context_equals_upstream():
    """Upstream's values of a context need value_dim = key_dim; ours do not."""
    torch.manual_seed(0)
    theirs = Upstream(**SIZES | {"value_dim": 3}).double()
    ours = ImageLinearAttention(**SIZES | {"value_dim": 3}).double()
    ours.load_state_dict(theirs.state_dict())
    x, context = torch.randn(2, 5, 6, 4, dtype=torch.float64), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x, context), theirs(x, context), rtol=0, atol=1e-12)
    assert ImageLinearAttention(**SIZES)(x.float(), context.float()).shape == (2, 5, 6, 4)
    assert not torch.allclose(ours(x, context), ours(x))


def test_a_stride_is_taken():
    assert ImageLinearAttention(**SIZES, stride=2)(torch.randn(1, 5, 6, 4)).shape == (1, 5, 3, 2)


@pytest.mark.parametrize(
    ("shape", "options", "context", "message"),
    [
        ((1, 4, 6, 6), {}, None, r"x must be \[batch, 5, height, width\], got \[1, 4, 6, 6\]"),
        ((5, 6, 6), {}, None, r"x must be \[batch, 5, height, width\]"),
        ((1, 5, 2, 6), {"kernel_size": 3}, None, r"The sides of x, \[2, 6\], must be at least 3"),
        ((1, 5, 6, 6), {}, (2, 5, 3), r"context must be \[1, 5, ...\] like x, got \[2, 5, 3\]"),
        ((1, 5, 6, 6), {"kernel_size": 3, "padding": 1}, (1, 5, 3), "needs kernel_size=1"),
    ],
)
def test_what_does_not_fit(shape, options, context, message):
    with pytest.raises(ValueError, match=message):
        ImageLinearAttention(**SIZES | options)(torch.randn(shape), None if context is None else torch.randn(context))


@pytest.mark.parametrize(
    ("name", "ours"),
    [("dim", "hidden_size"), ("depth", "num_hidden_layers"), ("num_tokens", "vocab_size"),
     ("max_seq_len", "max_position_embeddings"), ("attend_axially", "not available")],
)  # fmt: skip
def test_names_of_the_package_are_told_ours(name, ours):
    with pytest.raises(ValueError, match=f"has no field '{name}': linear-attention-transformer's {name} is {ours}"):
        LocalGlobalConfig(**{name: 512})


def test_memories_need_a_layer():
    with pytest.raises(ValueError, match=r"pkm_layers must name different layers from 0 to 5, got \[6\]"):
        LocalGlobalConfig(pkm_layers=[6])
