"""Starting and stopping a training program: command line, accelerator, signals, exit codes."""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

import repagen
from repagen.errors import OneLineParser, UserError
from repagen.training.run_config import RunConfig

logger = logging.getLogger(__name__)

EXIT_CODE_STOPPED = 75  # EX_TEMPFAIL: the same command again continues
ConfigT = TypeVar("ConfigT", bound=RunConfig)


class RunStopped(Exception):
    """A signal stopped the run after a checkpoint; the same command again continues. Programs exit with code 75."""


def program_main(
    load: Callable[[str, Sequence[str]], ConfigT], train: Callable[[ConfigT], Path], name: str, words: Sequence[str]
) -> None:
    """The command line of a training program: `--config NAME_OR_PATH [key=value ...]`.

    Args:
        load: makes the configuration of the preset or file and the `key=value` words.
        train: the program.
        name: what is trained.
        words: of the command line.

    Raises:
        UserError: for a wrong configuration.
        SystemExit: with code 75 when a signal stopped the run after a checkpoint.
    """
    parser = OneLineParser(prog=name, description="The same command again continues.")
    parser.add_argument(
        "--config", required=True, metavar="NAME_OR_PATH", help="a preset (see `repagen recipes`) or a YAML"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    args = parser.parse_intermixed_args(list(words))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        result = train(load(args.config, args.overrides))
    except RunStopped as stop:
        logger.info("%s", stop)
        raise SystemExit(EXIT_CODE_STOPPED) from None
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("finished: %s", result)


# --- machine -------------------------------------------------------------------------------------------------------


def start_accelerator(config: RunConfig) -> Accelerator:
    """Start accelerate as the configuration says, the process group included.

    Raises:
        UserError: if the launcher contradicts the configuration, or a tracker is not there.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", {"bf16": "bf16"}.get(config.precision)):
        raise UserError(
            f"precision: accelerate launch asks for {asked!r} but the configuration for {config.precision!r}; drop "
            "--mixed_precision there, or set precision=bf16"
        )
    torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    log_with: Any = config.log_with or None
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision="no",  # the run's own autocast is the only one
            log_with=log_with,
            project_dir=str(Path(config.output_dir).expanduser()) if log_with else None,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"log_with: {config.log_with} cannot be used ({str(error).splitlines()[0]})") from None
    if accelerator.num_processes > 1 and not str(accelerator.distributed_type.value).startswith("MULTI_"):
        raise UserError(
            f"accelerate launch: {accelerator.distributed_type.value} is not supported; use plain multi-GPU (DDP)"
        )
    missing = set(config.log_with) - {"all"} - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise UserError(f"log_with: {', '.join(sorted(missing))} is not installed or not a tracker of accelerate")
    return accelerator


def environment(processes: int) -> dict[str, Any]:
    """What may move the last bits of a result without being configured."""
    return {
        "processes": processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repagen": repagen.__version__,
        "machine": platform.machine(),
    }


@dataclass
class StopFlag:
    """Set by a signal, read at the step boundaries."""

    requested: bool = False


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop at the next step boundary; a second SIGINT stops at once."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield flag
        return

    def request(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and flag.requested:
            raise KeyboardInterrupt
        flag.requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
