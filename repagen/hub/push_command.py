"""`repagen push`: publish a saved folder on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from repagen.errors import UserError
from repagen.hub.publishing import publish_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repagen push`."""
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a saved pipeline, autoencoder, transformer or adapter"
    )
    parser.add_argument("--to", required=True, metavar="ORG/NAME", help="the repository; made if needed")
    parser.add_argument("--private", action="store_true", help="only its owner sees it; refuses one that is open")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if needed; default: main")
    parser.add_argument("--message", metavar="TEXT", help="first line of the commit")


def run(args: argparse.Namespace) -> str:
    """Publish the folder in one commit; return its address.

    Raises:
        UserError: the folder cannot be published, or the Hub refuses or cannot be reached.
    """
    folder = args.folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a saved model or adapter")
    commit = publish_folder(
        folder,
        args.to,
        private=True if args.private else None,
        revision=args.revision,
        commit_message=args.message,
    )
    return f"published: {commit}"
