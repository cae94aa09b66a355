"""Metrics over the course of training, one line a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repagen.errors import UserError
from repagen.evaluation.comparison.likeness import Axis, ComparedResult, by_group, metrics_of
from repagen.files import replace_file

_X_LABELS = {"images": "training images", "epochs": "epochs", "steps": "optimiser steps"}
_PANELS_PER_ROW = 3


def save_plot(
    results: Sequence[ComparedResult],
    path: Path,
    *,
    metrics: Sequence[str] | None = None,
    axis: Axis = "images",
    log_x: bool = False,
) -> None:
    """Draw metrics over the course of training, a panel a metric and a line a group of results.

    Args:
        results: as `require_alike` accepts them.
        path: the PNG to write.
        metrics: panels; all by default.
        axis: horizontal.
        log_x: whether the horizontal axis is logarithmic.

    Raises:
        UserError: for a path that is no PNG, on a result that does not say how far training had come, or on one at 0
            where the axis is logarithmic.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {path}: plots are PNG; name a file that ends with .png")
    names = metrics_of(results, metrics)
    if log_x and any(one.position(axis) == 0 for one in results):
        raise UserError("--log-x cannot show a result at 0; leave --log-x out")
    lines = {name: by_group(results, name, axis) for name in names}

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(names), _PANELS_PER_ROW)
    rows = -(-len(names) // columns)
    size = (5 * columns, 3.6 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    colours = {group: f"C{number % 10}" for number, group in enumerate(dict.fromkeys(one.group for one in results))}
    for panel, name in zip(axes.flat, names, strict=False):
        for group, moments in lines[name].items():
            x, y = [one.position(axis) for one in moments], [one.metrics[name] for one in moments]
            panel.plot(x, y, marker="o", markersize=4, label=group, color=colours[group])
        panel.set(xlabel=_X_LABELS[axis], ylabel=name, xscale="log" if log_x else "linear")
        panel.legend()
        panel.grid(alpha=0.3)
    for panel in list(axes.flat)[len(names) :]:
        panel.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot.close(figure)
