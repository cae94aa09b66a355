"""`repagen export --remote-code`: a pipeline in, a folder that loads where repagen is not installed out."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a pipeline")
    parser.add_argument(
        "--remote-code",
        action="store_true",
        required=True,
        help="carry the source that the pipeline samples with, for diffusers' trust_remote_code=True",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of MODEL on the Hub; default: main")


def run(args: argparse.Namespace) -> str:
    """Export; return what was written and how it gets to the Hub.

    Raises:
        UserError: a model that cannot be exported, or an output folder with files in it.
    """
    from repagen.export.remote_code import BRANCH, export_remote_code

    folder = export_remote_code(args.model, args.output, args.revision)
    files = sorted(folder.rglob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    push = f"repagen push {shlex.quote(str(folder))} --to ORG/NAME --revision {BRANCH}"
    return (
        f"{folder} holds the pipeline with {len(files)} Python files ({lines} lines) and loads without repagen; "
        f"put it on a branch of its repository: {push}"
    )
