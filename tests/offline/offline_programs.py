"""Runs programs against a bundle, without a network: every case in a fork of one fresh process.

Reads a JSON list of cases on stdin, {"name", "words": a command line, "missing": paths to hide meanwhile}, and writes
{name: [exit code, what went to stderr]} to the file that it is given.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any


def refuse(*given: Any) -> None:
    raise OSError(f"the network was asked for: {given[1:]}")


socket.socket.connect = refuse  # type: ignore[assignment,method-assign]
socket.getaddrinfo = refuse  # type: ignore[assignment]

import repagen.cli  # noqa: E402
from repagen.errors import run_as_program  # noqa: E402
from repagen.training import decoder, generator  # noqa: E402

PROGRAMS = {"generator": generator.main, "decoder": decoder.main, "repagen": repagen.cli._run}


def run(words: list[str]) -> tuple[int, str]:
    """Run a command line in a fork: => exit code, stderr."""
    with tempfile.TemporaryFile() as errors:
        process = os.fork()
        if process == 0:
            os.dup2(errors.fileno(), 2)
            code = 0
            try:
                run_as_program(PROGRAMS[words[0]], words[1:])
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        errors.seek(0)
        return code, errors.read().decode()


def run_without(words: list[str], missing: list[str]) -> tuple[int, str]:
    """The same while files or folders are under other names."""
    hidden = [(Path(path), Path(f"{path}.hidden")) for path in missing]
    for path, away in hidden:
        path.rename(away)
    try:
        return run(words)
    finally:
        for path, away in hidden:
            away.rename(path)


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    answers = {case["name"]: run_without(case["words"], case["missing"]) for case in cases}
    Path(sys.argv[1]).write_text(json.dumps(answers))
