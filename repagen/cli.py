"""The `repagen` command. Each subcommand lives beside its subject, as a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from repagen.errors import OneLineParser, ProblemsFound, run_as_program

# Command => (module with add_arguments(parser) and run(args) -> text to print or None, one line of help).
COMMANDS = {
    "quickstart": ("repagen.quickstart", "train, sample and evaluate on real handwritten digits, on a CPU"),
    "sample": ("repagen.pipelines.sample_command", "draw images from a saved pipeline into a folder"),
    "reconstruct": (
        "repagen.evaluation.reconstruction.reconstruct_command",
        "encode and decode your own images: what does an autoencoder lose?",
    ),
    "doctor": ("repagen.doctor.command", "check what works here, and on request a dataset and a model"),
    "stats": ("repagen.training.statistics_command", "compute exact latent statistics of a dataset"),
    "cache": ("repagen.training.cache_command", "write latents and alignment targets to safetensors shards"),
    "convert": ("repagen.conversion.convert_command", "turn an official checkpoint into a folder of ours, or back"),
    "export": ("repagen.export.command", "write a pipeline with its own code, for users without repagen"),
    "push": ("repagen.hub.push_command", "publish a saved folder on the Hub, with its model card"),
    "download": (
        "repagen.offline.download_command",
        "fetch everything a recipe needs into one folder, for work offline",
    ),
    "app": ("repagen.app.command", "serve a page that draws images, of one model or of two side by side"),
    "evaluate": (
        "repagen.evaluation.command",
        "generated images, reconstructions, representations: what they are worth",
    ),
    "compare": ("repagen.evaluation.comparison.command", "put results side by side, if they are alike"),
    "reference": ("repagen.evaluation.reference_command", "make, merge and check reference statistics"),
    "recipes": ("repagen.training.recipes_command", "list the presets with paper, cost and expected result"),
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="repagen", description=__doc__.split(". ")[0] + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module_name, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, description=help_line)
        if name == command:  # the other commands' modules stay unloaded
            importlib.import_module(module_name).add_arguments(subparser)
    return parser.parse_args(arguments)


def _run(arguments: Sequence[str]) -> None:
    args = _parse(arguments)
    try:
        text = importlib.import_module(COMMANDS[args.command][0]).run(args)
    except ProblemsFound as found:
        print(found)
        raise SystemExit(1) from None
    if text:
        print(text)


def main() -> None:
    """Entry point of the `repagen` console script."""
    run_as_program(_run)


if __name__ == "__main__":
    main()
