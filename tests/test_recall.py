"""Multi-query associative recall: the texts, their labels under the stock causal loss, and the accuracy."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from lalm.recall.task import (
    evaluate_recall,
    multi_query_associative_recall,
    predicted_tokens,
    recall_accuracy,
)

SIZES = [(60, 12, 3), (130, 64, 16), (8192, 64, 4), (300, 256, 64), (10, 8, 2)]


def arrays(*sizes, **options):
    """input_ids and labels `[N, L]` of texts of the given vocabulary, number, length and pairs."""
    texts = multi_query_associative_recall(*sizes, **options).with_format("numpy")[:]
    return texts["input_ids"], texts["labels"]


def queries_of(ids, labels):
    """[(position of the key, key, value)], found word by word: the slow reading of the task."""
    return [(at - 1, int(ids[at - 1]), int(label)) for at, label in enumerate(labels) if label != -100]


@pytest.mark.parametrize(("vocab_size", "length", "pairs"), SIZES)
def test_every_text_obeys_the_rules(vocab_size, length, pairs):
    for ids, labels in zip(*arrays(vocab_size, 50, length, pairs), strict=True):
        assert ids.shape == labels.shape == (length,)
        assert ids.min() >= 0
        assert ids.max() < vocab_size
        told = dict(zip(ids[0 : 2 * pairs : 2].tolist(), ids[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(told) == len(set(told.values())) == pairs
        assert all(1 <= key < vocab_size // 2 <= value for key, value in told.items())
        asked = queries_of(ids, labels)
        assert {key: value for _, key, value in asked} == told
        assert len(asked) == pairs
        assert all(at >= 2 * pairs and at % 2 == 0 for at, _, _ in asked)


def test_filling_is_token_0_or_any_token():
    plain, labels = arrays(64, 10_000, 24, 3, random_non_queries=False)
    filled, _ = arrays(64, 10_000, 24, 3)
    free = np.ones(plain.shape, dtype=bool)
    free[:, :6] = False
    free[:, :-1] &= labels[:, 1:] == -100
    assert not plain[free].any()
    assert plain[~free].all()
    counts = np.bincount(filled[free], minlength=64)
    assert abs(counts / counts.mean() - 1).max() < 0.1  # five standard deviations


def expected_order(rates, count):
    """Probability of every ordered draw of `count` without replacement, one draw after the other."""
    found = {}
    for order in itertools.permutations(range(len(rates)), count):
        probability, left = 1.0, sum(rates)
        for item in order:
            probability, left = probability * rates[item] / left, left - rates[item]
        found[order] = probability
    return found


def chi_square_is_ordinary(rows, expected):
    counts = dict.fromkeys(expected, 0)
    for row in rows.tolist():
        counts[tuple(row)] += 1
    assert sum(expected.values()) == pytest.approx(1)
    distance = sum((counts[k] - len(rows) * p) ** 2 / (len(rows) * p) for k, p in expected.items())
    freedom = len(expected) - 1
    assert abs(distance - freedom) < 4 * (2 * freedom) ** 0.5, (distance, freedom)


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_are_drawn_by_the_power_law_without_replacement(power):
    pairs, length = 3, 16
    ids, labels = arrays(40, 30_000, length, pairs, power=power)
    keys = ids[:, : 2 * pairs : 2]
    position = {(row, key): at for row in range(len(ids)) for at, key, _ in queries_of(ids[row], labels[row])}
    gaps = np.array([[(position[row, key] - 2 * pairs) // 2 for key in keys[row]] for row in range(len(ids))])
    chi_square_is_ordinary(gaps, expected_order([(g + 1) ** (power - 1) for g in range(length // 2 - pairs)], pairs))


def test_keys_and_values_are_drawn_evenly():
    ids, _ = arrays(11, 30_000, 8, 2)
    chi_square_is_ordinary(ids[:, 0:4:2] - 1, expected_order([1] * 4, 2))
    chi_square_is_ordinary(ids[:, 1:4:2] - 5, expected_order([1] * 6, 2))


@pytest.mark.parametrize(("length", "pairs", "mean", "first"), [(256, 16, 88, 0.185), (512, 64, 251, None)])
def test_queries_of_the_published_sizes(length, pairs, mean, first):
    """Mean position of a query and probability of the first gap, from the formula of the paper."""
    ids, labels = arrays(8192, 4000, length, pairs)
    positions = np.nonzero(labels != -100)[1] - 1
    assert positions.mean() == pytest.approx(mean, abs=1)
    if first is not None:
        query = ids[np.arange(len(ids)), 2 * pairs]
        assert (query == ids[:, 0]).mean() == pytest.approx(first, abs=0.02)


def test_seed_decides():
    one, again, other = (arrays(64, 20, 16, 2, seed=seed)[0] for seed in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any(axis=1).all()


def test_large_data_sets_are_made_in_pieces(monkeypatch):
    """Pieces of the draws change nothing that is drawn, pieces of the columns nothing that is read."""
    whole = arrays(64, 33, 40, 5)
    monkeypatch.setattr("lalm.recall.task._DRAWN_AT_ONCE", 100)
    monkeypatch.setattr("lalm.recall.task._NUMBERS_A_CHUNK", 100)
    for part, expected in zip(arrays(64, 33, 40, 5), whole, strict=True):
        assert (part == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 15}, "length must be even"),
        ({"num_pairs": 5}, "length must be at least 20, or num_pairs at most 4"),
        ({"num_pairs": 0}, "num_pairs must be at least 1"),
        ({"vocab_size": 16}, "vocab_size must be above length: at least 17"),
        ({"num_examples": 0}, "num_examples must be at least 1"),
        ({"power": 0.0}, "power must be positive"),
        ({"power": float("nan")}, "power must be positive"),
    ],
)
def test_errors_name_the_argument(change, message):
    sizes = {"vocab_size": 40, "num_examples": 2, "length": 16, "num_pairs": 2}
    with pytest.raises(ValueError, match=message):
        multi_query_associative_recall(**sizes | change)


class LookUp(nn.Module):
    """Answers at a key with the token that followed its first appearance, and nowhere else with anything sure."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.scale = vocab_size, nn.Parameter(torch.tensor(50.0))

    device = torch.device("cpu")

    def forward(self, input_ids, labels=None, use_cache=None):
        same = input_ids[:, :, None] == input_ids[:, None, :]
        even = torch.arange(input_ids.shape[1]) % 2 == 0  # keys, where they are told
        first = (same & even).float().argmax(dim=-1)
        answers = input_ids.gather(1, (first + 1).clamp(max=input_ids.shape[1] - 1))
        logits = self.scale * nn.functional.one_hot(answers, self.vocab_size)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


