"""`repagen app`: serve the page on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from repagen.errors import UserError, refusing
from repagen.pipelines.adapters import load_adapters
from repagen.pipelines.sample_command import add_model_arguments, load_pipeline

if TYPE_CHECKING:
    from repagen.app.page import Side

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repagen app`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--beside", metavar="PATH", help="second model that draws the same; default with --beside-lora: --model"
    )
    parser.add_argument(
        "--beside-lora", nargs="+", default=[], metavar="PATH[=WEIGHT]", help="adapters of the second model"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=7860)


def run(args: argparse.Namespace) -> None:
    """Load the models and serve the page until it is interrupted.

    Raises:
        UserError: gradio is not installed, a model cannot be loaded, or the address cannot be used.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("repagen app needs gradio; install it with `pip install 'repagen[app]'`")
    from repagen.app.page import Page, build_page

    sides = [_side(args, args.model, args.lora)]
    if args.beside or args.beside_lora:
        sides.append(_side(args, args.beside or args.model, args.beside_lora))
    blocks: Any = build_page(Page(sides))
    with refusing(f"--host {args.host} --port {args.port} cannot be used"):
        blocks.queue(default_concurrency_limit=1).launch(
            server_name=args.host, server_port=args.port, share=False, quiet=True, prevent_thread_lock=True
        )
    logger.warning("the page is at http://%s:%d; Ctrl-C ends it", args.host, args.port)
    blocks.block_thread()


def _side(args: argparse.Namespace, model: str, adapters: list[str]) -> Side:
    from repagen.app.page import Side

    pipe: Any = load_pipeline(model, args.device, args.dtype, args.revision if model == args.model else None)
    load_adapters(pipe, adapters)
    return Side(" + ".join([model, *adapters]), pipe)
