"""An environment with a few distributions and what they require, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PROGRAM = Path(__file__).with_name("sample_places.py")
NEEDED = ("torch", "diffusers", "accelerate", "huggingface_hub", "numpy", "Pillow")


def link_distributions(site: Path, *more: str) -> None:
    """Fill a folder with links to the distributions of `NEEDED` and `more`, and to all that they require."""
    site.mkdir()
    waiting, seen = [*NEEDED, *more], set[str]()
    while waiting:
        found = distribution(waiting.pop())
        name = found.metadata["Name"].lower()
        if name in seen:
            continue
        seen.add(name)
        requirements = [Requirement(text) for text in found.requires or []]
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))


def sample_without_repagen(
    jobs: list[dict[str, Any]], site: Path, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `sample_places.py` with a bare environment and a home of its own, from another folder."""
    home.mkdir(exist_ok=True)
    inherited = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    return subprocess.run(
        [sys.executable, "-I", "-S", str(PROGRAM), str(site)],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=300, check=False, cwd=home,
        env={
            **inherited, "HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            **environment,
        },
    )  # fmt: skip