def test_one_who_looks_up_is_always_right_and_has_no_loss():
    texts = multi_query_associative_recall(200, 60, 64, 16)
    model = LookUp(200).train()
    assert evaluate_recall(model, texts, batch_size=7) == 1
    assert model.training
    batch = texts.with_format("torch")[:]
    assert model(batch["input_ids"], batch["labels"]).loss < 1e-6


def test_the_stock_trainer_takes_texts_and_metric(tmp_path):
    """Its collator, its loss and its loop of evaluation, with nothing of ours but the data and the metric."""
    arguments = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(
        LookUp(70),
        arguments,
        eval_dataset=multi_query_associative_recall(70, 30, 32, 4),
        compute_metrics=lambda found: {"recall": recall_accuracy(found.predictions, found.label_ids)},
        preprocess_logits_for_metrics=predicted_tokens,
    )
    figures = trainer.evaluate()
    assert figures["eval_recall"] == 1
    assert figures["eval_loss"] < 1e-6


def test_the_loss_of_a_stock_model_is_the_unshifted_loss_of_the_paper():
    """Cross-entropy of the value under the logits at the key's own position, found without the labels' places."""
    texts = multi_query_associative_recall(50, 6, 24, 3, random_non_queries=False).with_format("torch")[:]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, initializer_range=0.5)).eval()
    out = model(texts["input_ids"], labels=texts["labels"])
    losses = []
    for ids, logits in zip(texts["input_ids"].tolist(), out.logits, strict=True):
        told = dict(zip(ids[0:6:2], ids[1:6:2], strict=True))
        losses += [-logits[at].log_softmax(-1)[told[ids[at]]] for at in range(6, 24) if ids[at] in told]
    assert len(losses) == 18
    assert out.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("pairs", [2, 4, 16])
def test_guessing_among_the_values_of_the_text_is_chance(pairs):
    ids, labels = arrays(200, 3000, 64, pairs)
    values = ids[:, 1 : 2 * pairs : 2]
    guesses = values[np.arange(len(ids))[:, None], np.random.default_rng(1).integers(pairs, size=ids.shape)]
    assert recall_accuracy(guesses, labels) == pytest.approx(1 / pairs, abs=0.02)


def test_every_text_counts_alike():
    labels = np.array([[-100, -100, 5, -100, 6], [-100, 7, 8, 9, 9]])
    predictions = np.array([[1, 5, 1, 1, 6], [7, 8, 9, 9, 9]])  # one of two, then all of four; last column unread
    assert recall_accuracy(predictions, labels) == 0.75
    assert recall_accuracy(predictions[:1], labels[:1]) == 0.5


def test_accuracy_refuses_what_it_cannot_count():
    labels = np.full((2, 4), -100)
    with pytest.raises(ValueError, match="labels must name at least one token"):
        recall_accuracy(np.zeros((2, 4)), labels)
    with pytest.raises(ValueError, match="one shape"):
        recall_accuracy(np.zeros((2, 3)), labels)
