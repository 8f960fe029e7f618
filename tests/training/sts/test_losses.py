"""Every term against its formula written out, its gradients, and what a weight of 0 saves."""

import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MatryoshkaLoss, MultipleNegativesRankingLoss

from lalm.errors import UserError
from lalm.training.sts.losses import (
    DistillationLoss,
    OrthogonalRegulariser,
    Retention,
    ScoreLoss,
    WithPenalties,
    contrastive_cross_entropy,
    contrastive_margin,
    fit_projection,
    layer_error,
    match_layers,
    run_encoder,
    similarity_kl,
)
from tests.training.sts import tiny_models as sts_tiny

RELATIONAL = {"similarity": 0.5, "embedding": 0.5, "layers": 0.5, "margin": 2.5}


@pytest.fixture(scope="module")
def wide_teacher():
    return sts_tiny.teacher(width=48, layers=4)


def batch(model, rows: int = 4, columns: int = 2):
    """Features of `columns` text columns."""
    texts = sts_tiny.sentences(rows * columns)
    return [model.preprocess(texts[rows * i : rows * (i + 1)]) for i in range(columns)]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=-1, keepdim=True)


def test_similarity_kl_is_its_formula():
    s, t, total = unit(5, 6), unit(5, 9, seed=1), 0.0
    for i in range(5):
        p = [math.exp(float(t[i] @ t[j]) / 0.3) for j in range(5)]
        q = [math.exp(float(s[i] @ s[j]) / 0.3) for j in range(5)]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(similarity_kl(s, t, temperature=0.3)) == pytest.approx(total / 5, rel=1e-4)
    assert float(similarity_kl(3 * t, t)) == pytest.approx(0, abs=1e-6)


def test_contrastive_margin_is_its_formula():
    a, b = unit(4, 3), unit(4, 3, seed=1)
    scores, total = a @ b.T, 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        total += max(0.0, 0.2 - float(scores[i, i]) + max(float(scores[i, j]) for j in others))
        total += max(0.0, 0.2 - float(scores[i, i]) + max(float(scores[j, i]) for j in others))
    assert float(contrastive_margin(a, b)) == pytest.approx(total / 8, rel=1e-5)
    assert float(contrastive_margin(a[:1], b[:1])) == 0
    everything = torch.ones(4, 4, dtype=torch.bool)
    assert float(contrastive_margin(a, b, same_BB=everything)) == 0


def test_layer_error_sees_real_tokens_only():
    ours, theirs, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = mask.bool()
    expected = (ours[rows] - theirs[rows]).square().sum() / theirs[rows].square().sum()
    ours[0, 2] = torch.nan
    theirs[1, 1:] = torch.inf
    torch.testing.assert_close(layer_error(ours, theirs, mask), expected)


def test_layers_are_paired():
    assert match_layers(6, 6) == [(i, i) for i in range(1, 7)]
    assert match_layers(6, 24, "last") == [(1, 19), (2, 20), (3, 21), (4, 22), (5, 23), (6, 24)]
    assert match_layers(6, 24) == [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24)]
    assert match_layers(6, 12, "final") == [(6, 12)]
    with pytest.raises(ValueError, match="'last' needs a teacher of at least 6"):
        match_layers(6, 2, "last")
    with pytest.raises(ValueError, match="layer_map is 'first'"):
        match_layers(6, 6, "first")


def test_a_student_equal_to_its_teacher_loses_nothing():
    teacher = sts_tiny.teacher()
    features = batch(teacher)
    labels = torch.stack([run_encoder(teacher, column, False)[0] for column in features], dim=1)
    weights = {"embedding": 1.0, "layers": 1.0, "similarity": 1.0}
    loss = DistillationLoss(sts_tiny.teacher(), weights, teacher)
    for given in (labels, None):
        terms = loss(features, given)
        assert set(terms) == set(weights)
        for name, term in terms.items():
            assert term.item() == pytest.approx(0, abs=1e-5), name


def test_hidden_states_are_asked_for_only_while_the_loss_runs():
    student, teacher = sts_tiny.student(), sts_tiny.teacher()
    features = batch(student)
    DistillationLoss(student, {"layers": 1.0}, teacher)(features, torch.randn(4, 2, 32))
    assert not student[0].auto_model.config.output_hidden_states
    _, states = run_encoder(student, features[0], True)
    assert len(states) == 3
    torch.testing.assert_close(states[-1], student[0](dict(features[0]))["token_embeddings"])


