"""Every family: values, gradients, packed documents, padding and generation with lalm's kernels under it."""

import pytest
import torch

from lalm.transformers_models import use_in_transformers
from tests.modeling.test_training import enable_checkpointing
from tests.transformers_models.tiny import CONFIGS, tiny, tokens

LENGTH, CUT = 21, 9
every_family = pytest.mark.parametrize("model_type", CONFIGS)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """For sizes as small as these, too."""
    monkeypatch.setattr("lalm.modeling.ops.dispatch.EARNS_COMPILING", 0)
    monkeypatch.setattr("lalm.modeling.ops.dispatch.WORTH_A_CONV_KERNEL", 0)


def error(found, expected):
    """Relative to the size of all that is compared."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model, logits):
    weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits).to(logits.dtype)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logits * weight).sum(), weights, allow_unused=True)
    return torch.cat([g.flatten().double() for g in found if g is not None])


@every_family
def test_values_and_gradients(model_type):
    model, ids = tiny(model_type), tokens(2, LENGTH)
    stock = model(ids).logits
    stock_gradients = gradients(model, stock)
    with use_in_transformers():
        found = model(ids).logits
        found_gradients = gradients(model, found)
        model.double()
        exact = model(ids).logits
        exact_gradients = gradients(model, exact)
    assert not torch.equal(found, stock)  # other code has run
    for ours, theirs, expected in ((found, stock, exact), (found_gradients, stock_gradients, exact_gradients)):
        assert error(theirs, expected) < 2e-5
        assert error(ours, expected) < max(2e-6, 1.5 * error(theirs, expected))


@every_family
def test_documents_are_separate(model_type):
    model, ids = tiny(model_type), tokens(1, LENGTH)
    positions = torch.cat([torch.arange(CUT), torch.arange(LENGTH - CUT)])[None]
    forms = [
        {"position_ids": positions},
        {"cu_seq_lens_q": torch.tensor([0, CUT, LENGTH])},
        {"seq_idx": torch.tensor([[0] * CUT + [1] * (LENGTH - CUT)])},
    ]
    with use_in_transformers():
        expected = torch.cat([model(ids[:, :CUT]).logits, model(ids[:, CUT:]).logits], 1)
        whole = model(ids).logits
        assert error(whole, expected) > 0.01  # a document would notice the one before
        for form in forms:
            assert error(model(ids, **form).logits, expected) < 2e-6
        found = gradients(model, model(ids, **forms[0]).logits)
        assert error(found, gradients(model, expected)) < 5e-6
        with pytest.raises(ValueError, match="Packed documents have no common cache"):
            model(ids, use_cache=True, **forms[2])


@every_family
def test_padding(model_type):
    """Two turns of a conversation, rows of unequal lengths padded on the left in both; then one row alone."""
    model, ids = tiny(model_type), tokens(2, 18)
    turns = [(12, 6), (9, 2)]
    first, second = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, (before, after) in enumerate(turns):
        first[row, 12 - before :] = ids[row, :before]
        second[row, 6 - after :] = ids[row, before : before + after]
    mask = torch.cat([first, second], 1).ne(0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    has_positions = model_type != "mamba2"

    def options(part):
        return {"position_ids": positions[:, part]} if has_positions else {}

    with torch.no_grad(), use_in_transformers():
        one = model(first, attention_mask=mask[:, :12], use_cache=True, **options(slice(0, 12)))
        name = "past_key_values" if has_positions else "cache_params"
        two = model(second, attention_mask=mask, use_cache=True, **{name: one[name]}, **options(slice(12, None)))
        alone = model(first[1:], attention_mask=mask[1:, :12])
        for row, (before, after) in enumerate(turns):
            expected = model(ids[row : row + 1, : before + after]).logits[0]
            assert error(one.logits[row, 12 - before :], expected[:before]) < 2e-6
            assert error(two.logits[row, 6 - after :], expected[before:]) < 2e-6
        if not has_positions:
            assert error(alone.logits[0, 3:], one.logits[1, 3:]) < 2e-6


@every_family
def test_generation(model_type):
    model, ids = tiny(model_type), tokens(2, 12)
    ids[0, :4], mask = 0, torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    expected = model.generate(ids, **options)
    with use_in_transformers():
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(ids, **options | {"use_cache": False}), expected)


@every_family
def test_save_and_load(model_type, tmp_path):
    """What is saved with the door open is a stock checkpoint, and the other way round."""
    model, ids = tiny(model_type), tokens(2, LENGTH)
    with torch.no_grad():
        stock = model(ids).logits
        with use_in_transformers():
            expected = model(ids).logits
            model.save_pretrained(tmp_path)
            loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
            assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(loaded(ids).logits, stock)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert "forward" not in vars(loaded)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "kimi_linear", "falcon_h1"])
def test_checkpointed_gradients(model_type):
    model, ids = tiny(model_type), tokens(1, LENGTH)
    with use_in_transformers():
        expected = gradients(model, model(ids, use_cache=False).logits)
        enable_checkpointing(model.train())
        assert error(gradients(model, model(ids, use_cache=False).logits), expected) < 1e-6


def test_compiled_models_run_the_stock_functions():
    model, ids = tiny("mamba2", num_hidden_layers=1), tokens(1, LENGTH)
    with torch.no_grad(), use_in_transformers():
        compiled = torch.compile(model, backend="eager")(ids, use_cache=False).logits
        assert error(compiled, model(ids, use_cache=False).logits) < 2e-6


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "kimi_linear", "mamba2"])
def test_bfloat16(model_type):
    model, ids = tiny(model_type).bfloat16(), tokens(1, LENGTH)
    with torch.no_grad():
        stock = model(ids).logits
        with use_in_transformers():
            found = model(ids).logits
            model.float()
            exact = model(ids).logits
    assert found.dtype == stock.dtype
    assert error(found, exact) < 1.5 * error(stock, exact)
