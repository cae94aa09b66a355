"""`repagen reference`: make, merge, check and import reference statistics."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from repagen.errors import UserError, require_at_least
from repagen.evaluation.extractor import Pooling
from repagen.evaluation.generation import open_extractors, require_reference
from repagen.evaluation.generation_command import choose_protocol
from repagen.evaluation.processes import all_processes
from repagen.evaluation.protocol import EvaluationProtocol, SpaceRule
from repagen.evaluation.reference import load_statistics
from repagen.evaluation.reference_building import import_statistics, make_reference, merge_references, require_new_npz
from repagen.evaluation.reference_report import describe_reference, suits
from repagen.evaluation.samples import open_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="means and covariances of images, in one pass")
    make.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folder of images, npz with arr_0, or data.KEY=VALUE ...",
    )
    _add_spaces(make, required=True)
    make.add_argument(
        "--batch-size", type=int, default=128, help="images in hand at once per process; no figure depends on it"
    )
    make.add_argument("--max-bad", type=int, default=0, help="unreadable images to leave out (default 0)")
    make.add_argument(
        "--keep-images", type=int, default=0, metavar="N", help="carry N random images for precision and recall"
    )
    merge = actions.add_parser("merge", help="the statistics of the union of disjoint parts")
    merge.add_argument("files", nargs="+", metavar="FILE")
    check = actions.add_parser("check", help="what a file holds, and whether it suits a protocol")
    check.add_argument("file", metavar="FILE")
    _add_spaces(check, required=False)
    take = actions.add_parser("import", help="take over statistics of another tool, on your word for what made them")
    take.add_argument("files", nargs="+", metavar="FILE")
    take.add_argument(
        "--space", nargs="+", metavar="NAME", help="space of each file in the protocol (default: its only)"
    )
    _add_spaces(take, required=True)
    take.add_argument("--num-images", type=int, metavar="N", help="images behind the statistics, where it is known")
    for action in (make, merge, take):
        action.add_argument("--output", required=True, metavar="FILE.npz", help="the new file")


def _add_spaces(parser: argparse.ArgumentParser, required: bool) -> None:
    spaces = parser.add_mutually_exclusive_group(required=required)
    spaces.add_argument("--protocol", metavar="NAME", help="a protocol's name or YAML file: its spaces")
    spaces.add_argument("--extractor", metavar="ENCODER", help="an encoder's id or folder: its space alone")
    parser.add_argument("--pooling", choices=typing.get_args(Pooling)[:2], help="tokens of the encoder (default mean)")
    parser.add_argument("--extractor-weights", metavar="FILE", help="Inception's weights, where not in torch's cache")
    parser.set_defaults(metrics=None)  # statistics serve all of them


def run(args: argparse.Namespace) -> str | None:
    """Do what is asked; return what the file holds, on the main process.

    Raises:
        UserError: as the functions of `reference_building` and `reference_report` do.
    """
    with all_processes():
        if args.action != "make" and not PartialState().is_main_process:
            return None
        return {"make": _make, "merge": _merge, "check": _check, "import": _import}[args.action](args)


def _make(args: argparse.Namespace) -> str | None:
    require_at_least(args, {"batch_size": 1, "max_bad": 0, "keep_images": 0})
    require_new_npz(Path(args.output))
    _, protocol = choose_protocol(args)
    source = open_images(args.data)
    extractors = open_extractors(protocol, args.extractor_weights)
    make_reference(
        args.output,
        source,
        extractors,
        batch_size=args.batch_size,
        max_bad_images=args.max_bad,
        keep_images=args.keep_images,
    )
    return describe_reference(load_statistics(args.output)) if PartialState().is_main_process else None


def _merge(args: argparse.Namespace) -> str:
    merge_references(args.files, args.output)
    return describe_reference(load_statistics(args.output))


def _check(args: argparse.Namespace) -> str:
    reference = load_statistics(args.file)
    text = describe_reference(reference)
    if args.protocol is None and args.extractor is None:
        for option in ("pooling", "extractor_weights"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} is for a check against --protocol or --extractor")
        return text
    name, protocol = choose_protocol(args)
    require_reference(protocol, name, reference)  # before weights are looked for
    return f"{text}\n{suits(protocol, name, reference, open_extractors(protocol, args.extractor_weights))}"


def _import(args: argparse.Namespace) -> str:
    name, protocol = choose_protocol(args)
    rules = _rules(protocol, name, args.space)
    extractors = open_extractors(dataclasses.replace(protocol, spaces=rules), args.extractor_weights)
    import_statistics(args.files, rules, extractors, args.output, num_images=args.num_images)
    return describe_reference(load_statistics(args.output))


def _rules(protocol: EvaluationProtocol, name: str, spaces: Sequence[str] | None) -> list[SpaceRule]:
    known = {rule.name: rule for rule in protocol.spaces}
    if spaces is None and len(known) > 1:
        raise UserError(f"protocol {name} has the spaces {', '.join(known)}; say which with --space")
    chosen = spaces or list(known)
    for space in chosen:
        if space not in known:
            raise UserError(f"--space {space}: protocol {name} has the spaces {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--space {' '.join(chosen)}: name each space once")
    return [known[space] for space in chosen]
