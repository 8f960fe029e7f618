"""The stock Trainer: how a batch is cut into accumulated ones changes no gradient, whatever head and labels."""

import gc

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.modeling.exact import tokens
from tests.variants import each_variant, every_encoder

ROWS, LENGTH, LABELS = 5, 9, 3
SEQUENCE = "AutoModelForSequenceClassification"


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Each train() collects garbage, among all that was imported: two thirds of the time of a test."""
    gc.freeze()
    yield
    gc.unfreeze()


class FirstStep(TrainerCallback):
    """Keeps the gradients of the step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def sometimes(labels):
    """Uneven: the first row keeps one label at most, the third none."""
    labels[0, 1:] = labels[2] = -100
    return labels


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def classes(*shape):
    return torch.randint(LABELS, shape, generator=torch.Generator().manual_seed(1))


MULTI, REGRESSION = "multi_label_classification", "regression"
# head, number of labels, problem type (None: found out from the labels), labels
PROBLEMS = {
    "one of several": (SEQUENCE, LABELS, None, sometimes(classes(ROWS, 1))[:, 0]),
    "any of several": (SEQUENCE, LABELS, None, (numbers(ROWS, LABELS) > 0).float()),
    "any of several, told": (SEQUENCE, LABELS, MULTI, (numbers(ROWS, LABELS) > 0).float()),
    "number": (SEQUENCE, 1, None, numbers(ROWS)),
    "column of a number": (SEQUENCE, 1, REGRESSION, numbers(ROWS, 1)),
    "several numbers": (SEQUENCE, LABELS, REGRESSION, numbers(ROWS, LABELS)),
    "tokens": ("AutoModelForTokenClassification", LABELS, None, sometimes(classes(ROWS, LENGTH))),
    "next tokens": ("AutoModelForCausalLM", LABELS, None, sometimes(tokens(ROWS, LENGTH).clone())),
}


def gradients(model, labels, batch_size, folder):
    """The gradients of one step over all rows, by the Trainer."""
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens(ROWS, LENGTH), labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", max_grad_norm=0,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=-(-ROWS // batch_size), learning_rate=0,
        disable_tqdm=True,
    )  # fmt: skip
    step = FirstStep()
    Trainer(model, arguments, train_dataset=rows, callbacks=[step]).train()
    return step.gradients


def assert_one_gradient(model, labels, folder):
    """Accumulating 2 + 2 + 1 rows against all 5 at once."""
    whole, parts = (gradients(model, labels, size, folder) for size in (ROWS, 2))
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-6, msg=name)


@each_variant
@pytest.mark.parametrize("problem", PROBLEMS)
def test_accumulated_batches_are_one_batch(row, problem, tmp_path):
    head, num_labels, problem_type, labels = PROBLEMS[problem]
    model = row.build(head, num_labels=num_labels)
    model.config.problem_type = problem_type
    assert_one_gradient(model, labels, tmp_path)


@every_encoder
def test_accumulated_batches_of_masked_tokens_are_one_batch(row, tmp_path):
    assert_one_gradient(row.build("AutoModelForMaskedLM"), sometimes(tokens(ROWS, LENGTH).clone()), tmp_path)


@each_variant
def test_a_loss_of_the_users_own_gets_the_count(row):
    """`model.loss_function = ...` divides for itself."""
    model, seen = row.build(SEQUENCE, num_labels=1), []

    def own(labels, num_items_in_batch=None, **kwargs):
        seen.append(num_items_in_batch)
        return labels.sum()

    model.loss_function = own
    loss = model(tokens(2, LENGTH), labels=torch.tensor([1.0, 2.0]), num_items_in_batch=4).loss
    assert (loss.item(), seen) == (3.0, [4])
