"""`repagen evaluate generation`: generated images against real ones, by a named protocol."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from repagen.errors import UserError, require_at_least
from repagen.evaluation.extractor import Pooling
from repagen.evaluation.generation import evaluate_generation, open_extractors
from repagen.evaluation.interruptible import run_interruptible
from repagen.evaluation.metrics.ratios import load_normalisers
from repagen.evaluation.pipeline_images import PipelineImages
from repagen.evaluation.places import require_result_file, write_result
from repagen.evaluation.protocol import (
    EvaluationProtocol,
    MetricName,
    encoder_protocol,
    load_protocol,
    protocol_name,
    protocol_names,
)
from repagen.evaluation.reference import ReferenceStatistics, open_reference, save_statistics
from repagen.evaluation.reference_building import require_new_npz
from repagen.evaluation.result import GenerationResult
from repagen.evaluation.samples import DatasetImages, ImageSource, LabelMode, captions_of, open_images
from repagen.evaluation.sinks import SampleWriter
from repagen.pipelines.adapters import load_adapters
from repagen.pipelines.sample_command import PIPELINE_KINDS, add_sampler_options, load_pipeline, sampler_options

_SAMPLING = ("num_samples", "label_mode", "seed", "lora", "dtype", "forward_batch_size")


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
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"one of {', '.join(protocol_names())}, or a YAML file (default torch-fidelity; `repagen evaluate show`)",
    )
    parser.add_argument("--extractor-weights", metavar="FILE", help="Inception's weights, where not in torch's cache")
    parser.add_argument("--normalisers", metavar="FILE", help="JSON table of divisors for FDr")
    _add_custom_protocol(parser.add_argument_group("in place of a protocol"))
    _add_sampling_arguments(parser.add_argument_group("sampling, with --model"))
    parser.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="images in hand at once per process, rounded up to forward passes of 32; no figure depends on it "
        "(default 128)",
    )
    parser.add_argument(
        "--max-bad", type=int, default=0, help="unreadable images to leave out on each side (default 0)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the result as JSON; the same command continues if killed"
    )
    parser.add_argument("--save-reference", metavar="FILE", help="write the reference's statistics as npz")
    parser.add_argument("--save-samples", metavar="PATH", help="write the samples as a folder of PNGs, or one .npz")


def _add_custom_protocol(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--extractor", metavar="ENCODER", help="an encoder's id or folder: measure in its space alone")
    group.add_argument("--pooling", choices=typing.get_args(Pooling)[:2], help="tokens of the encoder (default mean)")
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=[name for name in typing.get_args(MetricName) if name not in ("sfid", "inception_score", "fdr")],
        help="what to measure there (default fd precision_recall)",
    )


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-samples", type=int, help="images to draw (default: the protocol's)")
    group.add_argument(
        "--label-mode",
        choices=typing.get_args(LabelMode),
        help="class i mod num_classes, or uniform draws (default: the protocol's, else balanced)",
    )
    group.add_argument("--seed", type=int, help="of noise and random labels (default 0)")
    group.add_argument(
        "--lora", nargs="+", metavar="PATH[=WEIGHT]", help="adapters to use, with their weights; default 1"
    )
    add_sampler_options(group)
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the pipeline (default: the protocol's)"
    )
    group.add_argument(
        "--forward-batch-size",
        type=int,
        help="images in one pass of the pipeline; another number changes last bits (default 32)",
    )


def run(args: argparse.Namespace) -> str | None:
    """Evaluate; return the table on the main process and None on the others.

    Raises:
        UserError: on options that contradict each other, and as `evaluate_generation` does.
    """
    _require_options(args)
    name, protocol = choose_protocol(args)
    reference = open_reference(args.reference)
    normalisers = load_normalisers(args.normalisers) if args.normalisers else None
    extractors = open_extractors(protocol, args.extractor_weights)
    samples = _open_samples(args, name, protocol, reference)

    def evaluate(folder: Path | None, sink: SampleWriter | None) -> GenerationResult:
        return evaluate_generation(
            samples,
            reference,
            protocol,
            extractors,
            name=name,
            normalisers=normalisers,
            batch_size=args.batch_size,
            max_bad_images=args.max_bad,
            folder=folder,
            sink=sink,
        )

    return run_interruptible(args, len(samples), evaluate, lambda result: _write(result, args))


def _require_options(args: argparse.Namespace) -> None:
    require_at_least(args, {"batch_size": 1, "num_samples": 1, "forward_batch_size": 1, "max_bad": 0})
    if args.output:
        require_result_file(Path(args.output))
    if args.save_reference:
        require_new_npz(Path(args.save_reference), "--save-reference")


def choose_protocol(args: argparse.Namespace) -> tuple[str, EvaluationProtocol]:
    """The protocol that a command line asks for, with its name; `custom` where it is put together from options.

    Raises:
        UserError: when it names a protocol and puts one together, or asks for an unknown one.
    """
    if args.extractor is None:
        for option in ("pooling", "metrics"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option} is for --extractor; a protocol fixes it (`repagen evaluate show`)")
        name = args.protocol or "torch-fidelity"
        return protocol_name(name), load_protocol(name)
    if args.protocol is not None:
        raise UserError("--protocol and --extractor exclude each other; write a protocol of your own as a YAML file")
    if args.extractor in ("inception", "inception-v3-compat"):
        raise UserError("--extractor is for encoders; Inception's metrics are those of --protocol torch-fidelity")
    metrics: Sequence[MetricName] = args.metrics or ("fd", "precision_recall")
    return "custom", encoder_protocol(args.extractor, pooling=args.pooling or "mean", metrics=metrics)


def _open_samples(
    args: argparse.Namespace, name: str, protocol: EvaluationProtocol, reference: ImageSource | ReferenceStatistics
) -> ImageSource:
    if args.model is None:
        given = [option for option in _SAMPLING if getattr(args, option) is not None] + [*sampler_options(args)]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is for --model; samples that exist already cannot heed it"
            )
        if args.save_samples:
            raise UserError("--save-samples is for --model; samples that exist already are written")
        return open_images(args.samples)
    number = args.num_samples or protocol.num_samples
    if number is None:
        raise UserError(
            f"--model needs --num-samples, since the protocol {name} fixes none; published figures draw 50000"
        )
    dtype = args.dtype or protocol.sampling_dtype or "float32"
    pipeline = load_pipeline(args.model, str(PartialState().device), dtype, kinds=PIPELINE_KINDS)
    adapters = load_adapters(pipeline, args.lora or [])
    return PipelineImages(
        pipeline,
        number,
        seed=args.seed or 0,
        label_mode=args.label_mode or protocol.label_mode or "balanced",
        rounding=protocol.rounding,
        prompts=_prompts(args, number, reference) if pipeline.transformer.takes_text else (),
        forward_batch_size=args.forward_batch_size or 32,
        adapters=adapters,
        **sampler_options(args),
    )


def _prompts(args: argparse.Namespace, number: int, reference: ImageSource | ReferenceStatistics) -> list[str]:
    """The captions of the reference, for a model that takes prompts.

    Raises:
        UserError: it has none, or the command chooses classes.
    """
    if args.label_mode:
        raise UserError("--label-mode is for a model of classes; this one draws prompts, leave it out")
    if not isinstance(reference, DatasetImages) or not reference.dataset.has_captions:
        raise UserError(
            "--model takes prompts, and they are the captions of --reference, which has none; give a dataset with "
            "captions (data.KEY=VALUE ... data.captions.missing=refuse), or use `repagen evaluate text-to-image`"
        )
    return captions_of(reference.dataset, number, args.seed or 0)


def _write(result: GenerationResult, args: argparse.Namespace) -> None:
    if args.output:
        write_result(Path(args.output), result.as_dict())
    if args.save_reference:
        statistics, reference = result.reference_statistics, result.reference
        if not statistics:
            raise UserError(
                f"--save-reference {args.save_reference}: no metric here has statistics; measure fd, or use "
                "`repagen reference make`"
            )
        save_statistics(args.save_reference, statistics, result.spaces, reference)
