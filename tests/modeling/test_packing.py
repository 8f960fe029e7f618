"""Each packed document gets what it gets alone, whichever of the three forms names the boundaries."""

import itertools

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.modeling.exact import (
    add_gradients,
    assert_close,
    assert_same_gradients,
    assert_same_states,
    backward,
    run,
    tokens,
    weights_like,
)
from tests.variants import every_row, few_rows

LENGTHS = [5, 1, 9, 4, 2]
FORMS = ("position_ids", "cu_seq_lens", "seq_idx")
every_form = pytest.mark.parametrize("forms", [*[(form,) for form in FORMS], FORMS], ids="+".join)


def boundaries(lengths, forms=FORMS):
    """The keyword arguments that DataCollatorWithFlattening would give for one row of documents."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    given = {}
    if "position_ids" in forms:
        given["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    if "cu_seq_lens" in forms:
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        given |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    if "seq_idx" in forms:
        idx = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])
        given["seq_idx"] = idx[None]
    return given


def spans(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


@every_row
@every_form
@pytest.mark.parametrize("use_cache", [False, True], ids=["training", "use_cache"])
def test_documents_are_alone(row, forms, use_cache):
    model, ids = row.build(), tokens(1, sum(LENGTHS))
    with torch.no_grad():
        logits = model(ids, use_cache=use_cache, **boundaries(LENGTHS, forms)).logits
        for span in spans(LENGTHS):
            assert_close(logits[:, span], model(ids[:, span], use_cache=False).logits, f"tokens {span}")


@every_row
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_alone(row, form):
    model, ids = row.build(), tokens(1, sum(LENGTHS))
    embeds = model.get_input_embeddings()(ids)
    cotangent = weights_like(torch.empty(*ids.shape, model.config.vocab_size, dtype=torch.float64))
    _, grad, parameters = backward(model, embeds, cotangent, **boundaries(LENGTHS, (form,)))
    total = {}
    for span in spans(LENGTHS):
        _, expected, more = backward(model, embeds[:, span], cotangent[:, span])
        assert_close(grad[:, span], expected, f"embeddings of {span}")
        total = add_gradients(total, more)
    assert_same_gradients(parameters, total)


@every_row
@pytest.mark.parametrize("forms", [("position_ids",), ("seq_idx",), ("position_ids", "seq_idx")], ids="+".join)
def test_rows_of_different_packing(row, forms):
    packings = ([3, 8, 1, 6], [12, 2, 4], [18])
    model, ids = row.build(), tokens(3, 18)
    given = [boundaries(lengths, forms) for lengths in packings]
    given = {name: torch.cat([one[name] for one in given]) for name in given[0]}
    with torch.no_grad():
        logits = model(ids, use_cache=False, **given).logits
    for b, lengths in enumerate(packings):
        for span in spans(lengths):
            assert_close(logits[b : b + 1, span], run(model, ids[b : b + 1, span])[0], f"row {b}, tokens {span}")


@every_row
@pytest.mark.parametrize("forms", [("position_ids",), ("seq_idx",), ("cu_seq_lens", "seq_idx")], ids="+".join)
def test_packed_row_with_a_padded_tail(row, forms):
    """Fixed-length packing fills the row up: the tail is padding by attention_mask."""
    model, ids = row.build(), tokens(1, sum(LENGTHS) + 3)
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    lengths = [*LENGTHS[:-1], LENGTHS[-1] + 3]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False, **boundaries(lengths, forms)).logits
    for span in spans(LENGTHS):
        assert_close(logits[:, span], run(model, ids[:, span])[0], f"tokens {span}")


@few_rows
def test_position_ids_with_a_mask_of_ones(row):
    """A tokenizer's all-ones attention_mask beside packed position_ids must not switch the boundaries off."""
    model, ids = row.build(), tokens(1, sum(LENGTHS))
    with torch.no_grad():
        logits = model(
            ids, attention_mask=torch.ones_like(ids), use_cache=False, **boundaries(LENGTHS, FORMS[:1])
        ).logits
    for span in spans(LENGTHS):
        assert_close(logits[:, span], run(model, ids[:, span])[0], f"tokens {span}")


