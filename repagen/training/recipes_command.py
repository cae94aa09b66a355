"""`repagen recipes`: the presets with paper, cost and expected result."""

from __future__ import annotations

import argparse
import importlib.resources
import textwrap

from repagen.config import preset_names, read_preset

_WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", choices=preset_names(), metavar="NAME", help="print this preset's file")


def run(args: argparse.Namespace) -> str:
    """List the presets, or print one."""
    if args.name:
        return (
            (importlib.resources.files("repagen.configs") / f"{args.name}.yaml").read_text(encoding="utf-8").rstrip()
        )
    return "\n\n".join(_describe(name) for name in preset_names())


def _describe(name: str) -> str:
    recipe = read_preset(name)["recipe"]
    command = f"accelerate launch -m repagen.training.{recipe['program']} --config {name}"
    rows = [("paper", recipe["paper"]), ("cost", recipe["cost"]), ("expected", recipe["expected"]), ("run", command)]
    lines = [f"{name}: {recipe['title']}"]
    for label, text in rows:
        lines += textwrap.wrap(f"{label:<9} {text}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 12)
    return "\n".join(lines)
