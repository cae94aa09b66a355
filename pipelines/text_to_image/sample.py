"""Draw images of prompts from a saved pipeline and save them as one grid.

python sample.py --model org/model --prompt "a red cube" "two blue balls" --guidance-scale 6 --output grid.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from repagen.errors import OneLineParser, run_as_program
from repagen.pipelines.grid import save_image_grid
from repagen.pipelines.sample_command import add_sampling_arguments, sample_images


def main(arguments: Sequence[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("grid.png"), metavar="PNG", help="default: grid.png")
    args = parser.parse_args(arguments)
    save_image_grid(list(sample_images(args)), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_as_program(main)
