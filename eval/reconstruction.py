"""`repagen evaluate reconstruction` on several processes: accelerate launch eval/reconstruction.py ..."""

from __future__ import annotations

import sys

from repagen import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate", "reconstruction"]
    cli.main()
