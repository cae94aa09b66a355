"""What stands beside every figure: versions, remarks, and the lines of a table."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState

from repagen.evaluation.extractor import ExtractorIdentity
from repagen.evaluation.inception import INCEPTION, is_published_inception

_LEAST_COMPARABLE_IMAGES = 2048
_PACKAGES = ("repagen", "torch", "diffusers", "transformers", "torch-fidelity", "torchvision", "numpy", "pillow")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, the cells of a column below each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def described(facts: Mapping[str, Any]) -> str:
    """Return facts on one line, hashes shortened, facts within a fact in parentheses."""

    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"({described(value)})"
        text = str(value)
        return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text

    return ", ".join(f"{name}={shown(value)}" for name, value in facts.items())


def distance_remarks(
    counts: Mapping[str, int | None], dimension: int, extractor: ExtractorIdentity
) -> tuple[str, ...]:
    """Return why a Frechet distance must not stand beside figures from elsewhere; empty where it may.

    Args:
        counts: what the images are => how many of them; None where it is not known.
        dimension: number of features.
        extractor: what made them.
    """
    needed = max(_LEAST_COMPARABLE_IMAGES, dimension)
    remarks = [
        f"{count} {name}, but {dimension} features need at least {needed}; the distance is biased upwards in "
        "proportion to 1/N"
        for name, count in counts.items()
        if count is not None and count < needed
    ]
    if extractor.name == INCEPTION and not is_published_inception(extractor):
        remarks.append("Inception weights are not the published ones")
    return tuple(remarks)


def software_versions(*further: str) -> dict[str, str]:
    """Return the versions of the packages that figures depend on, those of `further` packages, and the device."""
    versions = {}
    for package in (*_PACKAGES, *further):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # some are extras
            versions[package] = "not installed"
    return {**versions, "device": _device_name()}


def _device_name() -> str:
    device = PartialState().device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
