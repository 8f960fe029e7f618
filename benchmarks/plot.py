# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Plots time, memory and throughput against sequence length from results files.

python -m benchmarks.plot benchmarks/results/NAME.json --output docs/speed.png

If several files contain the same case, the last one counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import spread

Points = dict[str, list[tuple[int, float]]]
# The names of the legend; baselines are drawn in black.
BASELINES = {"llama": "Llama (softmax)", "llama_same_gemm": "Llama (softmax)"}
PEAK = "train: fraction of peak GEMM throughput"
TRAINING = ("train_", "same_gemm_train_")
DECODING, CACHE = "decoding: ms per token", "cache: MiB per sequence"
_COLUMNS = 3


def runs(report: dict[str, Any], prefix: str | tuple[str, ...]) -> list[tuple[str, dict[str, Any], float]]:
    """(name, facts, median sample in s or MiB) of all models in the cases whose names start with `prefix`."""
    cases = [case["runs"].items() for name, case in report["cases"].items() if name.startswith(prefix)]
    return [
        (name, run["facts"], spread(run["samples"]).median)
        for case in cases
        for name, run in case
        if run["samples"] and "tokens" in run["facts"]
    ]


def by_length(
    report: dict[str, Any], prefix: str | tuple[str, ...], value: Callable, length: str = "tokens"
) -> Points:
    """`value(facts, median)` against `facts[length]`, by the first word of the run's name."""
    points: Points = {}
    for name, facts, median in runs(report, prefix):
        points.setdefault(name.split()[0], []).append((facts[length], value(facts, median)))
    return {name: sorted(pairs) for name, pairs in points.items()}


def panels(report: dict[str, Any]) -> dict[str, Points]:
    """The data of each panel by its title. A train step is counted as 6 operations per weight and token."""
    rate = report["machine"]["matrix_product_gflops"]["float32"] * 1e9
    decoding = "same_gemm_decode"
    return {
        DECODING: by_length(report, decoding, lambda facts, median: 1e3 * median / facts["tokens"], "context"),
        CACHE: by_length(report, decoding, lambda facts, median: facts["cache_bytes"] / 2**20, "context"),
        "train step: seconds": by_length(report, TRAINING, lambda facts, median: median),
        "train: tokens per second": by_length(report, TRAINING, lambda facts, median: facts["tokens"] / median),
        "prefill: tokens per second": by_length(report, "prefill_", lambda facts, median: facts["tokens"] / median),
        "train step: peak memory, MiB": by_length(report, "memory", lambda facts, median: median),
        PEAK: by_length(
            report,
            TRAINING,
            lambda facts, median: 6 * facts["matrix_parameters"] * facts["tokens"] / median / rate,
        ),
    }


def draw(report: dict[str, Any], path: Path) -> list[str]:
    """Write the picture; return the titles of its panels, none if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {title: points for title, points in panels(report).items() if points}
    if any(fraction > 1 for pairs in drawn.get(PEAK, {}).values() for _, fraction in pairs):
        del drawn[PEAK]  # the machine was slower when its peak was measured
    if not drawn:
        return []
    columns = min(_COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4 * columns, 3.3 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, (title, points) in zip(places, drawn.items(), strict=False):
        draw_panel(axes, title, points)
    for axes in places[len(drawn) :]:
        axes.axis("off")
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9)
    machine, threads = report["machine"], report["machine"]["threads"]
    where = f"{machine['hardware']['cpu']}, {threads} thread{'s' * (threads > 1)}, {machine['date'][:10]}"
    figure.suptitle(where, fontsize=10)
    figure.savefig(path, dpi=150)
    return list(drawn)


def draw_panel(axes: Any, title: str, points: Points) -> None:
    """Draw one quantity against the length, one line per model."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, pairs in points.items():
        style: dict[str, Any] = {"color": "black", "linewidth": 2.5} if name in BASELINES else {}
        axes.plot(*zip(*pairs, strict=True), "o-", markersize=4, label=BASELINES.get(name, name), **style)
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    ticks = sorted({length for pairs in points.values() for length, _ in pairs})
    decoding = title in (DECODING, CACHE)
    axes.set(xlabel="tokens in context" if decoding else "tokens per sequence", title=title)
    if decoding:
        ticks = [length for length in ticks if 8 * length >= ticks[-1]]
        axes.set(xlim=(0, None), ylim=(0, None))
    else:
        axes.set(xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if title.endswith(("seconds", "MiB")):
            axes.set(yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set(ylim=(0, None))
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.yaxis.set_major_formatter(plain)
    axes.grid(alpha=0.3)


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine reports of one machine; its highest measured matrix-product rate counts."""
    machine = dict(reports[0]["machine"])
    rates = [report["machine"]["matrix_product_gflops"] for report in reports]
    machine["matrix_product_gflops"] = {dtype: max(rate[dtype] for rate in rates) for dtype in rates[0]}
    cases: dict[str, Any] = {}
    for report in reports:
        cases |= report["cases"]
    return {"machine": machine, "cases": cases}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of python -m benchmarks.run --json")
    parser.add_argument("--output", type=Path, default=Path("speed.png"), help="the picture")
    arguments = parser.parse_args(argv)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    drawn = draw(merged(reports), arguments.output)
    if not drawn:
        parser.error(f"{', '.join(map(str, arguments.results))} has no train, prefill, decode or memory case to draw")
    print(f"{arguments.output}: {', '.join(drawn)}")


if __name__ == "__main__":
    main()
