"""`repagen reference` on several processes: accelerate launch eval/reference.py make --data PATH ..."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from repagen.errors import OneLineParser, run_as_program
from repagen.evaluation.reference_command import add_arguments, run


def main(arguments: Sequence[str]) -> None:
    parser = OneLineParser(description=__doc__)
    add_arguments(parser)
    accelerator = Accelerator()
    accelerator.print(run(parser.parse_args(arguments)))
    accelerator.end_training()


if __name__ == "__main__":
    run_as_program(main)
