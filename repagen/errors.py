"""How a user's mistake is reported: one line, exit code 2, no traceback unless `--debug` asks for it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

# They warn of torchao as soon as it is installed, whether or not it is used.
_CHATTER = ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


class UserError(ValueError):
    """A mistake the user can repair.

    The message is one line that says what is wrong, where (`file:key`), what was given, what is allowed and what to
    run next. Programs print it and exit with code 2.
    """


class ProblemsFound(Exception):  # no error of the command: it did what it is for
    """A check ran to its end and found what must be repaired.

    The message is its report. The command line prints it and exits with code 1.
    """


class OneLineParser(argparse.ArgumentParser):
    """A parser of command lines whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError`."""
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


def require_at_least(args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Check numbers of a command line; options that were not given (None) pass.

    Args:
        args: the parsed options.
        least: name of an option, with underscores => its smallest value.

    Raises:
        UserError: naming the option.
    """
    for option, smallest in least.items():
        value = getattr(args, option)
        if value is not None and value < smallest:
            raise UserError(f"--{option.replace('_', '-')} must be at least {smallest}, got {value}")


def require_unicode(text: str, where: str) -> None:
    """Check that a text can be written and read by anything; JSON and command lines may hold others.

    Args:
        text: any.
        where: what it is called in the message.

    Raises:
        UserError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} is {text[error.start]!a}, which is half a character or a byte that is "
            "not UTF-8; write it anew"
        ) from None


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn what a library raises over a user's file into one line: `what (the reason)`.

    Raises:
        UserError: in place of the library's error.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what} ({reason or type(error).__name__})") from error


@contextmanager
def naming(keys: Mapping[str, str]) -> Iterator[None]:
    """Raise a `UserError` about an argument again under the name that the user gave it.

    Args:
        keys: how messages begin => what they begin with instead; the first that fits.

    Raises:
        UserError: in place of the one within.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        start = next((start for start in keys if message.startswith(start)), None)
        if start is None:
            raise
        raise UserError(keys[start] + message.removeprefix(start)) from error


def one_line(error: BaseException, length: int = 160) -> str:
    """Return an error's message as one line, shortened; its kind where it says nothing."""
    text = " ".join(str(error).split())
    return f"{text[:length]}..." if len(text) > length else text or type(error).__name__


def _close_progress_bars() -> None:
    """End the bars that an error left open, so that its message starts a line."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def run_as_program(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Run a command-line program: print a `UserError`, or a path that cannot be used, as one line; exit with code 2.

    Ctrl-C is one line too, with code 130.

    Args:
        main: the program; takes the command-line arguments without the program's name and without `--debug`.
        arguments: the arguments; `sys.argv[1:]` by default. `--debug` among them shows the full traceback.

    Raises:
        SystemExit: with code 2 on a `UserError` or an `OSError`, 130 on a `KeyboardInterrupt`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main([word for word in words if word != "--debug"])
    except (UserError, OSError) as error:
        if debug:
            raise
        _close_progress_bars()
        sys.stderr.write(f"repagen: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        _close_progress_bars()
        sys.stderr.write("repagen: interrupted\n")
        raise SystemExit(130) from None  # as shells count SIGINT
