"""Losses and gradients under everything the Trainer does to a model."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.modeling.exact import assert_close, assert_same_gradients, parameter_gradients, tokens
from tests.variants import each_variant, every_row, few_rows

LENGTH = 19


def enable_checkpointing(model, options=None):
    """By the name of the day: transformers 5.17 knows only the older one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def gradients_of(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), parameter_gradients(model)


@every_row
def test_loss_is_next_token_cross_entropy(row):
    model, ids = row.build(), tokens(2, LENGTH)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    # The stock loss works in float32.
    assert_close(out.loss.double(), expected, "loss", tolerance=1e-6)


@every_row
def test_every_parameter_is_trained(row):
    model, ids = row.build(), tokens(2, LENGTH)
    _, gradients = gradients_of(model, input_ids=ids, labels=ids)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert name in gradients, f"{name} has no gradient"
            assert gradients[name].isfinite().all(), name
            assert gradients[name].abs().max() > 0, f"{name} has a zero gradient"


@every_row
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(row, use_reentrant):
    model, ids = row.build().train(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss, expected = gradients_of(model, **batch)
    enable_checkpointing(model, {"use_reentrant": use_reentrant})
    checkpointed_loss, actual = gradients_of(model, **batch)
    assert_close(checkpointed_loss, loss, "loss", tolerance=0)
    assert_same_gradients(actual, expected)


@few_rows
def test_activation_checkpointing_of_a_packed_row(row):
    model, ids = row.build().train(), tokens(1, LENGTH)
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids}
    _, expected = gradients_of(model, **batch)
    enable_checkpointing(model)
    assert_same_gradients(gradients_of(model, **batch)[1], expected)


@every_row
def test_accumulation_with_num_items_is_the_whole_batch(row):
    """Micro-batches of unequal size: sum over tokens, divided by the count the Trainer passes."""
    model, ids = row.build(), tokens(4, LENGTH)
    labels = ids.clone()
    labels[0, 5:] = labels[2, 1:] = -100
    _, expected = gradients_of(model, input_ids=ids, labels=labels)
    count = (labels[:, 1:] != -100).sum()
    model.zero_grad()
    for part, part_labels in zip(ids.split(1), labels.split(1), strict=True):
        model(part, labels=part_labels, num_items_in_batch=count).loss.backward()
    # float32 cross entropy in the stock loss
    assert_same_gradients(parameter_gradients(model), expected, tolerance=1e-5)


@few_rows
def test_shift_labels_replace_labels(row):
    """Sequence parallel trainers shift the labels themselves."""
    model, ids = row.build(), tokens(2, LENGTH)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=ids).loss
    assert_close(model(ids, labels=ids, shift_labels=shifted).loss, expected, "loss", tolerance=1e-6)
    other = shifted.roll(3, dims=1)
    assert abs(model(ids, labels=ids, shift_labels=other).loss - expected) > 1e-3


