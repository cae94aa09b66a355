"""`repagen app`: serve the page on this machine."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repagen.errors import UserError, refusing
from repagen.pipelines.sample_command import PIPELINE_KINDS, add_model_arguments, open_pipeline

if TYPE_CHECKING:
    from repagen.app.page import Side

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repagen app`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--beside", metavar="PATH", help="second model, which draws the same; with --beside-lora default: --model"
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
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, got {args.port}")
    from repagen.app.page import STYLE, Page, build_page

    sides = _open_sides(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end as by Ctrl-C, which removes the folder
    with tempfile.TemporaryDirectory(prefix="repagen-app-") as folder:
        blocks: Any = build_page(Page(sides, Path(folder)))
        with refusing(f"--host {args.host} --port {args.port} cannot be used"):
            blocks.queue(default_concurrency_limit=1).launch(
                server_name=args.host,
                server_port=args.port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                footer_links=["api"],
                css=STYLE,
            )
        logger.warning("the page is at http://%s:%d; Ctrl-C ends it", args.host, args.port)
        blocks.block_thread()


def _open_sides(args: argparse.Namespace) -> list[Side]:
    from repagen.app.page import Side

    asked = [args]
    if args.beside or args.beside_lora:
        beside = copy.copy(args)
        beside.model, beside.lora = args.beside or args.model, args.beside_lora
        beside.revision = None if args.beside else args.revision
        asked.append(beside)
    return [Side(" + ".join([each.model, *each.lora]), *open_pipeline(each, PIPELINE_KINDS)) for each in asked]
