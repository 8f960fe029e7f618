# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The reversible backward pass: plain gradients, without the memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lalm.modeling import modeling_local_global
from lalm.modeling.reversible import run_reversible
from tests.modeling.exact import assert_close, assert_same_gradients, parameter_gradients, tokens
from tests.variants import Row, _local_global

LENGTH = 13
CONTEXT = {"receives_context": True, "shift_tokens": True}
ROWS = (
    _local_global("plain", reversible=True, num_local_heads=1, blindspot_size=3),
    _local_global("dropout", reversible=True, num_local_heads=1, dropout=0.3, ff_dropout=0.2, attention_dropout=0.3),
    _local_global("chunks", reversible=True, ff_chunks=4, ff_dropout=0.4, dropout=0.3),
    _local_global("context", reversible=True, ff_glu=True, ff_dropout=0.2, **CONTEXT),
    _local_global("encoder", reversible=True, is_causal=False, num_local_heads=1, shift_tokens=True),
)
rows = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def build(row: Row, **changes):
    head = "AutoModelForCausalLM" if row.config().is_causal else "AutoModelForMaskedLM"
    return row.build(head, **changes)


def inputs_of(row):
    """Padding and two documents, and a context whose gradient is wanted."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 9:], mask[1, 0], mask[1, 5] = 0, 0, 0
    documents = torch.tensor([[0] * 6 + [1] * 7, [0] * LENGTH])
    inputs = {"input_ids": tokens(2, LENGTH), "attention_mask": mask, "seq_idx": documents}
    if row.config().receives_context:
        context = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        inputs["encoder_hidden_states"] = context.requires_grad_()
        inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    return inputs


def plain(x, layers, kwargs, is_random):
    """What run_reversible computes, by autograd."""
    x1 = x2 = x
    for layer in layers:
        for f, g in layer.sublayers(**kwargs):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
    return (x1 + x2) / 2


def gradients(model, inputs, seed=3):
    """Loss and gradients, of the context too, of one training step with the random numbers of `seed`."""
    model.zero_grad(set_to_none=True)
    context = inputs.get("encoder_hidden_states")
    if context is not None:
        context.grad = None
    torch.manual_seed(seed)
    real = inputs["attention_mask"].bool()
    loss = model(**inputs, use_cache=False).logits[real].square().mean()
    loss.backward()
    found = parameter_gradients(model)
    return loss.detach(), found if context is None else found | {"context": context.grad.clone()}


@rows
@modes
def test_gradients_are_those_of_autograd(row, training, monkeypatch):
    model, inputs = build(row, num_hidden_layers=3).train(training), inputs_of(row)
    loss, found = gradients(model, inputs)
    called = []
    monkeypatch.setattr(modeling_local_global, "run_reversible", lambda *args: called.append(1) or plain(*args))
    expected_loss, expected = gradients(model, inputs)
    assert called
    assert_close(loss, expected_loss, "loss")
    assert_same_gradients(found, expected)


@rows
def test_other_paths_give_the_same(row):
    """With recorded hidden states, a cache or checkpoints the streams are kept; the function is the same."""
    model, inputs = build(row), inputs_of(row)
    expected = model(**inputs, use_cache=False).logits
    out = model(**inputs, use_cache=False, output_hidden_states=True)
    assert_close(out.logits, expected, "hidden states")
    assert len(out.hidden_states) == 3
    with torch.no_grad():
        assert_close(model(**inputs).logits, expected, "no gradient")
    if row.config().is_causal:
        cached = model(**inputs, use_cache=True)
        assert cached.past_key_values is not None
        assert_close(cached.logits, expected, "cache")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    row = ROWS[0]
    model, inputs = build(row).train(), inputs_of(row)
    loss, expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, found = gradients(model, inputs)
    assert_close(again, loss, "loss")
    assert_same_gradients(found, expected)


def saved_bytes(depth, reversible):
    """Bytes that autograd keeps between the passes, without the weights."""
    model = build(ROWS[0], num_hidden_layers=depth, reversible=reversible).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens(2, 64), labels=tokens(2, 64)).loss
    total = sum(kept.values())
    loss.backward()
    return total


def test_memory_does_not_grow_with_depth():
    two, eight = saved_bytes(2, reversible=True), saved_bytes(8, reversible=True)
    assert eight == two
    assert saved_bytes(8, reversible=False) > 4 * eight


def test_a_training_step_makes_no_cache():
    model = build(ROWS[0])
    assert model.train()(tokens(1, 4)).past_key_values is None
    assert model.eval()(tokens(1, 4)).past_key_values is not None


def test_random_numbers_go_on_as_without():
    """The replay leaves the generator where the backward pass found it."""
    model, inputs = build(ROWS[1]).train(), inputs_of(ROWS[1])
    loss = model(**inputs).logits.sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
def test_autocast(inside, monkeypatch):
    """bfloat16 products, float32 streams; the weights that autocast casts keep their gradients."""
    model, inputs = build(ROWS[0], dtype=torch.float32).train(), inputs_of(ROWS[0])

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs, use_cache=False).logits.float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return parameter_gradients(model)

    found = step()
    monkeypatch.setattr(modeling_local_global, "run_reversible", plain)
    expected = step()
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 0.02 * scale, name


def test_autocast_of_two_forwards():
    """What the first casts while nothing is recorded does not cost the second its gradients."""
    model, inputs = build(ROWS[0], dtype=torch.float32).train(), inputs_of(ROWS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs, use_cache=False)
        model(**inputs, use_cache=False, output_hidden_states=True).logits.float().square().mean().backward()
    assert parameter_gradients(model).keys() == dict(model.named_parameters()).keys()


def test_frozen_weights_and_autograd_grad():
    model, inputs = build(ROWS[0]), inputs_of(ROWS[0])
    _, expected = gradients(model, inputs)
    model.requires_grad_(False)
    name = "model.layers.0.mixer.k_proj.weight"
    weight = model.get_parameter(name).requires_grad_()
    loss = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().mean()
    (found,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    assert_close(found, expected[name], "one weight")
    (again,) = torch.autograd.grad(loss, [weight])
    assert torch.equal(again, found)


class Sublayers(torch.nn.Module):
    """One weight under three names. The second function checkpoints inside."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.weight = self.same_weight = linear.weight
        self.kinds = []

    def sublayers(self, factor):
        def f(x):
            added = self.linear(x)
            self.kinds.append(added.dtype)
            return added

        def inner(x):
            return (x @ self.weight @ self.same_weight).tanh() * factor

        return [(f, lambda x: checkpoint(inner, x, use_reentrant=False))]


