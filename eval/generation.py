"""`repagen evaluate generation` on several processes: accelerate launch eval/generation.py --model PATH ..."""

from __future__ import annotations

import sys

from repagen import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate", "generation"]
    cli.main()
