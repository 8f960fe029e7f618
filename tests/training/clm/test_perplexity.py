"""Perplexity against a hand computation, and the accuracy module."""

import math

import evaluate
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, EvalPrediction, LlamaConfig, LlamaForCausalLM

from lalm.training.clm.arguments import ClmTrainingArguments, parse_arguments
from lalm.training.clm.model_builder import new_config
from lalm.training.clm.packing import PackedDataset, PackingCollator, TokenStream
from lalm.training.clm.perplexity import TOKEN_ACCURACY, TokenMetrics, score_tokens
from lalm.training.clm.trainer import ClmTrainer
from tests.training.conftest import TINY_MODELS

VOCABULARY, BLOCK = 50, 8


@pytest.fixture
def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def stream():
    """37 tokens, documents at 0, 11 and 13."""
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, 37).astype(np.int32)
    starts = np.zeros(37, dtype=bool)
    starts[[0, 11, 13]] = True
    return TokenStream(tokens, starts)


def by_hand(model, stream, stride, separate):
    """Score each token by its own forward pass over exactly the context that its window gives it."""
    total, right, count = 0.0, 0, 0
    done = 0
    for begin in range(0, len(stream.tokens), stride):
        end = min(begin + BLOCK, len(stream.tokens))
        for position in range(max(done, begin + 1), end):
            if separate and stream.starts[position]:
                continue
            first = begin
            if separate:
                first = max(first, int(np.flatnonzero(stream.starts[: position + 1])[-1]))
            context = torch.from_numpy(stream.tokens[first:position].astype(np.int64))[None]
            log_p = model(input_ids=context).logits[0, -1].float().log_softmax(-1)
            total -= log_p[stream.tokens[position]].item()
            right += int(log_p.argmax() == stream.tokens[position])
            count += 1
        done = end
        if end == len(stream.tokens):
            break
    return total / count, right / count, count


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("separate", [True, False])
@torch.no_grad()
def test_trainer_figures_equal_a_hand_computation(model, stream, stride, separate, batch_size, tmp_path):
    loss, accuracy, count = by_hand(model, stream, stride, separate)
    arguments = ClmTrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=batch_size, disable_tqdm=True
    )
    trainer = ClmTrainer(model=model, args=arguments, data_collator=PackingCollator(BLOCK, 0))
    metrics = trainer.evaluate(PackedDataset(stream, BLOCK, stride, separate))
    assert metrics["eval_tokens_scored"] == count
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(accuracy)


def test_a_mean_of_batch_means_would_be_wrong():
    """One batch scores 1 token at loss log 4, the next 3 tokens at loss 0: 4 tokens, not 2 batches."""
    metrics = TokenMetrics()
    sure = torch.zeros(1, 4, 4)
    sure[0, :, 0] = 1e4
    parts = [
        (torch.zeros(1, 4, 4), torch.tensor([[-100, -100, 2, -100]])),
        (sure, torch.tensor([[0, 0, 0, 0]])),
    ]
    for i, (logits, labels) in enumerate(parts):
        prediction = EvalPrediction(predictions=score_tokens(logits, labels), label_ids=labels)
        result = metrics(prediction, compute_result=i == 1)
    assert result["nll"] == pytest.approx(math.log(4) / 4)
    assert result["tokens_scored"] == 4
    assert metrics.tokens == 0, "the next evaluation must start at zero"


def test_score_tokens_never_scores_the_first_position():
    predicted, losses = score_tokens(torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)))
    assert (predicted[:, 0] == 0).all()
    assert (losses[:, 0] == 0).all()
    assert (losses[:, 1:] > 0).all()


def test_accuracy_module_loads_offline_and_counts():
    metric = evaluate.load(TOKEN_ACCURACY)
    result = metric.compute(predictions=[[1, 2, 3], [4]], references=[[1, 5, -100], [4]])
    assert result == {"accuracy": 2 / 3, "num_tokens": 3}
    assert math.isnan(metric.compute(predictions=[[1]], references=[[-100]])["accuracy"])


def smoothed_by_hand(model, batch, smoothing: float) -> tuple[float, int]:
    """Sum of torch's label-smoothed cross-entropy over the tokens that carry a label, and their number."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, labels = (
        model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
    )
    scored = labels != -100
    loss = torch.nn.functional.cross_entropy(
        logits[scored], labels[scored], label_smoothing=smoothing, reduction="sum"
    )
    return loss.item(), int(scored.sum())


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("model_type", TINY_MODELS)
@pytest.mark.slow
def test_smoothed_training_loss_is_torchs(stream, tmp_path, model_type, separate):
    """Two accumulated batches of unequal numbers of labels: of shifted labels, within documents, over all tokens."""
    argv = ["--model_type", model_type, "--config_overrides", TINY_MODELS[model_type] + ",vocab_size=300"]
    model = AutoModelForCausalLM.from_config(new_config(parse_arguments(argv)[0], None, BLOCK))
    arguments = ClmTrainingArguments(
        output_dir=str(tmp_path), disable_tqdm=True, label_smoothing_factor=0.1, max_steps=1, warmup_steps=0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, train_sampling_strategy="sequential",
        logging_steps=1, learning_rate=1e-4,
    )  # fmt: skip
    blocks, collate = PackedDataset(stream, BLOCK, BLOCK, separate), PackingCollator(BLOCK, 0)
    batches = [collate([blocks[i], blocks[i + 1]]) for i in (0, 2)]
    sums = [smoothed_by_hand(model, batch, 0.1) for batch in batches]
    trainer = ClmTrainer(model=model, args=arguments, train_dataset=blocks, data_collator=collate)
    trainer.train()
    want = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want, rel=1e-5)


def test_smoothing_leaves_perplexity_alone(model, stream, tmp_path):
    found = {}
    for smoothing in (0.0, 0.3):
        arguments = ClmTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, label_smoothing_factor=smoothing)
        trainer = ClmTrainer(model=model, args=arguments, data_collator=PackingCollator(BLOCK, 0))
        found[smoothing] = trainer.evaluate(PackedDataset(stream, BLOCK))
    for name in ("eval_loss", "eval_perplexity", "eval_accuracy"):
        assert found[0.3][name] == found[0.0][name]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_without_labels_is_not_a_divergence(model, tmp_path, smoothing):
    """Documents of one token: nothing predicts them."""
    tokens = np.arange(2, 2 + 2 * BLOCK, dtype=np.int32)
    starts = np.ones(2 * BLOCK, dtype=bool)
    starts[BLOCK + 1 :] = False
    arguments = ClmTrainingArguments(
        output_dir=str(tmp_path), disable_tqdm=True, max_steps=2, per_device_train_batch_size=1, logging_steps=1,
        label_smoothing_factor=smoothing, train_sampling_strategy="sequential",
    )  # fmt: skip
    blocks = PackedDataset(TokenStream(tokens, starts), BLOCK)
    trainer = ClmTrainer(model=model, args=arguments, train_dataset=blocks, data_collator=PackingCollator(BLOCK, 0))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