@every_row
def test_loss_falls_from_the_standard_initialisation(row):
    """Twenty steps on one batch with the weights a user starts from, in float32."""
    torch.manual_seed(0)
    model, ids = row.model_class()(row.config()).train(), tokens(4, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(losses[0] - torch.tensor(61.0).log()) < 0.5, "a fresh model should be near the uniform loss"
    assert losses[-1] < 0.6 * losses[0]


@few_rows
def test_bfloat16_autocast_and_weights(row):
    """The two ways to train in bfloat16 give finite gradients near the exact ones."""
    ids = tokens(2, LENGTH)
    _, exact = gradients_of(row.build(), input_ids=ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = gradients_of(row.build(dtype=torch.float32), input_ids=ids, labels=ids)
    _, low = gradients_of(row.build(dtype=torch.bfloat16), input_ids=ids, labels=ids)
    for gradients in (cast, low):
        for name in exact:
            assert gradients[name].isfinite().all(), name
        flat = torch.cat([gradients[name].double().flatten() for name in exact])
        expected = torch.cat([exact[name].flatten() for name in exact])
        assert F.cosine_similarity(flat, expected, dim=0) > 0.98


@each_variant
@pytest.mark.slow
def test_compiled_forward_and_backward(row):
    """One graph for the training step, with packed documents and, in the other variant, padding in it."""
    model, ids = row.build(num_hidden_layers=1).train(), tokens(2, LENGTH)
    if row.name == "gla_plain":
        boundary = {"position_ids": torch.cat([torch.arange(7), torch.arange(LENGTH - 7)]).repeat(2, 1)}
    else:
        boundary = {"attention_mask": torch.ones_like(ids).index_fill(1, torch.arange(5), 0)}
    batch = {"input_ids": ids, "labels": ids, "use_cache": False} | boundary
    loss, expected = gradients_of(model, **batch)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled_loss = compiled(**batch).loss
    compiled_loss.backward()
    assert_close(compiled_loss.detach(), loss, "loss", tolerance=1e-6)
    assert_same_gradients(parameter_gradients(model), expected, tolerance=1e-6)


@few_rows
def test_hidden_states_are_returned(row):
    model, ids = row.build(), tokens(2, LENGTH)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == row.config().num_hidden_layers + 1
    assert all(h.shape == (2, LENGTH, 32) for h in out.hidden_states)
    assert_close(model.lm_head(out.hidden_states[-1]), out.logits, "logits of the last hidden state")


@few_rows
def test_attentions_of_the_softmax_layers_are_returned(row):
    model, ids = row.build(attn_implementation="eager"), tokens(2, LENGTH)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    softmax = [kind for kind in model.config.layer_types if kind != "lalm_linear_attention"]
    assert len(attentions or ()) == len(softmax)
    for weights in attentions or ():
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), "weights", tolerance=1e-6)


@few_rows
def test_logits_to_keep(row):
    model, ids = row.build(), tokens(2, LENGTH)
    with torch.no_grad():
        full = model(ids).logits
        assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:], "last three")
        chosen = torch.tensor([0, 7])
        assert_close(model(ids, logits_to_keep=chosen).logits, full[:, chosen], "chosen")


@few_rows
def test_tuple_output(row):
    model, ids = row.build(), tokens(2, LENGTH)
    with torch.no_grad():
        out = model(ids, labels=ids, return_dict=False)
        named = model(ids, labels=ids)
    assert isinstance(out, tuple)
    assert_close(out[0], named.loss, "loss")
    assert_close(out[1], named.logits, "logits")


@few_rows
def test_a_real_token_with_the_pad_id_is_trained(row):
    """Many tokenizers pad with the end-of-text token: the mask alone says what is padding."""
    model = row.build(pad_token_id=2, tie_word_embeddings=False)
    ids = tokens(2, LENGTH)
    ids[:, 5] = 2
    gradients_of(model, input_ids=ids, labels=ids)
    assert model.get_input_embeddings().weight.grad[2].abs().max() > 0


@each_variant
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_torch_checkpoint(row, use_reentrant, whole):
    """torch's own checkpoint around the model or its layers, with everything else at its default."""
    model = row.build().train()
    embeds, found = torch.randn(2, 9, 32, dtype=torch.float64), []

    def wrap(function):
        def run(*args, **kwargs):
            return checkpoint(lambda *args: function(*args, **kwargs), *args, use_reentrant=use_reentrant)

        return run

    for wrapped in (False, True):
        run = lambda x: model(inputs_embeds=x).logits  # noqa: E731
        if wrapped and whole:
            run = wrap(run)
        elif wrapped:
            for layer in model.model.layers:
                layer.forward = wrap(layer.forward)
        model.zero_grad()
        x = embeds.clone().requires_grad_()
        run(x).sin().sum().backward()
        found.append(parameter_gradients(model) | {"embeddings": x.grad})
    assert_same_gradients(*found)
