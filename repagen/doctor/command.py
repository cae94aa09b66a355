"""`repagen doctor`: versions, what really runs here, the Hub, and on request a dataset and a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from repagen.data import data_config_from_words
from repagen.doctor.dataset import check_dataset
from repagen.doctor.hub import hub
from repagen.doctor.machine import attention, computations, hardware, software
from repagen.doctor.model import check_model
from repagen.doctor.report import Report, Section, findings_of
from repagen.errors import ProblemsFound, UserError
from repagen.files import replace_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("data", nargs="*", metavar="data.KEY=VALUE", help="a dataset to go through, all of it")
    parser.add_argument("--model", metavar="PATH", help="a saved pipeline to look through and to load")
    parser.add_argument(
        "--encoder", nargs="+", default=[], metavar="ID", help="encoders that must be here, or to be had"
    )
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where results will go; default: .")
    parser.add_argument("--compile", action="store_true", help="try torch.compile, which takes up to a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings there, too")


def run(args: argparse.Namespace) -> str:
    """Check and return the report.

    Raises:
        UserError: words that are no settings of a dataset, or a file that cannot be written.
        ProblemsFound: with the report, where something must be repaired.
    """
    from huggingface_hub import constants

    config = data_config_from_words(args.data) if args.data else None
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder {args.json.parent}; make it first")
    if args.json is not None and args.json.is_dir():
        raise UserError(f"--json {args.json}: this is a folder; name a file, such as {args.json / 'report.json'}")
    disks = [("results", args.output), ("the Hub's cache", Path(constants.HF_HUB_CACHE))]
    checks: dict[str, Callable[[], Section]] = {
        "Software": software,
        "Hardware": lambda: hardware(disks),
        "Computations, tried": lambda: computations(compiler=args.compile),
        "Attention backends, tried": attention,
        "Hugging Face Hub": lambda: hub(args.encoder),
    }
    if config is not None:
        checks["Dataset"] = lambda: check_dataset(config)
    if args.model is not None:
        checks["Model"] = lambda: check_model(args.model)
    report = Report([_whole(title, check) for title, check in checks.items()])
    if args.json is not None:
        content = json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n"
        replace_file(args.json, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    if report.problems:
        raise ProblemsFound(report.text())
    return report.text()


def _whole(title: str, check: Callable[[], Section]) -> Section:
    return Section(title, findings_of("check", lambda: check().findings))
