"""Curves of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from repagen.training.log import read_metrics


def save_loss_plot(curves: Mapping[str, tuple[Path, Sequence[str]]], path: Path) -> None:
    """Plot columns of training logs over optimiser steps, one panel a run.

    Args:
        curves: title => (metrics.jsonl of the run, columns to draw).
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.5), layout="constrained", squeeze=False)
    for axis, (title, (log, columns)) in zip(axes[0], curves.items(), strict=True):
        rows = read_metrics(log)
        for column in columns:
            axis.plot([row["step"] for row in rows], [row[column] for row in rows], label=column, linewidth=0.8)
        axis.set(title=title, xlabel="optimiser step")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
