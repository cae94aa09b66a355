"""`repagen evaluate show`: what a protocol fixes, in plain words."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict

from repagen.evaluation.protocol import EvaluationProtocol, load_protocol, metric_names, protocol_names
from repagen.evaluation.show import Explanation, explain

_WIDTH = 119


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "protocol", nargs="?", metavar="PROTOCOL", help=f"one of {', '.join(protocol_names())}, or a YAML file"
    )
    parser.add_argument("--json", action="store_true", help="for machines: all settings, and the sentences")


def run(args: argparse.Namespace) -> str:
    """Explain a protocol, or list them all.

    Raises:
        UserError: for an unknown name, or a YAML file that is no protocol.
    """
    if args.protocol is not None:
        explanation = explain(args.protocol)
        return json.dumps(explanation.as_dict(), indent=2) if args.json else _text(explanation)
    protocols = {name: load_protocol(name) for name in protocol_names()}
    if args.json:
        return json.dumps({name: asdict(protocol) for name, protocol in protocols.items()}, indent=2)
    return _listing(protocols)


def measured(protocol: EvaluationProtocol) -> list[str]:
    """Names of the figures that a protocol gives, spreads left out."""
    names = [
        name for space in protocol.spaces for metric in space.metrics for name in metric_names(metric, space.name)
    ]
    names += ["fdr"] if any("fdr" in space.metrics for space in protocol.spaces) else []
    return [name for name in names if "_std" not in name]


def _listing(protocols: dict[str, EvaluationProtocol]) -> str:
    """All protocols: a line of settings each, title and metrics below it."""
    width = max(map(len, protocols))
    lines = []
    for name, protocol in protocols.items():
        count = f"{protocol.num_samples:,}" if protocol.num_samples else "any"
        lines += [
            f"{name:<{width}}  {protocol.title}",
            f"{'':<{width}}  N {count}, labels {protocol.label_mode or 'any'}: {', '.join(measured(protocol))}",
        ]
    return "\n".join([*lines, "", "`repagen evaluate show PROTOCOL` explains one."])


def _text(explanation: Explanation) -> str:
    protocol = explanation.protocol
    wrapper = textwrap.TextWrapper(_WIDTH, break_on_hyphens=False)
    head = [f"{explanation.name}: {protocol.title}", f"source: {protocol.source}"]
    lines = [line for text in (*head, protocol.explanation) for line in wrapper.wrap(text)]
    width = max(len(title) for title, _ in explanation.facts)
    lines.append("")
    wrapper.subsequent_indent = " " * (width + 2)
    for title, sentences in explanation.facts:
        wrapper.initial_indent = f"{title:<{width}}  "
        lines += wrapper.wrap(sentences)
    return "\n".join([*lines, "", "Measure it with", f"  {explanation.command}"])
