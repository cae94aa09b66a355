"""Pictures of a sweep: blocks against times as a heat map, an encoder's layers as bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repagen.evaluation.representation.result import Reading, RepresentationResult

_LONGEST_NAME = 60
_TITLES = {
    "linear": "linear probe, accuracy",
    "knn": "kNN, accuracy",
    "attentive": "attentive probe, accuracy",
    "cknna": "CKNNA to the target",
    "cka": "unbiased CKA to the target",
    "lds": "LDS",
    "cds": "CDS",
    "rmsc": "RMSC",
    "pck": "correspondence of warped images, PCK",
    "pck_identity": "correspondence of equal images, PCK",
    "hyperfeatures": "share in the mix that knows classes (hyperfeatures)",
    "hyperfeatures_pck": "share in the mix that matches points (hyperfeatures)",
}


def save_heat_maps(result: RepresentationResult, folder: Path) -> list[Path]:
    """Write one PNG a read-out into a folder that exists, `<read-out>.png`; return their paths.

    Mixes (hyperfeatures), which have one value for all slices, are shown by each slice's share in the mix.
    """
    paths = [folder / f"{name}.png" for name in result.readouts]
    for name, path in zip(result.readouts, paths, strict=True):
        _save(result, name, _readings(result, name), path)
    return paths


def _readings(result: RepresentationResult, name: str) -> list[Reading]:
    if name not in result.mixes:
        return [result.reading(name, place) for place in result.slices]
    return [
        Reading(name, place, tuple(mix.weights[number] for mix in result.mixes[name]))
        for number, place in enumerate(result.slices)
    ]


def _save(result: RepresentationResult, name: str, readings: list[Reading], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = sorted({place.block for place in result.slices})
    times = sorted({place.timestep for place in result.slices if place.timestep is not None})
    columns = len(times) or len(blocks)
    size = (max(5.5, 1.1 * columns + 2), max(3.2, 0.55 * len(blocks) + 2) if times else 3.6)
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    if times:
        _draw_map(figure, axis, readings, blocks, times)
    else:
        _draw_bars(axis, readings)
    axis.set_title(f"{_TITLES[name]}\n{_subtitle(result, name)}", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_map(figure: Any, axis: Any, readings: list[Reading], blocks: list[int], times: list[float]) -> None:
    values = [[0.0] * len(times) for _ in blocks]
    for item in readings:
        assert item.place is not None and item.place.timestep is not None
        values[blocks.index(item.place.block)][times.index(item.place.timestep)] = item.mean
    image = axis.imshow(values, cmap="viridis", aspect="auto", origin="lower")
    for item in readings:
        assert item.place is not None and item.place.timestep is not None
        bright = image.norm(item.mean) > 0.6
        spread = "" if item.half_width is None else f"\n±{item.half_width:.3f}"
        place = (times.index(item.place.timestep), blocks.index(item.place.block))
        colour = "black" if bright else "white"
        axis.annotate(f"{item.mean:.3f}{spread}", place, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    axis.set_yticks(range(len(blocks)), [str(block) for block in blocks])
    axis.set(xlabel="t (0 = data, 1 = noise)", ylabel="block")
    figure.colorbar(image, ax=axis)


def _draw_bars(axis: Any, readings: list[Reading]) -> None:
    layers = [item.place.block for item in readings if item.place is not None]
    errors = None if readings[0].half_width is None else [item.half_width for item in readings]
    bars = axis.bar(layers, [item.mean for item in readings], yerr=errors, capsize=3)
    axis.bar_label(bars, [f"{item.mean:.3f}" for item in readings], fontsize=7, padding=2)
    axis.set_xticks(layers)
    axis.margins(y=0.15)
    axis.set(xlabel="layer", ylabel="value")


def _subtitle(result: RepresentationResult, readout: str) -> str:
    """Model, number of images and seeds, in two lines."""
    spread = "" if len(result.seeds) == 1 else ", mean ± 95 %"
    seeds = f"seed{'s' * (len(result.seeds) > 1)} {', '.join(map(str, result.seeds))}{spread}"
    name = str(result.subject.get("name") or f"{result.subject['kind']} {result.subject['weights'][:12]}")
    short = name if len(name) <= _LONGEST_NAME else "..." + name[-_LONGEST_NAME:]
    return f"{short}\nimages: {result.shown_images(readout)}; {seeds}"
