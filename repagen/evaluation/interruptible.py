"""What a command does around an evaluation that may be killed: the same command continues it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from accelerate import PartialState

from repagen.evaluation.sinks import SampleWriter
from repagen.evaluation.store import require_own_folder


class _Result(Protocol):
    def table(self) -> str: ...


ResultT = TypeVar("ResultT", bound=_Result)


def run_interruptible(
    args: argparse.Namespace,
    num_samples: int,
    evaluate: Callable[[Path | None, SampleWriter | None], ResultT],
    write: Callable[[ResultT], None],
) -> str | None:
    """Evaluate, write the result, and remove what was kept for a command that is killed.

    Args:
        args: `output`, a file beside which things are kept, and `save_samples`; both may be None.
        num_samples: of the images that go to `save_samples`.
        evaluate: called with the folder to keep things in, and with what takes the images.
        write: writes the result; called on the main process.

    Returns:
        The table on the main process and None on the others.

    Raises:
        UserError: on places that are taken by something else.
    """
    folder = Path(f"{args.output}.partial") if args.output else None
    continuing = folder is not None and folder.exists()
    if folder is not None:
        require_own_folder(folder)
    writer = SampleWriter(Path(args.save_samples), num_samples, continuing=continuing) if args.save_samples else None
    result = evaluate(folder, writer)
    PartialState().wait_for_everyone()
    if not PartialState().is_main_process:
        return None
    if writer is not None:
        writer.finish()
    write(result)
    if folder is not None:
        shutil.rmtree(folder)
    if writer is not None:
        writer.remove_rows()
    return result.table()
