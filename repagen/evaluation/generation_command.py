"""`repagen evaluate generation`: the Frechet distance between samples and a reference, with everything it depends on."""

from __future__ import annotations

import argparse
import json
import typing
from pathlib import Path

from accelerate import PartialState

from repagen.errors import UserError
from repagen.evaluation.features import Pooling, open_extractor
from repagen.evaluation.generation import GenerationResult, evaluate_generation
from repagen.evaluation.reference import open_reference, save_statistics
from repagen.evaluation.samples import ImageSource, LabelMode, PipelineImages, open_images
from repagen.pipelines.sample_command import add_sampler_options, load_pipeline, sampler_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    samples = parser.add_mutually_exclusive_group(required=True)
    samples.add_argument(
        "--samples", nargs="+", metavar="PATH", help="folder of images, npz with arr_0, or data.KEY=VALUE ..."
    )
    samples.add_argument("--model", metavar="PATH", help="folder or Hub id of a pipeline that samples on the fly")
    parser.add_argument(
        "--reference",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folder of images, npz of images or statistics, or data.KEY=VALUE ...",
    )
    parser.add_argument("--extractor", default="inception", help="inception (default), or an encoder's id or folder")
    parser.add_argument("--extractor-weights", metavar="FILE", help="Inception's weights, where not in torch's cache")
    parser.add_argument(
        "--pooling", choices=typing.get_args(Pooling), default="mean", help="tokens of an encoder (default mean)"
    )
    parser.add_argument("--batch-size", type=int, default=50, help="images at once per process (default 50)")
    parser.add_argument("--max-bad-images", type=int, default=0, help="unreadable images to leave out (default 0)")
    parser.add_argument(
        "--precision-recall-images",
        type=int,
        default=10_000,
        help="first images of each side for precision and recall (default 10000, 0 = leave them out)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--save-reference", metavar="FILE", help="write the reference's statistics as npz")
    _add_sampling_arguments(parser.add_argument_group("sampling, with --model"))


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-samples", type=int, help="images to draw (50000 in published figures)")
    group.add_argument(
        "--label-mode",
        choices=typing.get_args(LabelMode),
        default="balanced",
        help="class i mod num_classes (default), or uniform draws",
    )
    group.add_argument("--seed", type=int, default=0, help="of noise and random labels (default 0)")
    add_sampler_options(group)
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the pipeline (default float32)",
    )


def run(args: argparse.Namespace) -> str | None:
    """Evaluate; return the table on the main process and None on the others.

    Raises:
        UserError: on options that contradict each other, and as `evaluate_generation` does.
    """
    for option in ("batch_size", "num_samples"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    reference = open_reference(args.reference, args.max_bad_images)
    extractor = open_extractor(
        args.extractor, weights=args.extractor_weights, pooling=args.pooling, device=PartialState().device
    )
    result = evaluate_generation(
        _open_samples(args),
        reference,
        extractor,
        batch_size=args.batch_size,
        max_bad_images=args.max_bad_images,
        precision_recall_images=args.precision_recall_images,
    )
    if not PartialState().is_main_process:
        return None
    _write(result, args)
    return result.table()


def _open_samples(args: argparse.Namespace) -> ImageSource:
    if args.model is None:
        given = [*(["num_samples"] if args.num_samples is not None else []), *sampler_options(args)]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is for --model; samples that exist already cannot heed it"
            )
        return open_images(args.samples, args.max_bad_images)
    if args.num_samples is None:
        raise UserError("--model needs --num-samples; published figures draw 50000")
    pipeline = load_pipeline(args.model, str(PartialState().device), args.dtype)
    return PipelineImages(
        pipeline, args.num_samples, seed=args.seed, label_mode=args.label_mode, **sampler_options(args)
    )


def _write(result: GenerationResult, args: argparse.Namespace) -> None:
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    if args.save_reference:
        save_statistics(args.save_reference, result.reference_statistics, result.extractor, result.reference)
