"""Alike results as a table: a row each, metrics and everything that differs as columns; as text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from repagen.evaluation.comparison.likeness import (
    ComparedResult,
    best_rows,
    described_value,
    lower_is_better,
    metrics_of,
    unknown_facts,
)
from repagen.evaluation.reporting import aligned

Style = Literal["text", "markdown"]

_MARKS = {"text": "{}*", "markdown": "**{}**"}
_TRAINING = {"images": "training images", "step": "step"}


def comparison_table(
    results: Sequence[ComparedResult], metrics: Sequence[str] | None = None, style: Style = "text"
) -> str:
    """Put alike results side by side.

    The best value of each metric is marked, and behind each value stands its difference to that of the first row. What
    is equal everywhere stands once, below.

    Args:
        results: as `require_alike` accepts them.
        metrics: columns; all by default.
        style: `text` (aligned) or `markdown`.

    Raises:
        UserError: when no result has a metric that is asked for.
    """
    names, facts = metrics_of(results, metrics), _facts(results)
    differing = _differing(facts)
    marks = {name: best_rows(results, name) for name in names}
    rows = [["result", *names, *differing]]
    for number, result in enumerate(results):
        figures = [_figure(results, number, name, number in marks[name], style) for name in names]
        rows.append([result.label, *figures, *(described_value(facts[number].get(key)) for key in differing)])
    notes = _notes(results, names, facts)
    if style == "markdown":
        table = [_markdown_row(row) for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
        return "\n".join([*table, "", *(f"- {title}: {text}" for title, text in notes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n\n" + aligned(notes)


def comparison_csv(results: Sequence[ComparedResult], metrics: Sequence[str] | None = None) -> str:
    """The table for machines: full precision, spreads and differences to the first row as columns of their own.

    The column `best` names the metrics, separated by blanks, in which a row is best.

    Raises:
        UserError: when no result has a metric that is asked for.
    """
    names, facts = metrics_of(results, metrics), _facts(results)
    differing = _differing(facts)
    marks = {name: best_rows(results, name) for name in names}
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    of_metrics = [f"{name}{end}" for name in names for end in ("", " std", " difference")]
    writer.writerow(["result", "file", *of_metrics, "best", *differing])
    for number, result in enumerate(results):
        figures = [
            value
            for name in names
            for value in (result.metrics.get(name), _spread(result, name), _difference(results, number, name))
        ]
        best = " ".join(name for name in names if number in marks[name])
        others = [facts[number].get(key) for key in differing]
        writer.writerow([result.label, result.origin, *figures, best, *others])
    return content.getvalue().rstrip("\n")


def _facts(results: Sequence[ComparedResult]) -> list[dict[str, Any]]:
    """What may differ between results, training first."""
    of_training = [{title: one.training.get(key) for key, title in _TRAINING.items()} for one in results]
    epochs = [{"epochs": None if one.epochs is None else round(one.epochs, 3)} for one in results]
    return [
        {**trained, **passed, **one.shown} for trained, passed, one in zip(of_training, epochs, results, strict=True)
    ]


def _differing(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in facts for key in one)
    return [key for key in keys if any(one.get(key) != facts[0].get(key) for one in facts)]


def _spread(result: ComparedResult, metric: str) -> float | None:
    """`kid` => `kid_std`, `kid_dinov2` => `kid_std_dinov2`."""
    head, _, space = metric.partition("_")
    return result.metrics.get(f"{metric}_std", result.metrics.get(f"{head}_std_{space}"))


def _difference(results: Sequence[ComparedResult], number: int, metric: str) -> float | None:
    first, own = results[0].metrics.get(metric), results[number].metrics.get(metric)
    return None if number == 0 or first is None or own is None else own - first


def _figure(results: Sequence[ComparedResult], number: int, metric: str, is_best: bool, style: Style) -> str:
    if metric not in results[number].metrics:
        return "-"
    shown = f"{results[number].metrics[metric]:.5g}"
    shown = _MARKS[style].format(shown) if is_best else shown
    spread, difference = _spread(results[number], metric), _difference(results, number, metric)
    shown += "" if spread is None else f" +- {spread:.2g}"
    return shown if difference is None else f"{shown} ({difference:+.3g})"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _notes(
    results: Sequence[ComparedResult], metrics: Sequence[str], facts: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """What is alike, how to read the marks, and what to beware of."""
    fixed, equal = results[0].fixed, {key: value for key, value in facts[0].items() if value is not None}
    alike = {key: value for key, value in fixed.items() if value not in (None, []) and not key.startswith("settings.")}
    differing = _differing(facts)
    alike |= {key: value for key, value in equal.items() if key not in differing and not key.startswith("scheduler ")}
    notes = [("alike", "; ".join(f"{key}={described_value(value)}" for key, value in alike.items()))]
    if len(results) > 1:
        lowest = [name for name in metrics if lower_is_better(name)]
        highest = [name for name in metrics if lower_is_better(name) is False]
        ends = [f"{end} {', '.join(names)}" for end, names in (("lowest", lowest), ("highest", highest)) if names]
        notes.append(("best", "; ".join([*ends, "in brackets: difference to the first row"])))
    unknown = [f"{key} of {origin}" for key, origin in unknown_facts(results)]
    notes += [("not known", f"{', '.join(unknown)}; may differ")] if unknown else []
    remarks = dict.fromkeys(remark for one in results for remark in one.remarks)
    return notes + [("beware", remark) for remark in remarks]
