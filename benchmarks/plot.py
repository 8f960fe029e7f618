# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Draws the models of a results file over the length of the text: time, memory, tokens/s, share of the machine.

python -m benchmarks.plot benchmarks/results/NAME.json --output docs/speed.png

Of several files the last has the word on a case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.timing import spread

Points = dict[str, list[tuple[int, float]]]
BASELINES = ("llama",)  # drawn in black
SHARE = "share of the rate of large matrix products"
_COLUMNS = 3


def runs(report: dict[str, Any], prefix: str) -> list[tuple[str, dict[str, Any], float]]:
    """(name, facts, median sample in s or MiB) of all models that ran in the cases whose names begin so."""
    cases = [case["runs"].items() for name, case in report["cases"].items() if name.startswith(prefix)]
    return [
        (name, one["facts"], spread(one["samples"]).median)
        for case in cases
        for name, one in case
        if one["samples"] and "tokens" in one["facts"]
    ]


def by_length(report: dict[str, Any], prefix: str, value: Any) -> Points:
    """`value(facts, median)` over the tokens, by the first word of the run."""
    points: Points = {}
    for name, facts, median in runs(report, prefix):
        points.setdefault(name.split()[0], []).append((facts["tokens"], value(facts, median)))
    return {name: sorted(pairs) for name, pairs in points.items()}


def panels(report: dict[str, Any]) -> dict[str, Points]:
    """What is drawn, by the label of its axis. Work is counted as 6 operations a weight and token."""
    rate = report["machine"]["matrix_product_gflops"]["float32"] * 1e9
    return {
        "train step, s": by_length(report, "train_", lambda facts, median: median),
        "train, tokens/s": by_length(report, "train_", lambda facts, median: facts["tokens"] / median),
        "prefill, tokens/s": by_length(report, "prefill_", lambda facts, median: facts["tokens"] / median),
        "peak memory of a train step, MiB": by_length(report, "memory", lambda facts, median: median),
        SHARE: by_length(
            report,
            "train_",
            lambda facts, median: 6 * facts["matrix_parameters"] * facts["tokens"] / median / rate,
        ),
    }


def draw(report: dict[str, Any], path: Path) -> list[str]:
    """Write the picture; returns the labels of its panels, none if the report has nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {label: points for label, points in panels(report).items() if points}
    if any(share > 1 for pairs in drawn.get(SHARE, {}).values() for _, share in pairs):
        del drawn[SHARE]  # the machine was slower when its rate was taken
    if not drawn:
        return []
    rows = -(-(len(drawn) + 1) // _COLUMNS)  # one place more, for the legend
    figure = Figure(figsize=(4.2 * _COLUMNS, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, _COLUMNS, squeeze=False).flatten().tolist()
    for axes, (label, points) in zip(places, drawn.items(), strict=False):
        draw_panel(axes, label, points)
    for axes in places[len(drawn) :]:
        axes.axis("off")
    places[len(drawn)].legend(*places[0].get_legend_handles_labels(), loc="center left")
    machine = report["machine"]
    figure.suptitle(f"{machine['hardware']['cpu']}, {machine['threads']} thread(s), {machine['date'][:10]}")
    figure.savefig(path, dpi=110)
    return list(drawn)


def draw_panel(axes: Any, label: str, points: Points) -> None:
    """One quantity over the tokens, a line a model."""
    for name, pairs in points.items():
        style: dict[str, Any] = {"color": "black", "linewidth": 2.5} if name in BASELINES else {}
        axes.plot(*zip(*pairs, strict=True), "o-", markersize=4, label=name, **style)
    axes.set(xlabel="tokens", title=label, xscale="log")
    axes.set(**{"yscale": "log"} if label.endswith((", s", "MiB")) else {"ylim": (0, None)})
    ticks = sorted({length for pairs in points.values() for length, _ in pairs})
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report with all cases, on the first one's machine at its fastest."""
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
        parser.error(f"{', '.join(map(str, arguments.results))} has no train, prefill or memory case to draw")
    print(f"{arguments.output}: {', '.join(drawn)}")


if __name__ == "__main__":
    main()
