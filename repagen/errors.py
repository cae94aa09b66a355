"""How a user's mistake is reported: one line, exit code 2, no traceback unless `--debug` asks for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """A mistake the user can repair.

    The message is one line that says what is wrong, where (`file:key`), what was given, what is allowed and what to
    run next. Programs print it and exit with code 2.
    """


def run_as_program(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Run a command-line program: print a `UserError` as one line and exit with code 2.

    Args:
        main: the program; takes the command-line arguments without the program's name and without `--debug`.
        arguments: the arguments; `sys.argv[1:]` by default. `--debug` among them shows the full traceback.

    Raises:
        SystemExit: with code 2 on a `UserError`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        main([word for word in words if word != "--debug"])
    except UserError as error:
        if debug:
            raise
        sys.stderr.write(f"repagen: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