def test_functions_that_share_a_weight():
    """Its gradient is the sum over its places; functions may checkpoint inside."""
    x, factor = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    linear = torch.nn.Linear(4, 4).double()
    layers = torch.nn.ModuleList(Sublayers(linear) for _ in range(3))
    wanted = [x, factor, *linear.parameters()]
    found, expected = (
        torch.autograd.grad(run(x, layers, {"factor": factor}, False).square().sum(), wanted)
        for run in (run_reversible, plain)
    )
    for actual, gradient in zip(found, expected, strict=True):
        assert_close(actual, gradient)


def test_the_recomputation_is_under_the_same_autocast():
    x, layers = torch.randn(1, 3, 4, requires_grad=True), torch.nn.ModuleList([Sublayers(torch.nn.Linear(4, 4))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run_reversible(x, layers, {"factor": 1.0}, False)
    y.sum().backward()
    assert layers[0].kinds == [torch.bfloat16] * 2


def written_by(reader, encoder=None):
    """A context that has a graph, as encoders return it, and the loss of the `reader`."""
    encoder = encoder or build(ROWS[4], seed=5)
    context = encoder.model(tokens(2, 5)).last_hidden_state
    inputs = inputs_of(ROWS[3]) | {"encoder_hidden_states": context}
    return context, lambda: reader(**inputs, use_cache=False).logits.square().mean()


def by_both(monkeypatch, step):
    """What `step` returns, and what it returns where plain autograd runs."""
    found = step()
    monkeypatch.setattr(modeling_local_global, "run_reversible", plain)
    return found, step()


def test_hooks_of_the_context(monkeypatch):
    """They meet the whole gradient, once; what they return is what the encoder gets."""
    reader, encoder = build(ROWS[3]), build(ROWS[4], seed=5)

    def step():
        encoder.zero_grad(set_to_none=True)
        context, loss = written_by(reader, encoder)
        seen = []
        context.retain_grad()
        context.register_hook(lambda grad: seen.append(grad.clone()) or 3 * grad)
        loss().backward()
        (hooked,) = seen
        return {"retained": context.grad, "hooked": hooked} | parameter_gradients(encoder)

    found, expected = by_both(monkeypatch, step)
    assert_same_gradients(found, expected)


def test_hooks_of_weights(monkeypatch):
    """They meet the whole gradient, once, also where two layers share a module or a weight."""
    model = build(ROWS[3])
    first, second = model.model.layers
    second.mlp, second.mixer.q_proj.weight = first.mlp, first.mixer.q_proj.weight
    seen = {}

    def record(name, grad):
        assert name not in seen, f"a second gradient of {name}"
        seen[name] = grad.clone()

    for name, weight in model.named_parameters():
        weight.register_hook(lambda grad, name=name: record(name, grad) or 3 * grad)
        weight.register_post_accumulate_grad_hook(lambda weight, name=name: record(f"{name}.grad", weight.grad))

    def step():
        seen.clear()
        model.zero_grad(set_to_none=True)
        written_by(model)[1]().backward()
        return dict(seen) | {f"{name}.left": grad for name, grad in parameter_gradients(model).items()}

    found, expected = by_both(monkeypatch, step)
    assert_same_gradients(found, expected)


def test_encoder_and_decoder_share_weights(monkeypatch):
    """The recomputation of the decoder does not enter the graph of the encoder."""
    reader, encoder = build(ROWS[3]), build(ROWS[4], seed=5)
    encoder.model.layers[0].mlp.down_proj = reader.model.layers[1].mlp.down_proj

    def step():
        reader.zero_grad(set_to_none=True)
        encoder.zero_grad(set_to_none=True)
        written_by(reader, encoder)[1]().backward()
        return parameter_gradients(torch.nn.ModuleDict({"reader": reader, "encoder": encoder}))

    found, expected = by_both(monkeypatch, step)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("name", ["weight", "context"])
def test_a_change_before_the_backward_pass_is_told(name):
    model = build(ROWS[3])
    inputs = inputs_of(ROWS[3])
    loss = model(**inputs, use_cache=False).logits.sum()
    changed = model.model.layers[0].mixer.q_proj.weight if name == "weight" else inputs["encoder_hidden_states"]
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
