# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Students of a softmax encoder: what is copied is copied, and the ridge fit is the best o projection there is."""

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from lalm import LamConfig, LamModel
from lalm.modeling.layers import unit_length
from lalm.modeling.linearize import attention_of, fit_output_projections, mixer_features, student_config

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 40, "max_position_embeddings": 40}


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, initializer_range=0.3), add_pooling_layer=False).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(rows=6, length=11, seed=0):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 7:], mask[1, :3] = 0, 0
    return {"input_ids": torch.randint(1, 50, (rows, length), generator=gen), "attention_mask": mask}


def test_what_is_copied(teacher):
    """With the teacher's attention in place of the mixers, the student is the teacher."""
    student = LamModel.from_softmax_encoder(teacher, student_config(teacher, position_embedding_type="learned"))
    assert student.dtype == torch.float64
    inputs = batch()
    inputs["attention_mask"][:] = 1
    _, attention = attention_of(teacher, inputs)
    left = iter(attention)
    for layer in student.layers:
        layer.mixer.register_forward_hook(lambda *_: (next(left), None))
    expected = teacher(**inputs).last_hidden_state
    torch.testing.assert_close(student.eval()(**inputs).last_hidden_state, expected, rtol=1e-9, atol=1e-9)


def test_q_k_v_enter_the_memories_as_the_teacher_makes_them(teacher):
    student = LamModel.from_softmax_encoder(teacher)
    mixer, theirs = student.layers[1].mixer, teacher.encoder.layer[1].attention.self
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    seen = {}
    attend = mixer.attend
    mixer.attend = lambda hidden, q, k, v, *rest: (
        seen.update(query=q, key=k, value=v) or attend(hidden, q, k, v, *rest)
    )
    mixer_features(mixer, x, torch.ones(2, 5, dtype=torch.bool))
    for name, actual in seen.items():
        expected = getattr(theirs, name)(x).view_as(actual)
        torch.testing.assert_close(actual, expected if name == "value" else unit_length(expected))


def test_ridge_fit_is_the_least_squares_solution(teacher):
    student = LamModel.from_softmax_encoder(teacher)
    batches = [batch(seed=seed) for seed in range(3)]
    errors = fit_output_projections(student, teacher, batches, ridge=1e-12)
    for index, (layer, error) in enumerate(zip(student.layers, errors, strict=True)):
        features, targets = [], []
        for one in batches:
            mask = one["attention_mask"].bool()
            inputs, attention = attention_of(teacher, one)
            features.append(mixer_features(layer.mixer, inputs[index], mask)[mask])
            targets.append(attention[index][mask])
        features, targets = torch.cat(features), torch.cat(targets)
        ones = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
        best = ones @ torch.linalg.lstsq(ones, targets).solution
        fitted = layer.mixer.o_proj(features)
        torch.testing.assert_close(fitted, best, rtol=1e-5, atol=1e-5)
        left = (fitted - targets).norm() / (targets - targets.mean(0)).norm()
        assert abs(error - left) < 1e-6
        assert 0 < error < 1


def test_positions_of_a_student_without_positions(teacher):
    student = LamModel.from_softmax_encoder(teacher)
    embeddings = teacher.embeddings
    expected = embeddings.word_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    torch.testing.assert_close(
        student.embed_tokens.weight, expected + embeddings.position_embeddings.weight[:32].mean(0)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size = 64 of the student must be the teacher's, 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"expand_v": 2}, "expand_v=1"),
        ({"norm_type": "rmsnorm"}, "norm_type='layernorm'"),
        ({"full_attention_layers": [0]}, "full_attention_layers"),
        ({"position_embedding_type": "sinusoidal"}, "sinusoidal"),
        ({"position_embedding_type": "learned", "max_position_embeddings": 99}, "more than the teacher's 40"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(teacher, changes, message):
    with pytest.raises(ValueError, match=message):
        LamModel.from_softmax_encoder(teacher, student_config(teacher, **changes))


def test_other_teachers_are_refused():
    roberta = RobertaModel(RobertaConfig(**SIZES), add_pooling_layer=False)
    with pytest.raises(ValueError, match="model_type 'bert', got 'roberta'"):
        LamModel.from_softmax_encoder(roberta)
    with pytest.raises(ValueError, match="not of BERT's shape"):
        LamModel.from_softmax_encoder(LamModel(LamConfig(**SIZES)))


def test_no_text_is_refused(teacher):
    with pytest.raises(ValueError, match="no text"):
        fit_output_projections(LamModel.from_softmax_encoder(teacher), teacher, [])
