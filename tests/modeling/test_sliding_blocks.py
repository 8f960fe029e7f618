"""Sliding layers in blocks are the stock attention under a mask `[T, T]`, which they do not make."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from lalm.modeling import model_inputs
from lalm.modeling.model_inputs import attends_in_blocks
from tests.modeling.exact import assert_close, assert_same_gradients, backward, run, tokens, weights_like
from tests.modeling.test_packing import boundaries
from tests.variants import ENCODERS, ROWS

LENGTH = 29
SLIDING = [row for row in (*ROWS, *ENCODERS) if "sliding_window" in row.fields]
sliding_rows = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in SLIDING])
causal_rows = pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in SLIDING if row in ROWS])
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH + 5),
}


@pytest.fixture
def path(monkeypatch):
    """path("stock") takes the stock attention everywhere; path("blocks") refuses its masks."""

    def refuse(**kwargs):
        raise AssertionError("a mask [T, T] was asked for")

    def take(name):
        monkeypatch.undo()
        if name == "stock":
            monkeypatch.setattr(model_inputs, "attends_in_blocks", lambda *args: False)
        else:
            monkeypatch.setattr(model_inputs, "create_sliding_window_causal_mask", refuse)

    return take


def given(kind):
    """Padding and packed documents of two rows, as keyword arguments."""
    kwargs = {}
    if "packed" in kind:
        kwargs["seq_idx"] = torch.cat([boundaries([3, 14, 12], ("seq_idx",))["seq_idx"]] * 2)
        kwargs["seq_idx"][1] = torch.arange(LENGTH) // 9
    if kind not in ("plain", "packed"):
        mask = kwargs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        slots = {"left": slice(0, 11), "right": slice(20, None), "interior": slice(5, 8)}
        mask[0, slots[kind.removeprefix("packed_")]] = 0
        mask[1, ::4] = 0
    return kwargs


@sliding_rows
@pytest.mark.parametrize("kind", ["plain", "left", "right", "interior", "packed", "packed_left", "packed_interior"])
def test_blocks_are_the_stock_attention(row, kind, path):
    head = "AutoModelForMaskedLM" if row in ENCODERS else "AutoModelForCausalLM"
    model, ids, kwargs = row.build(head), tokens(2, LENGTH), given(kind)
    embeds = model.get_input_embeddings()(ids)
    real = kwargs.get("attention_mask", torch.ones_like(ids)).bool()[..., None]
    cotangent = real * weights_like(torch.empty(2, LENGTH, model.config.vocab_size, dtype=torch.float64))
    path("stock")
    expected, expected_grad, expected_parameters = backward(model, embeds, cotangent, **kwargs)
    path("blocks")
    logits, grad, parameters = backward(model, embeds, cotangent, **kwargs)
    assert logits.isfinite().all()
    assert_close(logits * real, expected * real, "logits")
    assert_close(grad, expected_grad, "embeddings")
    assert_same_gradients(parameters, expected_parameters)


@causal_rows
@pytest.mark.parametrize("kind", ["plain", "left", "interior", "packed"])
@pytest.mark.parametrize("cache_class", CACHES)
def test_caches_go_on_after_a_prefill_in_blocks(row, kind, cache_class, path):
    """The first tokens after it look at keys and values that the prefill has left."""
    model, ids, kwargs = row.build(), tokens(2, LENGTH + 3), given(kind)
    mask = kwargs.get("attention_mask", torch.ones(2, LENGTH, dtype=torch.long))
    found = {}
    for name in ("stock", "blocks"):
        path(name)
        logits, cache = run(model, ids[:, :LENGTH], past_key_values=CACHES[cache_class](model.config), **kwargs)
        logits = logits * mask[..., None]
        path("stock")
        for t in range(LENGTH, LENGTH + 3):
            mask_so_far = torch.cat([mask, mask.new_ones(2, t + 1 - LENGTH)], 1)
            step, cache = run(model, ids[:, t : t + 1], past_key_values=cache, attention_mask=mask_so_far)
            logits = torch.cat([logits, step], 1)
        found[name] = logits
    assert_close(found["blocks"], found["stock"], "logits")


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_nothing_grows_as_the_square_of_the_length(kind, path):
    (row,) = [row for row in SLIDING if row.name == "linear_hybrid_sliding"]
    length = 1024
    model, ids = row.build("AutoModel", max_position_embeddings=length), tokens(1, length)
    kwargs = {"seq_idx": torch.arange(length)[None] // 300} if kind == "packed" else {}
    if kind == "padded":
        kwargs["attention_mask"] = (torch.arange(length)[None] > 100).long()
    found = {}
    for name in ("stock", "blocks"):
        path(name)
        with torch.no_grad(), _Largest() as largest:
            model(ids, use_cache=False, **kwargs)
        found[name] = largest.elements
    assert found["stock"] >= length**2, "the measurement sees masks"
    assert found["blocks"] < length**2 / 4


def test_where_blocks_run():
    (row,) = [row for row in SLIDING if row.name == "linear_hybrid_sliding"]
    model = row.build()
    config, window = model.config, model.config.sliding_window
    empty = DynamicCache(config=config)
    _, filled = run(model, tokens(1, 3 * window + 1))
    assert attends_in_blocks(config, 3 * window + 1, None)
    assert attends_in_blocks(config, 3 * window + 1, empty)
    assert not attends_in_blocks(config, 3 * window, None), "a short text"
    assert not attends_in_blocks(config, 3 * window + 1, filled)
    eager = row.config(attn_implementation="eager")
    assert not attends_in_blocks(eager, 3 * window + 1, None), "its weights can be asked for"


def test_a_mask_by_layer_type_is_taken_as_it_is():
    """What generate() passes to compiled steps; a kind that is missing there is not one that runs in blocks."""
    (row,) = [row for row in SLIDING if row.name == "linear_hybrid_sliding"]
    model, ids = row.build(), tokens(1, LENGTH)
    expected, _ = run(model, ids)
    steps = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    window = ((steps >= 0) & (steps < model.config.sliding_window))[None, None]
    with torch.no_grad():
        logits = model(ids, attention_mask={"sliding_attention": window}, use_cache=False).logits
        assert_close(logits, expected, "logits")
        with pytest.raises(KeyError, match="sliding_attention"):
            model(ids, attention_mask={}, use_cache=False)
