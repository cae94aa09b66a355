"""`repagen download`: everything a recipe needs into one folder, for machines without a network."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from repagen.errors import UserError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "words", nargs="*", metavar="NAME [key=value ...]",
        help="a recipe or YAML file with its overrides, a protocol, inception, lpips-vgg, lpips-alex, or a Hub id",
    )  # fmt: skip
    place = parser.add_mutually_exclusive_group(required=True)
    # argparse takes positional words from one place only; those behind DIR come with it.
    folder: dict[str, Any] = {"nargs": "+", "metavar": ("DIR", "key=value")}
    place.add_argument("--to", **folder, help="folder to fill; run again, it fetches what is missing")
    place.add_argument("--check", **folder, help="verify completeness and hashes, without a network")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--with-data", action="store_true", help="the recipe's Hub dataset too; with a Hub id: it is a dataset's"
    )


def run(args: argparse.Namespace) -> str:
    """Fill a folder, or check it.

    Returns:
        What is there and how to use it.

    Raises:
        UserError: for a wrong name or key; and at the end, where something is missing, after a line about each thing.
    """
    from repagen.offline.bundle import Bundle
    from repagen.offline.recipes import Request

    folder, *behind = args.check or args.to
    words = [*args.words, *behind]
    request = None
    if words:
        request = Request(words[0], tuple(words[1:]), args.revision, args.with_data)
    elif args.to or args.revision or args.with_data:
        raise UserError("NAME: nothing given; give a recipe (`repagen recipes`), a protocol or a Hub id")
    bundle = Bundle(Path(folder))
    if args.check:
        needs = request.needs() if request else None
        problems = list(bundle.problems(needs, request.command if request else ""))
        done = f"{bundle.folder}: everything is there and whole"
    else:
        assert request is not None, "checked above"
        entries = bundle.fill(request)
        problems = [f"{entry.need.why}: {entry.problem}" for entry in entries if entry.problem]
        count = sum(bool(entry.files) for entry in entries)
        done = f"{bundle.folder}: {count} of {len(entries)} needs of {request.name} are in it and verified"
    if problems:
        for problem in problems:
            logger.warning("%s", problem)
        raise UserError(f"{bundle.folder}: not complete, {len(problems)} missing or damaged, named above")
    return f"{done}; where there is no network:\n{bundle.environment}"
