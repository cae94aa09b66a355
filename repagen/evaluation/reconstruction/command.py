"""`repagen evaluate reconstruction`: rFID, PSNR, SSIM and LPIPS of an autoencoder, and a picture of its failures."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path
from typing import Any

from accelerate import PartialState

from repagen.errors import UserError, naming, require_at_least
from repagen.evaluation.encoder_extractors import open_extractor
from repagen.evaluation.extractor import ExtractorRule, FeatureExtractor, Pooling
from repagen.evaluation.inception import INCEPTION
from repagen.evaluation.metrics.perceptual import Backbone, PerceptualDistance
from repagen.evaluation.places import require_result_folder, write_result
from repagen.evaluation.reconstruction.evaluate import DEFAULT_METRICS, evaluate_reconstruction, require_originals
from repagen.evaluation.reconstruction.picture import save_case_picture
from repagen.evaluation.reconstruction.result import Metric, ReconstructionResult
from repagen.evaluation.reference import open_reference
from repagen.evaluation.samples import ImageSource
from repagen.models.latents import require_autoencoder
from repagen.models.opening import open_component

# Options of one metric, which given without it would be passed over in silence.
_OF_METRIC: dict[Metric, tuple[str, ...]] = {
    "rfid": ("extractor", "extractor_weights", "pooling"),
    "lpips": ("lpips_backbone", "lpips_weights", "lpips_heads"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--autoencoder", required=True, metavar="PATH", help="folder or Hub id of an autoencoder, or of a pipeline"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="the originals: folder of images, npz with arr_0, or data.KEY=VALUE ...",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=typing.get_args(Metric),
        default=list(DEFAULT_METRICS),
        help=f"what to compute (default {' '.join(DEFAULT_METRICS)})",
    )
    parser.add_argument("--num-images", type=int, help="this many images, drawn by --seed (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default 0)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="images in hand at once per process; no figure depends on it (default 128)",
    )
    parser.add_argument("--max-bad", type=int, default=0, help="unreadable images to leave out (default 0)")
    parser.add_argument("--output", metavar="FOLDER", help="write result.json, per_image.csv, worst_and_median.png")
    _add_network_arguments(parser)


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    rfid = parser.add_argument_group("features of rfid")
    rfid.add_argument("--extractor", help="inception (default), or an encoder's id or folder")
    rfid.add_argument("--extractor-weights", metavar="FILE", help="Inception's weights, where not in torch's cache")
    rfid.add_argument("--pooling", choices=typing.get_args(Pooling)[:2], help="tokens of an encoder (default mean)")
    lpips = parser.add_argument_group("network of lpips")
    lpips.add_argument(
        "--lpips-backbone",
        choices=typing.get_args(Backbone),
        help="alex (default, the usual one of reported figures), or vgg (that of losses, and of RAE's figures)",
    )
    lpips.add_argument("--lpips-weights", metavar="FILE", help="torchvision's weights, where not in torch's cache")
    lpips.add_argument("--lpips-heads", metavar="FILE", help="linear heads, where not those of the lpips package")


def run(args: argparse.Namespace) -> str | None:
    """Evaluate; return the table on the main process and None on the others.

    Raises:
        UserError: on options that contradict each other, and as `evaluate_reconstruction` does.
    """
    _require_options(args)
    source = require_originals(open_reference(args.data))
    device = PartialState().device
    perceptual = _open_perceptual(args)
    autoencoder = open_component(args.autoencoder, "vae", "--autoencoder").to(device)
    require_autoencoder(autoencoder, f"--autoencoder {args.autoencoder} holds no autoencoder")
    result = evaluate_reconstruction(
        autoencoder,
        source,
        metrics=args.metrics,
        extractor=_open_extractor(args) if "rfid" in args.metrics else None,
        perceptual=perceptual,
        batch_size=args.batch_size,
        max_bad_images=args.max_bad,
        num_images=args.num_images,
        seed=args.seed,
    )
    if not PartialState().is_main_process:
        return None
    if args.output:
        _write(Path(args.output), result, source, autoencoder)
    return result.table()


def _require_options(args: argparse.Namespace) -> None:
    require_at_least(args, {"batch_size": 1, "max_bad": 0})
    for metric, options in _OF_METRIC.items():
        given = [option for option in options if getattr(args, option) is not None]
        if given and metric not in args.metrics:
            raise UserError(
                f"--{given[0].replace('_', '-')} is for {metric}; add it: --metrics {' '.join(args.metrics)} {metric}"
            )
    if args.pooling and not _names_encoder(args):
        raise UserError("--pooling is for --extractor ENCODER; the features of Inception are pooled already")
    if args.output:
        require_result_folder(Path(args.output), result="result.json")


def _names_encoder(args: argparse.Namespace) -> bool:
    return args.extractor not in (None, "inception", INCEPTION)


def _open_extractor(args: argparse.Namespace) -> FeatureExtractor:
    rule = ExtractorRule()
    if _names_encoder(args):
        rule = ExtractorRule(kind="encoder", model=args.extractor, pooling=args.pooling or "mean")
    return open_extractor(rule, weights=args.extractor_weights, device=PartialState().device)


def _open_perceptual(args: argparse.Namespace) -> PerceptualDistance | None:
    if "lpips" not in args.metrics:
        return None
    with naming({"LPIPS trunk": "--lpips-weights", "LPIPS heads": "--lpips-heads"}):
        return PerceptualDistance.from_files(args.lpips_weights, args.lpips_heads, args.lpips_backbone or "alex")


def _write(folder: Path, result: ReconstructionResult, source: ImageSource, autoencoder: Any) -> None:
    table, picture = folder / "per_image.csv", folder / "worst_and_median.png"
    write_result(folder / "result.json", result.as_dict())
    for path in (table, picture):  # those of an earlier result; this one may have none
        path.unlink(missing_ok=True)
    if result.per_image:
        table.write_text(result.per_image_csv(), encoding="utf-8")
        save_case_picture(picture, result, source, autoencoder)
