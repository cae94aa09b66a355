"""`repagen compare`: results side by side, if they are figures of one quantity."""

from __future__ import annotations

import argparse
import math
import typing
from collections.abc import Sequence
from pathlib import Path

from repagen.errors import UserError
from repagen.evaluation.comparison.likeness import (
    Axis,
    ComparedResult,
    EpochsTo,
    differences,
    epochs_to,
    lower_is_better,
    require_alike,
)
from repagen.evaluation.comparison.plot import save_plot
from repagen.evaluation.comparison.reading import read_results
from repagen.evaluation.comparison.table import comparison_csv, comparison_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULT",
        help="JSON of `repagen evaluate ... --output`, or folder of a training run; NAME=RESULT says whose it is "
        "(default: the folder's name)",
    )
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help="columns and panels (default: all)")
    parser.add_argument("--list-differences", action="store_true", help="print what keeps the results apart")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--csv", action="store_true", help="print CSV, full precision")
    style.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--plot", metavar="FILE.png", help="draw metrics over the course of training")
    parser.add_argument("--x", choices=typing.get_args(Axis), help="horizontal axis of the plot (default images)")
    parser.add_argument("--log-x", action="store_true", help="logarithmic, in the plot")
    parser.add_argument(
        "--epochs-to", metavar="METRIC=VALUE", help="training epochs until the unguided metric is so good (EP_FID@k)"
    )
    parser.add_argument(
        "--dataset-images", type=int, metavar="N", help="images in the training data, where results do not say it"
    )


def run(args: argparse.Namespace) -> str:
    """Compare; return the table.

    Raises:
        UserError: on results that are not alike, files that are none, and options that contradict each other.
    """
    if args.plot is None and (args.x is not None or args.log_x):
        raise UserError(f"--{'x' if args.x else 'log-x'} is for --plot; add --plot FILE.png")
    if args.csv and args.epochs_to:
        raise UserError("--epochs-to prints sentences, which CSV cannot hold; leave one of them out")
    if args.dataset_images is not None and args.dataset_images < 1:
        raise UserError(f"--dataset-images must be at least 1, got {args.dataset_images}")
    results = read_results(args.results, args.dataset_images)
    if args.list_differences:
        return "\n".join(map(str, differences(results))) or "no differences: these results may stand side by side"
    require_alike(results)
    sentences = _epochs(results, args.epochs_to) if args.epochs_to else ""
    if args.plot is not None:
        save_plot(results, Path(args.plot), metrics=args.metrics, axis=args.x or "images", log_x=args.log_x)
    if args.csv:
        return comparison_csv(results, args.metrics)
    table = comparison_table(results, args.metrics, "markdown" if args.markdown else "text")
    return f"{table}\n\n{sentences}" if sentences else table


def _epochs(results: Sequence[ComparedResult], wanted: str) -> str:
    metric, _, text = wanted.partition("=")
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not metric or not math.isfinite(threshold):
        raise UserError(f"--epochs-to {wanted}: give METRIC=VALUE, for example fid=2")
    title = f"EP_FID@{threshold:g}" if metric == "fid" else f"epochs to {metric} {threshold:g}"
    return "\n".join(f"{one.group}: {title} {_sentence(one, metric)}" for one in epochs_to(results, metric, threshold))


def _sentence(report: EpochsTo, metric: str) -> str:
    if report.reached is None:
        end = "lowest" if lower_is_better(metric) else "highest"
        return f"not reached ({end} {metric}: {_moment(report.best, metric)})"
    before = f"the evaluation before: {_moment(report.before, metric)}" if report.before else "its first evaluation"
    return f"= {report.reached.epochs:.4g} ({metric} {report.reached.metrics[metric]:.5g}; {before})"


def _moment(result: ComparedResult, metric: str) -> str:
    return f"{result.metrics[metric]:.5g} at {result.epochs:.4g} epochs"
