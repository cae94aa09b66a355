"""`repagen quickstart`: the whole path of the library on a CPU in minutes, without downloads of weights.

It calls the same programs as real training: on real handwritten digits by class (`digits.py`), or on drawn scenes by
prompt (`text.py`). The same command again continues where a stopped one left off.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from repagen.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--text", action="store_true", help="text to image on drawn shapes: a shipped pipeline, and one from scratch"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of everything (runs/digits; with --text runs/shapes)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches, noise and samples (%(default)s)")


def run(args: argparse.Namespace) -> str:
    """Run a quickstart and describe what it made.

    Raises:
        UserError: the folder cannot be used.
    """
    from repagen.quickstart import digits, text

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    output = Path(args.output or ("runs/shapes" if args.text else "runs/digits")).expanduser()
    if any(place.exists() and not place.is_dir() for place in (output, *output.parents)):
        raise UserError(f"--output is {output}, which is or lies under a file; give a folder, new or of a quickstart")
    return text.run(output, args.seed) if args.text else digits.run(output, args.seed)