@few_rows
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
def test_softmax_implementations(row, implementation, form):
    model, ids = row.build(attn_implementation=implementation), tokens(1, sum(LENGTHS))
    with torch.no_grad():
        logits = model(ids, use_cache=False, **boundaries(LENGTHS, (form,))).logits
    for span in spans(LENGTHS):
        # Stock eager attention takes its softmax in float32.
        assert_close(logits[:, span], run(model, ids[:, span])[0], f"tokens {span}", tolerance=1e-6)


@few_rows
@pytest.mark.parametrize("form", FORMS)
def test_long_documents(row, form):
    """Boundaries inside chunks of 64, at their edges, and documents of several chunks."""
    lengths = [64, 1, 130, 63, 2]
    model, ids = row.build(max_position_embeddings=300), tokens(1, sum(lengths))
    with torch.no_grad():
        logits = model(ids, use_cache=False, **boundaries(lengths, (form,))).logits
    for span in spans(lengths):
        assert_close(logits[:, span], run(model, ids[:, span])[0], f"tokens {span}")


@every_row
def test_states_after_packing_are_the_last_documents(row):
    model, ids = row.build(), tokens(1, sum(LENGTHS))
    expected = run(model, ids[:, spans(LENGTHS)[-1]])[1]
    for form in FORMS:
        assert_same_states(run(model, ids, **boundaries(LENGTHS, (form,)))[1], expected)


@few_rows
@pytest.mark.parametrize(
    "options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=["plain", "all"]
)
def test_loss_of_the_stock_collator(row, options):
    """DataCollatorWithFlattening's batch, loss and gradients, against the documents one by one."""
    model = row.build()
    documents = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": d} for d in documents])
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = sum(n - 1 for n in LENGTHS)
    total = 0
    for document in documents:
        if len(document) > 1:
            ids = torch.tensor([document])
            total = total + model(ids, labels=ids, use_cache=False).loss * (len(document) - 1) / count
    total.backward()
    assert_close(loss.detach(), total.detach(), "loss", tolerance=1e-6)  # float32 in the stock loss
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(packed, alone, tolerance=1e-5)


@few_rows
def test_one_document_is_no_packing(row):
    model, ids = row.build(), tokens(1, 17)
    expected, expected_cache = run(model, ids)
    for form in FORMS:
        actual, cache = run(model, ids, **boundaries([17], (form,)))
        assert_close(actual, expected, form)
        assert_same_states(cache, expected_cache)


@few_rows
def test_seq_idx_may_repeat_ids(row):
    """Only a change between neighbours counts; ids need not be unique or in order."""
    model, ids = row.build(), tokens(1, 12)
    seq_idx = torch.tensor([[4] * 5 + [1] * 3 + [4] * 4], dtype=torch.int32)
    with torch.no_grad():
        logits = model(ids, seq_idx=seq_idx, use_cache=False).logits
    for span in spans([5, 3, 4]):
        assert_close(logits[:, span], run(model, ids[:, span])[0], f"tokens {span}")


@few_rows
def test_shared_position_ids_broadcast(row):
    """position_ids [1, T] serve every row of the batch, as in transformers."""
    model, ids = row.build(), tokens(3, 9)
    expected, _ = run(model, ids)
    assert_close(run(model, ids, position_ids=torch.arange(9)[None])[0], expected, "plain positions")
    packed = boundaries([4, 5], ("position_ids",))
    with torch.no_grad():
        logits = model(ids, use_cache=False, **packed).logits
    for span in spans([4, 5]):
        assert_close(logits[:, span], run(model, ids[:, span])[0], f"tokens {span}")


@few_rows
def test_contradictory_or_wrong_boundaries_are_refused(row):
    model, ids = row.build(), tokens(2, 6)
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens"):
        model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    with pytest.raises(ValueError, match="cu_seq_lens"):
        model(ids[:1], cu_seq_lens_q=ends[:2], cu_seq_lens_k=ends[:2])
    with pytest.raises(ValueError, match="seq_idx"):
        model(ids, seq_idx=torch.zeros(2, 5, dtype=torch.int32))
