"""Pictures of what quickstarts find: curves, and images with their prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from repagen.training.log import read_metrics


def save_loss_plot(curves: Mapping[str, tuple[Path, Sequence[str]]], path: Path) -> None:
    """Plot columns of training logs over optimiser steps, one panel a run.

    Args:
        curves: title => (metrics.jsonl of the run, columns to draw).
        path: the PNG to write.
    """
    pyplot = _pyplot()
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


def save_score_plot(curves: Mapping[str, Mapping[int, tuple[float, float, float]]], path: Path) -> None:
    """Plot shares over training images seen, with their confidence intervals.

    Args:
        curves: name => images seen => (share, low, high), in [0, 1].
        path: the PNG to write.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, curve in curves.items():
        seen, shares = list(curve), [share for share, _, _ in curve.values()]
        axis.plot(seen, shares, marker="o", label=name)
        axis.fill_between(
            seen, [low for _, low, _ in curve.values()], [high for _, _, high in curve.values()], alpha=0.2
        )
    axis.set(xlabel="training images seen", ylabel="share right", ylim=(0, 1))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_sheet(images: Sequence[Image.Image], words: Sequence[str], right: Sequence[bool], path: Path) -> None:
    """Write images with words under each, in red under those that are not right.

    Args:
        images: equally many.
        words: prompts.
        right: whether each image shows what its prompt asks for.
        path: the PNG to write.
    """
    pyplot = _pyplot()
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.9 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, text, holds in zip(axes.flat, images, words, right, strict=False):
        axis.imshow(image, interpolation="nearest")
        shown = textwrap.fill(text, 26)
        axis.text(
            0.5, -0.04, shown, transform=axis.transAxes, ha="center", va="top", fontsize=7, color="k" if holds else "r"
        )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
