"""`repagen evaluate`: one subcommand for each thing that can be evaluated."""

from __future__ import annotations

import argparse
import importlib

from repagen.evaluation.processes import all_processes

# Subcommand => (module with add_arguments(parser) and run(args) -> text to print or None, one line of help).
SUBCOMMANDS = {
    "generation": ("repagen.evaluation.generation_command", "generated images against real ones, by a named protocol"),
    "representation": (
        "repagen.evaluation.representation.command",
        "what a generator's blocks or an encoder's layers know: probes, similarity, structure, correspondence",
    ),
    "reconstruction": (
        "repagen.evaluation.reconstruction.command",
        "an autoencoder's reconstructions against the same originals: rFID, PSNR, SSIM, LPIPS",
    ),
    "show": ("repagen.evaluation.show_command", "what a protocol fixes, in plain words; without a name, all of them"),
    "text-to-image": (
        "repagen.evaluation.text_to_image.command",
        "images against their prompts (CLIPScore, PickScore), or their export for GenEval and DPG-Bench",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their options."""
    subparsers = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (module_name, help_line) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, description=help_line)
        importlib.import_module(module_name).add_arguments(subparser)


def run(args: argparse.Namespace) -> str | None:
    """Run the subcommand; return what it has to say, on the main process.

    Under `accelerate launch` or torchrun all processes take part; the same command without them is one process.
    """
    with all_processes():
        return importlib.import_module(SUBCOMMANDS[args.subject][0]).run(args)
