"""A picture of single cases: original, reconstruction and difference of the worst images and of typical ones."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from repagen.errors import UserError
from repagen.evaluation.reconstruction.evaluate import reconstruct
from repagen.evaluation.reconstruction.result import ImageFigures, PairedMetric, ReconstructionResult
from repagen.evaluation.samples import ImageSource
from repagen.pipelines.png import save_png

DIFFERENCE_FACTOR = 4
_TILE_PX = 256  # smaller images are enlarged by a whole factor to at most this
_GAP_PX, _SECTION_GAP_PX, _MARGIN_PX = 8, 48, 32
_TITLE_PX, _HEADING_PX, _TEXT_PX = 26, 22, 16
_BACKGROUND, _INK, _FAINT = "#ffffff", "#1a1a1a", "#6b6b6b"
_COLUMNS = ("original", "reconstruction", f"|difference| x {DIFFERENCE_FACTOR}")


@dataclass(frozen=True)
class Case:
    """One row of the picture: the two images, uint8 (3, H, H), the name and the figures below them."""

    original: torch.Tensor
    reconstruction: torch.Tensor
    name: str
    figures: str


@dataclass(frozen=True)
class Section:
    """A heading and the cases below it, all of one size."""

    heading: str
    cases: Sequence[Case]


def save_case_picture(
    path: str | Path, result: ReconstructionResult, source: ImageSource, autoencoder: Any, *, count: int = 4
) -> None:
    """Write a PNG of the worst cases beside the median ones, by LPIPS where it was computed, else PSNR, else SSIM.

    The images are reconstructed anew. The file's metadata holds the indices and, as JSON, the facts of the result.

    Args:
        path: the PNG; its folder is made if needed.
        result: of the evaluation.
        source, autoencoder: what was evaluated.
        count: cases of each kind.

    Raises:
        UserError: when the result has no figures of single images.
    """
    metric, worst, median = worst_and_median(result, count)
    by = f"by {metric.upper()}"
    sections = [
        Section(f"Worst {len(worst)} of {result.num_samples} {by}", _cases(worst, source, autoencoder)),
        Section(f"Median {len(median)} of {result.num_samples} {by}", _cases(median, source, autoencoder)),
    ]
    samples, reference = result.samples, result.reference
    title = f"{samples['autoencoder']} {samples['path'] or ''}".strip()
    means = ", ".join(_figure(key, result.metrics[key]) for key in result.spread)
    originals = f"{reference['kind']} {reference.get('path') or ''}".strip()
    picture = draw_cases(title, f"Means: {means}. Originals: {originals}, {reference['size']} px.", sections)
    indices = {"worst": [case.index for case in worst], "median": [case.index for case in median], "by": metric}
    facts = {**indices, "difference_factor": DIFFERENCE_FACTOR, **result.as_dict()}
    save_png(picture, Path(path), facts, title)


def worst_and_median(
    result: ReconstructionResult, count: int
) -> tuple[PairedMetric, list[ImageFigures], list[ImageFigures]]:
    """Return the metric that ranks, the `count` worst images from the worst on, and `count` around the median.

    Raises:
        UserError: when the result has no figures of single images, or none are asked for.
    """
    ranking: tuple[PairedMetric, ...] = ("lpips", "psnr", "ssim")
    metric = next((metric for metric in ranking if metric in result.spread), None)
    if metric is None or count < 1:
        raise UserError(
            f"a picture of {count} cases needs at least 1, and figures of single images; add psnr to the metrics"
        )
    sign = -1 if metric == "lpips" else 1  # a distance: large is bad
    ranked = sorted(result.per_image, key=lambda image: (sign * image.values[metric], image.index))
    middle = max(0, (len(ranked) - count) // 2)
    return metric, ranked[:count], ranked[middle : middle + count]


def _cases(images: Sequence[ImageFigures], source: ImageSource, autoencoder: Any) -> list[Case]:
    originals = torch.stack(
        [image for image in source.load([case.index for case in images]) if isinstance(image, torch.Tensor)]
    )
    reconstructions = reconstruct(autoencoder, originals, [case.name for case in images])
    return [
        Case(original, reconstruction, f"#{case.index}  {case.name}", _figures(case))
        for original, reconstruction, case in zip(originals, reconstructions, images, strict=True)
    ]


def _figures(case: ImageFigures) -> str:
    return "    ".join(_figure(metric, value) for metric, value in case.values.items())


def _figure(metric: PairedMetric, value: float) -> str:
    return f"{metric.upper()} {value:.2f} dB" if metric == "psnr" else f"{metric.upper()} {value:.4f}"


# --- drawing -------------------------------------------------------------------------------------------------------


def draw_cases(title: str, facts: str, sections: Sequence[Section]) -> Image.Image:
    """Draw sections side by side, a row for each case: original, reconstruction, absolute difference.

    Args:
        title: the first line.
        facts: below it, wrapped.
        sections: all of images of one size.

    Returns:
        The picture. Small images are enlarged by a whole factor, pixels repeated.
    """
    side = sections[0].cases[0].original.shape[1]
    tile = side * max(1, _TILE_PX // side)
    section_width = len(_COLUMNS) * tile + (len(_COLUMNS) - 1) * _GAP_PX
    width = 2 * _MARGIN_PX + len(sections) * section_width + (len(sections) - 1) * _SECTION_GAP_PX
    lines = textwrap.wrap(facts, int((width - 2 * _MARGIN_PX) / (0.52 * _TEXT_PX)))
    top = _MARGIN_PX + _TITLE_PX + 14 + len(lines) * (_TEXT_PX + 6) + 20
    row_height = tile + 2 * (_TEXT_PX + 6) + 22
    head = _HEADING_PX + 14 + _TEXT_PX + 10
    height = top + head + max(len(section.cases) for section in sections) * row_height + _MARGIN_PX - 22
    picture = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    title_font, text_font = _font(_TITLE_PX), _font(_TEXT_PX)
    draw.text((_MARGIN_PX, _MARGIN_PX), _fitted(title, title_font, width - 2 * _MARGIN_PX), _INK, title_font)
    for number, line in enumerate(lines):
        draw.text((_MARGIN_PX, _MARGIN_PX + _TITLE_PX + 14 + number * (_TEXT_PX + 6)), line, _FAINT, text_font)
    for number, section in enumerate(sections):
        left = _MARGIN_PX + number * (section_width + _SECTION_GAP_PX)
        _draw_section(picture, section, left, top, tile, head, row_height)
    return picture


def _draw_section(
    picture: Image.Image, section: Section, left: int, top: int, tile: int, head: int, row_height: int
) -> None:
    draw, font = ImageDraw.Draw(picture), _font(_TEXT_PX)
    width = len(_COLUMNS) * tile + (len(_COLUMNS) - 1) * _GAP_PX
    draw.text((left, top), section.heading, _INK, _font(_HEADING_PX))
    for column, label in enumerate(_COLUMNS):
        draw.text((left + column * (tile + _GAP_PX), top + _HEADING_PX + 14), label, _FAINT, font)
    for row, case in enumerate(section.cases):
        y = top + head + row * row_height
        difference = (case.original.int() - case.reconstruction.int()).abs() * DIFFERENCE_FACTOR
        tiles = (case.original, case.reconstruction, difference.clamp(max=255).to(torch.uint8))
        for column, pixels in enumerate(tiles):
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            x = left + column * (tile + _GAP_PX)
            picture.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        draw.text((left, y + tile + 6), _fitted(case.name, font, width), _FAINT, font)
        draw.text((left, y + tile + 6 + _TEXT_PX + 6), _fitted(case.figures, font, width), _INK, font)


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """Shorten a text in its middle until it fits."""
    kept = len(text)
    shown = text
    while font.getlength(shown) > width_px and kept > 2:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return shown
