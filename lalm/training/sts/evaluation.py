# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""How well cosine similarities of sentence embeddings follow scores given by people, with bootstrap intervals.

Pearson's r is the correlation of the values, Spearman's that of their ranks (ties share the mean of their ranks). A
correlation is NaN, with a warning, where one side is constant: it is not defined there, and 0 would be a claim.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, rankdata, spearmanr

from lalm.errors import UserError
from lalm.training.divergence import REMEDY
from lalm.training.sts.encoding import encode_by_length

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

STATISTICS: dict[str, Callable] = {"pearson": pearsonr, "spearman": spearmanr}
SPLIT_TITLES = {"train": "train", "validation": "validation (dev)", "test": "test"}
RESAMPLES = 2000
# values that differ by less than this share of their size are one value and rounding
SMALLEST_SPREAD = 1e-6
ROWS_AT_ONCE = 250


def encode(model: "SentenceTransformer", texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Return the embeddings [N, D] float32 of N texts; equal texts are embedded once.

    Raises:
        UserError: an embedding holds NaN or infinity (names the text).
    """
    unique = list(dict.fromkeys(texts))
    vectors = encode_by_length(model, unique, batch_size, show_progress_bar=False).astype(np.float32)
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        text = unique[int(broken.argmax())]
        raise UserError(
            f"the model's embedding of {text[:60]!r} holds NaN or infinity ({broken.sum()} texts in all): its weights "
            f"are broken; if a training has made them so, lower its --learning_rate"
        )
    place = {text: row for row, text in enumerate(unique)}
    return vectors[[place[text] for text in texts]]


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine [N] float64 of each pair of rows of [N, D]; 0 where a vector is zero."""
    if first.shape != second.shape:
        raise ValueError(f"embeddings of the shapes {first.shape} and {second.shape} make no pairs")
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / np.where(norms == 0, 1, norms)


def predict(model: "SentenceTransformer", dataset: Dataset, batch_size: int = 64) -> np.ndarray:
    """Return the cosine similarity [N] float64 of sentence1 and sentence2 of each row."""
    first, second = list(dataset["sentence1"]), list(dataset["sentence2"])
    if not first:
        raise ValueError("there are no pairs to evaluate")
    vectors = encode(model, first + second, batch_size)
    return cosine(vectors[: len(first)], vectors[len(first) :])


def checked(*values: Sequence[float] | np.ndarray) -> list[np.ndarray]:
    """Return 1-d float64 arrays of one length; anything else, and NaN or infinity, is refused."""
    arrays = [np.asarray(item, dtype=np.float64) for item in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or arrays[0].ndim != 1 or not arrays[0].size:
        lengths = " and ".join("x".join(map(str, array.shape)) for array in arrays)
        raise ValueError(f"scores must be lists of one length, and not empty; their lengths are {lengths}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("scores hold NaN or infinity")
    return arrays


def is_constant(values_RN: np.ndarray) -> np.ndarray:
    """Tell for each row whether all its values are the same, but for rounding."""
    return np.ptp(values_RN, axis=-1) <= SMALLEST_SPREAD * np.abs(values_RN).max(axis=-1)


def correlations(predicted: Sequence[float] | np.ndarray, gold: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return {"pearson", "spearman", "n"} of N predictions and N gold scores, by scipy.

    Both are NaN, with a warning, if all predictions or all gold scores are the same.

    Raises:
        ValueError: the lengths differ, there is nothing, or a value is not finite.
    """
    predicted, gold = checked(predicted, gold)
    constant = [name for name, values in (("predicted", predicted), ("gold", gold)) if is_constant(values)]
    if constant:
        logger.warning("all %s scores are the same: the correlations are not defined", " and all ".join(constant))
    values = {name: math.nan if constant else float(f(predicted, gold)[0]) for name, f in STATISTICS.items()}
    return values | {"n": len(gold)}


def evaluate_split(model: "SentenceTransformer", dataset: Dataset, batch_size: int = 64) -> dict[str, float]:
    """Return {"pearson", "spearman", "n"} of a model's cosine similarities on sentence1, sentence2, score."""
    return correlations(predict(model, dataset, batch_size), dataset["score"])


def row_correlations(first_RN: np.ndarray, second_RN: np.ndarray, statistic: str) -> np.ndarray:
    """Return the correlation [R] of each pair of rows of [R, N]; NaN where one of them is constant."""
    undefined = is_constant(first_RN) | is_constant(second_RN)
    if statistic == "spearman":
        first_RN, second_RN = rankdata(first_RN, axis=1), rankdata(second_RN, axis=1)
    first_RN = first_RN - first_RN.mean(axis=1, keepdims=True)
    second_RN = second_RN - second_RN.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(first_RN, axis=1) * np.linalg.norm(second_RN, axis=1)
    return np.where(undefined, np.nan, (first_RN * second_RN).sum(axis=1) / np.where(undefined, 1, norms))


def resampled_rows(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Iterate over row numbers [<= ROWS_AT_ONCE, count], drawn with replacement: `resamples` rows in all."""
    source = np.random.default_rng(seed)
    for start in range(0, resamples, ROWS_AT_ONCE):
        yield source.integers(count, size=(min(ROWS_AT_ONCE, resamples - start), count))


def bootstrap(
    predictions: Sequence[Sequence[float] | np.ndarray],
    gold: Sequence[float] | np.ndarray,
    statistic: str,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Return a correlation for each of P predictions in each of R resamples of the pairs, [P, R]; NaN where undefined.

    All predictions see the same resamples. A seed stands for the same resamples wherever N is the same.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic is '{statistic}'; it is one of {', '.join(STATISTICS)}")
    *rows, gold = checked(*predictions, gold)
    drawn = [
        np.stack([row_correlations(row[chosen], gold[chosen], statistic) for row in rows])
        for chosen in resampled_rows(len(gold), resamples, seed)
    ]
    return np.concatenate(drawn, axis=1)


def middle(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the bounds of the middle `level` of the values that are numbers; NaN if none is."""
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    predicted: Sequence[float] | np.ndarray,
    gold: Sequence[float] | np.ndarray,
    statistic: str = "pearson",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the bounds of a correlation's percentile bootstrap interval over the pairs.

    It covers the choice of pairs, not that of a training run's seed. Resamples in which a side is constant are left
    out; the bounds are NaN if no other is left.

    Raises:
        ValueError: the lengths differ, a value is not finite, or `statistic` is not pearson or spearman.
    """
    return middle(bootstrap([predicted], gold, statistic, resamples, seed)[0], level)


def paired_bootstrap(
    scores_a: Sequence[float] | np.ndarray,
    scores_b: Sequence[float] | np.ndarray,
    labels: Sequence[float] | np.ndarray,
    seed: int = 0,
    statistic: str = "pearson",
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> dict[str, float]:
    """Compare two models on the same pairs, over the same resamples of these.

    Args:
        scores_a, scores_b: predictions [N] of the two models, in the order of `labels`.
        labels: gold scores [N].

    Returns:
        `difference` (A - B on all pairs), `low` and `high` (its percentile bootstrap interval) and `share_a_better`
        (of the resamples, ties as half). All are NaN if a model's predictions are constant.

    Raises:
        ValueError: the lengths differ, a value is not finite, or `statistic` is not pearson or spearman.
    """
    drawn = bootstrap([scores_a, scores_b], labels, statistic, resamples, seed)
    differences = (drawn[0] - drawn[1])[~np.isnan(drawn).any(axis=0)]
    whole = correlations(scores_a, labels)[statistic] - correlations(scores_b, labels)[statistic]
    if math.isnan(whole) or not differences.size:
        return dict.fromkeys(("difference", "low", "high", "share_a_better"), math.nan)
    low, high = middle(differences, level)
    share = float((differences > 0).mean() + (differences == 0).mean() / 2)
    return {"difference": whole, "low": low, "high": high, "share_a_better": share}


def scatter_plot(
    path: Path, predicted: Sequence[float] | np.ndarray, gold: Sequence[float] | np.ndarray, title: str
) -> bool:
    """Draw gold scores in [0, 1] (shown as 0 to 5) against cosines as a PNG; False if matplotlib is absent.

    The second line of the title states n, Pearson and Spearman. The line in the plot is the mean cosine of pairs whose
    gold score rounds to the same half.
    """
    predicted, gold = checked(predicted, gold)
    figures = correlations(predicted, gold)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed: no scatter plot is drawn (pip install matplotlib)")
        return False
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # many gold scores are the same; a little noise along their axis keeps points apart
    shifted = 5 * gold + np.random.default_rng(0).uniform(-0.06, 0.06, len(gold))
    size, alpha = (9, 0.3) if len(gold) > 400 else (22, 0.6)
    axes.scatter(shifted, predicted, s=size, alpha=alpha, linewidths=0, label="a pair")
    halves = np.round(10 * gold) / 2
    centres = np.unique(halves)
    means = [predicted[halves == centre].mean() for centre in centres]
    axes.plot(centres, means, "o-", color="tab:red", linewidth=1.5, markersize=4, label="mean of a half point")
    stated = f"n = {figures['n']:,}, Pearson {figures['pearson']:.4f}, Spearman {figures['spearman']:.4f}"
    # a long path keeps its end, which tells models apart
    title = title if len(title) <= 72 else f"...{title[-69:]}"
    axes.set_title(f"{title}\n{stated}", fontsize=11)
    axes.set(xlabel="gold score (0 unrelated, 5 same meaning)", ylabel="cosine similarity", xlim=(-0.2, 5.2))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    return True


def split_figures(predicted: np.ndarray, gold: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """Return the correlations of one split, each with its interval under ``_low`` and ``_high``."""
    figures = correlations(predicted, gold)
    for statistic in STATISTICS:
        low, high = bootstrap_interval(predicted, gold, statistic, resamples, seed)
        figures |= {f"{statistic}_low": low, f"{statistic}_high": high}
    return figures


def shown(figures: Mapping[str, float], name: str, low: str, high: str, sign: str = "") -> str:
    """Format a figure and its interval; NaN is written out as undefined."""
    if math.isnan(figures[name]):
        return "undefined"
    return f"{figures[name]:{sign}.4f} [{figures[low]:{sign}.4f}, {figures[high]:{sign}.4f}]"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the cells of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if rank else cell.ljust(width) for rank, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def result_lines(results: Mapping[str, Mapping], against_name: str = "the second model") -> list[str]:
    """Return the table of `evaluate_model`, and one of the differences if a second model was asked for."""
    rows: list[tuple[str, ...]] = [("split", "n", "Pearson [95 % interval]", "Spearman [95 % interval]")]
    differences: list[tuple[str, ...]] = [
        ("split", "difference of Pearson [95 % interval]", "of Spearman [95 % interval]", "better (Pearson)")
    ]
    for split, figures in results.items():
        texts = [shown(figures, name, f"{name}_low", f"{name}_high") for name in STATISTICS]
        rows.append((SPLIT_TITLES.get(split, split), f"{figures['n']:,}", *texts))
        if "against" in figures:
            paired = [figures["against"][name] for name in STATISTICS]
            texts = [shown(item, "difference", "low", "high", "+") for item in paired]
            share = paired[0]["share_a_better"]
            better = "undefined" if math.isnan(share) else f"{share:.1%} of resamples"
            differences.append((SPLIT_TITLES.get(split, split), *texts, better))
    lines = table_lines(rows)
    if len(differences) > 1:
        lines += ["", f"against {against_name}:", *table_lines(differences)]
    return lines


def check_scores(splits: Mapping[str, Dataset], names: Sequence[str], source: str) -> None:
    """Refuse splits whose gold scores are all the same: no model has a correlation with them.

    Raises:
        UserError: it names the split.
    """
    for name in names:
        if is_constant(np.asarray(splits[name]["score"], dtype=np.float64)):
            title, scores = SPLIT_TITLES.get(name, name), splits[name]["score"]
            raise UserError(
                f"{source}: all {len(scores)} pairs of the {title} split have the score {scores[0]:g}, so that no "
                f"correlation is defined; it takes pairs of different scores"
            )


def check_defined(results: Mapping[str, Mapping], was_trained: bool) -> None:
    """Refuse the figures of a collapsed model, which gives all texts of a split one vector.

    Raises:
        UserError: it names the split.
    """
    for name, figures in results.items():
        if math.isnan(figures["pearson"]):
            collapsed = "the training has collapsed: the trained" if was_trained else "--model_name_or_path: the"
            raise UserError(
                f"{collapsed} model gives all {figures['n']:,} pairs of the {SPLIT_TITLES.get(name, name)} split the "
                f"same cosine, so that no correlation is defined; "
                f"{REMEDY if was_trained else 'take an earlier checkpoint'}"
            )


def evaluate_model(
    model: "SentenceTransformer",
    splits: Mapping[str, Dataset],
    against: "SentenceTransformer | None" = None,
    plot_folder: Path | None = None,
    name: str = "",
    against_name: str = "the second model",
    batch_size: int = 64,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict]:
    """Evaluate a model on every split given, print a table, draw a scatter plot of each split.

    Args:
        model: anything with SentenceTransformer's `encode`.
        splits: split -> Dataset of sentence1, sentence2, score, as `load_stsb` returns them.
        against: a second model, compared on the same pairs by `paired_bootstrap`.
        plot_folder: where ``sts_<split>.png`` is drawn; None draws nothing.
        name, against_name: what the plots and the table call the models.

    Returns:
        split -> {"n", "pearson", "pearson_low", "pearson_high", "spearman", ...}; with `against` also "against":
        {"pearson": `paired_bootstrap`'s figures, "spearman": likewise, "figures": the second model's correlations}.
    """
    results: dict[str, dict] = {}
    for split, dataset in splits.items():
        gold = np.asarray(dataset["score"], dtype=np.float64)
        predicted = predict(model, dataset, batch_size)
        results[split] = split_figures(predicted, gold, resamples, seed)
        if against is not None:
            other = predict(against, dataset, batch_size)
            paired = {kind: paired_bootstrap(predicted, other, gold, seed, kind, resamples) for kind in STATISTICS}
            results[split]["against"] = paired | {"figures": correlations(other, gold)}
        if plot_folder is not None:
            plot_folder.mkdir(parents=True, exist_ok=True)
            title = f"{name}, {SPLIT_TITLES.get(split, split)}" if name else SPLIT_TITLES.get(split, split)
            scatter_plot(plot_folder / f"sts_{split}.png", predicted, gold, title)
    print("\n".join(result_lines(results, against_name)))
    return results
