"""Classification heads: which token is pooled, and which loss is taken."""

import pytest
import torch
from torch.nn import functional as F
from transformers.modelcard import TASK_MAPPING

import lalm
from tests.modeling.exact import assert_close, tokens
from tests.variants import each_variant, every_row

SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
LENGTH = 13


def masks():
    left, right, interior = torch.ones(3, 2, LENGTH, dtype=torch.long)
    left[0, :5] = right[0, 6:] = interior[0, 3:7] = 0
    interior[1, 12:] = 0
    return {"left": left, "right": right, "interior": interior}


@every_row
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize("filler", ["pad", "real"])
def test_sequence_head_pools_the_last_real_token(row, kind, filler):
    """Also where padding holds ordinary ids: the mask decides, and pad ids serve where there is no mask."""
    model, ids, mask = row.build(SEQUENCE, num_labels=3), tokens(2, LENGTH), masks()[kind]
    if filler == "pad":
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for b in range(2):
            alone = model(ids[b : b + 1, mask[b].bool()]).logits
            assert_close(logits[b : b + 1], alone, f"row {b}")


@each_variant
def test_sequence_head_is_score_of_the_hidden_state(row):
    model, ids = row.build(SEQUENCE, num_labels=3), tokens(2, LENGTH)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        assert_close(model(ids).logits, model.score(hidden)[:, -1], "logits")
        embeds = model.get_input_embeddings()(ids)
        mask = torch.ones_like(ids)
        assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids).logits, "from embeddings")
    with pytest.raises(ValueError, match="attention_mask"):
        model(inputs_embeds=embeds)


@each_variant
def test_batch_without_pad_token_is_refused(row):
    model = row.build(SEQUENCE, num_labels=3, pad_token_id=None)
    with pytest.raises(ValueError, match="pad"):
        model(tokens(2, LENGTH))
    assert model(tokens(1, LENGTH)).logits.shape == (1, 3)


@every_row
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_token_head_under_padding(row, kind):
    model, ids, mask = row.build(TOKEN, num_labels=4), tokens(2, LENGTH), masks()[kind]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert logits.shape == (2, LENGTH, 4)
        for b in range(2):
            real = mask[b].bool()
            assert_close(logits[b : b + 1, real], model(ids[b : b + 1, real]).logits, f"row {b}")


@each_variant
def test_token_loss(row):
    model, ids = row.build(TOKEN, num_labels=4), tokens(2, LENGTH)
    labels = torch.randint(0, 4, ids.shape)
    labels[0, :3] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert_close(out.loss.double(), expected, "loss", tolerance=1e-6)


PROBLEMS = {
    "regression": (1, torch.tensor([0.5, -1.0]), lambda z, y: F.mse_loss(z[:, 0], y)),
    "single_label_classification": (3, torch.tensor([2, 0]), F.cross_entropy),
    "multi_label_classification": (
        3,
        torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
        F.binary_cross_entropy_with_logits,
    ),
}


@each_variant
@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_types(row, problem):
    num_labels, labels, expected = PROBLEMS[problem]
    model = row.build(SEQUENCE, dtype=torch.float32, num_labels=num_labels)
    for problem_type in (None, problem):  # told, or found out from the labels
        model.config.problem_type = problem_type
        out = model(tokens(2, LENGTH), labels=labels)
        assert_close(out.loss, expected(out.logits, labels), str(problem_type), tolerance=1e-6)
        out.loss.backward()
        assert model.score.weight.grad.abs().max() > 0


@each_variant
@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
@pytest.mark.slow
def test_labels_by_name_survive_saving(row, head, tmp_path):
    names = {0: "no", 1: "yes"}
    model = row.build(head, id2label=names, label2id={v: k for k, v in names.items()})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == names
    assert loaded.config.num_labels == 2
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits, "logits")


@each_variant
def test_heads_are_known_by_name(row):
    """Where transformers goes by the names of classes (its Trainer, model cards), ours are among them."""
    tasks = {
        "AutoModelForCausalLM": "text-generation",
        "AutoModelForMaskedLM": "fill-mask",
        "AutoModelForSequenceClassification": "text-classification",
        "AutoModelForTokenClassification": "token-classification",
    }
    (variant,) = [variant for variant in lalm.VARIANTS if variant.config is row.config_class]
    for head, task in tasks.items():
        if head in variant.models:
            assert variant.models[head].__name__ in TASK_MAPPING[task].values()