def test_every_weight_and_projection_gets_gradients(wide_teacher):
    student = sts_tiny.student()
    loss = DistillationLoss(student, RELATIONAL, wide_teacher)
    features = batch(student)
    terms = loss(features, None)
    assert set(terms) == set(RELATIONAL)
    torch.stack(list(terms.values())).sum().backward()
    trained = {name: weight for name, weight in loss.named_parameters() if weight.requires_grad}
    assert not [name for name in trained if name.startswith("teacher.")]
    assert loss.embedding.projection.weight.shape == (48, 32)
    assert len(loss.layer_projections) == 2
    for name, weight in trained.items():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_weights_scale_their_terms_and_zero_costs_nothing(wide_teacher, monkeypatch):
    student = sts_tiny.student()
    features = batch(student)
    labels = torch.randn(4, 2, 48)
    once = DistillationLoss(student, {"similarity": 1.0, "margin": 1.0}, teacher_dim=48)(features, labels)
    twice = DistillationLoss(student, {"similarity": 2.0, "margin": 3.0}, teacher_dim=48)(features, labels)
    torch.testing.assert_close(twice, {"similarity": 2 * once["similarity"], "margin": 3 * once["margin"]})
    loss = DistillationLoss(student, {"embedding": 1.0, "layers": 0.0}, wide_teacher)
    monkeypatch.setattr(wide_teacher[0].auto_model, "forward", lambda **_: pytest.fail("the teacher was run"))
    assert list(loss(features, labels)) == ["embedding"]
    assert not loss.layer_projections
    assert "projection" not in dict(loss.named_children())


def test_a_fitted_projection_maps_the_student_onto_the_teacher():
    ours, weight, bias = torch.randn(200, 8), torch.randn(12, 8), torch.randn(12)
    found, shift = fit_projection(ours, ours @ weight.T + bias, ridge=1e-9)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shift, bias, atol=1e-4, rtol=1e-4)


def test_impossible_distillations_are_refused():
    student = sts_tiny.student()
    with pytest.raises(ValueError, match="every weight"):
        DistillationLoss(student, {"embedding": 0.0}, teacher_dim=32)
    with pytest.raises(ValueError, match="no term 'layer'"):
        DistillationLoss(student, {"layer": 1.0}, teacher_dim=32)
    with pytest.raises(ValueError, match="needs the teacher for the term 'layers'"):
        DistillationLoss(student, {"layers": 1.0}, teacher_dim=32)
    one = batch(student, columns=1)
    with pytest.raises(ValueError, match="needs pairs"):
        DistillationLoss(student, {"margin": 1.0}, teacher_dim=32)(one, torch.randn(4, 32))
    with pytest.raises(ValueError, match=r"need labels \[B, 2, F\]"):
        DistillationLoss(student, {"embedding": 1.0}, teacher_dim=32)(batch(student), torch.randn(4, 32))


def test_a_live_teacher_with_nan_is_refused_by_the_text():
    teacher = sts_tiny.teacher()
    with torch.no_grad():
        teacher[0].auto_model.embeddings.word_embeddings.weight[5 + sts_tiny.WORDS.index("guitar")] = torch.nan
    loss = DistillationLoss(sts_tiny.student(), {"layers": 1.0}, teacher)
    features = [teacher.preprocess(["a dog runs", "the guitar is red"])]
    with pytest.raises(UserError, match="'the guitar is red' is not finite"):
        loss(features, None)


def test_scores_are_cosent_plus_squared_errors():
    student, labels = sts_tiny.student(), torch.tensor([0.1, 0.9, 0.5, 0.4])
    features = batch(student)
    a, b = (run_encoder(student, column, False)[0] for column in features)
    squares = ((a * b).sum(-1) - labels).square().mean()
    cosent = CoSENTLoss(student)(batch(student), labels)
    torch.testing.assert_close(ScoreLoss(student, mse_weight=3.0)(features, labels), cosent + 3 * squares)
    torch.testing.assert_close(ScoreLoss(student, mse_weight=0.0)(features, labels), cosent)


def test_orthogonal_weights_cost_nothing():
    student = sts_tiny.student()
    regulariser = OrthogonalRegulariser(student)
    assert len(regulariser.projections) == 2 * 3
    excess = [(m.weight @ m.weight.T - torch.eye(32)).square().sum() / 32 for m in regulariser.projections]
    torch.testing.assert_close(regulariser(), torch.stack(excess).mean())
    for module in regulariser.projections:
        torch.nn.init.orthogonal_(module.weight)
    assert regulariser().item() == pytest.approx(0, abs=1e-9)
    assert len(OrthogonalRegulariser(sts_tiny.teacher()).projections) == 2 * 3


