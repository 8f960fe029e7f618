"""How the tests of this folder run a model and compare: documents, pieces, states, gradients."""

import torch

TOLERANCE = 1e-9  # float64 models: rounding is 1e-15 a step, a leak of any kind is 1e-3 and more


def tokens(batch, length, seed=1, low=3, high=61):
    """Random ids, above the special ones."""
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, what="", tolerance=TOLERANCE):
    """Largest difference within `tolerance` of the largest expected value; NaN and wrong shapes fail."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def states(cache):
    """Every recurrent and convolution state of a cache, by name; not keys and values, where padding stays."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for kind in ("recurrent_states", "conv_states"):
            for number, state in getattr(layer, kind, {}).items():
                if state is not None:
                    found[f"layer {index} {kind} {number}"] = state
    return found


def assert_same_states(actual, expected, rows=slice(None), tolerance=TOLERANCE):
    """The states of `actual`, cut to `rows`, are those of `expected`."""
    actual, expected = states(actual), states(expected)
    assert actual.keys() == expected.keys()
    assert actual
    for name, state in expected.items():
        assert_close(actual[name][rows], state, name, tolerance)


@torch.no_grad()
def run(model, ids, **kwargs):
    """(logits, cache) of one forward."""
    out = model(input_ids=ids, use_cache=True, **kwargs)
    return out.logits, out.past_key_values


@torch.no_grad()
def run_in_pieces(model, ids, sizes, cache=None, **kwargs):
    """Logits and cache of the same tokens, `sizes` at a time, handing the cache on."""
    logits = []
    for piece in ids.split(sizes, dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


def weights_like(logits, seed=2):
    """A fixed cotangent for the gradient tests."""
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype)


def backward(model, embeds, cotangent, **kwargs):
    """(logits, gradient of the input embeddings, gradients of the parameters) of <logits, cotangent>."""
    embeds = embeds.detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    logits = model(inputs_embeds=embeds, use_cache=False, **kwargs).logits
    (logits * cotangent).sum().backward()
    return logits.detach(), embeds.grad, parameter_gradients(model)


def parameter_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def add_gradients(total, more):
    """Sum of gradients of separate runs; a parameter that one of them does not touch counts as zero there."""
    return {name: total.get(name, 0) + more.get(name, 0) for name in total.keys() | more.keys()}


def assert_same_gradients(actual, expected, tolerance=TOLERANCE):
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-6 * scale)
        assert error <= tolerance, f"gradient of {name}: relative error {error:.2e}"
