"""`repagen reference` on several processes: accelerate launch eval/reference.py make --data PATH ..."""

from __future__ import annotations

import sys

from repagen import cli

if __name__ == "__main__":
    sys.argv.insert(1, "reference")
    cli.main()