def test_retention_is_the_distance_from_the_start():
    student = sts_tiny.student()
    student[0].auto_model.embed_tokens.requires_grad_(False)
    term = Retention(student)
    assert not any("embed_tokens" in name for name in term.names)
    assert term().item() == 0
    weight = student[0].auto_model.layers[0].mixer.q_proj.weight
    with torch.no_grad():
        weight[0, :3] += 2
        student[0].auto_model.embed_tokens.weight += 1
    assert term().item() == pytest.approx(12)
    term().backward()
    torch.testing.assert_close(weight.grad[0, :3], torch.full((3,), 4.0))
    assert not term.state_dict().keys() & {"start_0"}, "a checkpoint need not hold the start a second time"


def test_penalties_are_named_and_weighted():
    student = sts_tiny.student()
    matryoshka = MatryoshkaLoss(student, MultipleNegativesRankingLoss(student), [32, 8])
    loss = WithPenalties(student, matryoshka, {"orthogonal": (0.5, OrthogonalRegulariser(student))})
    terms = loss(batch(student), None)
    assert set(terms) == {"task", "orthogonal"}
    torch.testing.assert_close(terms["orthogonal"], 0.5 * OrthogonalRegulariser(student)())
    distillation = DistillationLoss(student, {"similarity": 1.0}, teacher_dim=32)
    terms = WithPenalties(student, distillation, {})(batch(student), torch.randn(4, 2, 32))
    assert list(terms) == ["similarity"]


def test_contrastive_cross_entropy_is_its_formula():
    a, b, total = unit(4, 6), unit(4, 6, seed=1), 0.0
    scores = 20 * a @ b.T
    for x in (scores, scores.T):
        for i in range(4):
            log_p = [float(x[i, j]) - math.log(sum(math.exp(float(y)) for y in x[i])) for j in range(4)]
            total -= sum((0.9 * (i == j) + 0.1 / 4) * log_p[j] for j in range(4))
    assert float(contrastive_cross_entropy(a, b)) == pytest.approx(total / 8, rel=1e-5)


def test_a_copy_is_no_negative():
    a = unit(4, 6)
    twice = torch.cat([a, a[:1]])
    same = twice @ twice.T > 0.99
    assert contrastive_cross_entropy(twice, twice, same) < contrastive_cross_entropy(twice, twice) - 0.05


@pytest.mark.parametrize("columns", [1, 2])
def test_the_contrastive_term_takes_the_teachers_vectors_for_a_single_column(columns, wide_teacher):
    student = sts_tiny.student()
    loss = DistillationLoss(student, {"embedding": 1.0, "contrastive": 0.5}, wide_teacher)
    features = batch(student, columns=columns)
    terms = loss(features, None)
    ours = [run_encoder(student, column, False)[0] for column in features]
    theirs = [run_encoder(wide_teacher, column, False)[0] for column in features]
    first, second = (ours[0], ours[1]) if columns == 2 else (loss.embedding.projection(ours[0]), theirs[0])
    expected = contrastive_cross_entropy(first, second, theirs[0] @ theirs[-1].T >= 0.99)
    torch.testing.assert_close(terms["contrastive"], 0.5 * expected)
    if columns == 1:
        with pytest.raises(ValueError, match="needs the term 'embedding' for a teacher of another width"):
            DistillationLoss(student, {"contrastive": 0.5}, wide_teacher)(features, None)


def test_a_prompt_of_the_teacher(wide_teacher):
    """Live as by `encode`, which puts the prompt before the text; the hidden states are those of the text's tokens."""
    student, texts = sts_tiny.student(), sts_tiny.sentences(3)
    plain = wide_teacher.encode(texts, convert_to_tensor=True)
    before = wide_teacher.prompts, wide_teacher.default_prompt_name
    try:
        wide_teacher.prompts, wide_teacher.default_prompt_name = {"lalm": "a red dog "}, "lalm"
        loss = DistillationLoss(student, {"embedding": 1.0, "layers": 1.0}, wide_teacher)
        ((vectors, states),) = loss._teach([student.preprocess(texts)])
        expected = wide_teacher.encode(texts, convert_to_tensor=True)
    finally:
        wide_teacher.prompts, wide_teacher.default_prompt_name = before
    torch.testing.assert_close(vectors, expected)
    assert (vectors - plain).abs().max() > 0.01
    words = wide_teacher.preprocess([f"a red dog {text}" for text in texts])
    whole = run_encoder(wide_teacher, words, True)[1]
    for state, found in zip(states, whole, strict=True):
        torch.testing.assert_close(state[:, 1:], found[:, 4:])
