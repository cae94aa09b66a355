"""`repagen evaluate text-to-image`: images against their prompts, or their export for other evaluators.

The images are there already, or a pipeline draws them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from repagen.errors import UserError, naming, require_at_least
from repagen.evaluation.interruptible import run_interruptible
from repagen.evaluation.places import require_result_file, require_result_folder, write_result
from repagen.evaluation.sinks import SampleWriter
from repagen.evaluation.text_to_image.evaluate import ScoreName, TextToImageResult, evaluate_text_to_image
from repagen.evaluation.text_to_image.export import IMAGES_PER_PROMPT, export_dpg, export_geneval, provide_from
from repagen.evaluation.text_to_image.matching import PromptImages
from repagen.evaluation.text_to_image.prompted import PipelinePromptImages, PromptedImages
from repagen.evaluation.text_to_image.prompts import PromptSet, read_prompts
from repagen.evaluation.text_to_image.scores import ScoringModel, open_scoring_model
from repagen.evaluation.text_to_image.shapes import ShapesPrompts, ShapesResult, evaluate_shapes
from repagen.pipelines.adapters import load_adapters
from repagen.pipelines.sample_command import add_prompt_options, add_sampler_options, load_pipeline, sampler_options

_EXPORTS: dict[str, Callable[..., int]] = {"geneval": export_geneval, "dpg": export_dpg}
_MODEL_OPTIONS: dict[ScoreName, str] = {"clip_score": "clip", "pick_score": "pick"}
# What options are for: given beside another task, or images that are there, they would be passed over in silence.
_OF_TASKS: dict[str, tuple[str, ...]] = {
    "metrics": ("clip", "pick", "pick_processor"),
    "export": ("export_to", "resume", "any_count"),
    "protocol": ("num_prompts",),
}
_OF_PROMPTS = ("prompts", "images_per_prompt", "by_order")
_ARGUMENTS = ("negative_prompt", "height", "width")
_SAMPLING = ("seed", "lora", "dtype", "forward_batch_size", *_ARGUMENTS)
_PROMPTS_OF_EACH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", metavar="FOLDER", help="generated images")
    source.add_argument("--model", metavar="PATH", help="folder or Hub id of a text-to-image pipeline that draws them")
    parser.add_argument(
        "--prompts", metavar="FILE", help="FILE.txt, FILE.jsonl (GenEval), or a folder of <id>.txt (DPG)"
    )
    parser.add_argument(
        "--images-per-prompt", type=int, help="images of each prompt, following each other (default 1; 4 to export)"
    )
    parser.add_argument(
        "--by-order",
        action="store_true",
        help="match images whose names have no id to prompts that have ids, both in natural order (p2 before p10)",
    )
    parser.add_argument("--batch-size", type=int, default=50, help="images at once per process (default 50)")
    parser.add_argument(
        "--output", metavar="FILE", help="write the result as JSON, with the scores of each image; the same command "
        "continues if killed",
    )  # fmt: skip
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--metrics", nargs="+", choices=list(_MODEL_OPTIONS), help="scores to compute")
    task.add_argument(
        "--export", choices=list(_EXPORTS), help="write the images as this benchmark's evaluator reads them"
    )
    task.add_argument(
        "--protocol", choices=["shapes"], help="let --model draw fresh scenes of shapes, and read the pictures"
    )
    _add_task_arguments(parser)
    _add_sampling_arguments(parser.add_argument_group("sampling, with --model"))


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_argument_group("with --metrics")
    metrics.add_argument("--clip", metavar="ID_OR_FOLDER", help="CLIP model of clip_score")
    metrics.add_argument("--pick", metavar="ID_OR_FOLDER", help="model of pick_score: yuvalkirstain/PickScore_v1")
    metrics.add_argument(
        "--pick-processor", metavar="ID_OR_FOLDER", help="tokenizer and image processor, where not beside --pick"
    )
    export = parser.add_argument_group("with --export")
    export.add_argument("--export-to", metavar="FOLDER", help="new or empty folder")
    export.add_argument("--resume", action="store_true", help="keep what an earlier export to the folder completed")
    export.add_argument(
        "--any-count", action="store_true", help="allow another number of images a prompt than the benchmark's 4"
    )
    shapes = parser.add_argument_group("with --protocol shapes")
    shapes.add_argument(
        "--num-prompts", type=int, metavar="N",
        help=f"scenes of 1, 2 and 3 objects each, of seen and of unseen combinations (default {_PROMPTS_OF_EACH})",
    )  # fmt: skip


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, help="of noise, and of the scenes of --protocol shapes (default 0)")
    group.add_argument(
        "--lora", nargs="+", metavar="PATH[=WEIGHT]", help="adapters to use, with their weights; default 1"
    )
    add_prompt_options(group)
    add_sampler_options(group)
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the pipeline (default float32)")
    group.add_argument(
        "--forward-batch-size",
        type=int,
        help="images in one pass of the pipeline; another number changes last bits (default 32)",
    )
    group.add_argument("--save-samples", metavar="PATH", help="write the samples as a folder of PNGs, or one .npz")


def run(args: argparse.Namespace) -> str | None:
    """Score or export; return what there is to say on the main process and None on the others.

    Raises:
        UserError: on options that contradict each other, and as `evaluate_text_to_image` and the exports do.
    """
    require_at_least(args, {"batch_size": 1, "images_per_prompt": 1, "num_prompts": 1, "forward_batch_size": 1})
    _refuse_foreign_options(args)
    if args.output:
        require_result_file(Path(args.output))
    if args.export_to:
        require_result_folder(Path(args.export_to), "--export-to")
    if args.protocol:
        return _score_shapes(args)
    prompts = read_prompts(args.prompts)
    if args.by_order and not prompts.named:
        raise UserError("--by-order is for prompts that have ids; these are matched by order anyway, leave it out")
    count = args.images_per_prompt or (IMAGES_PER_PROMPT if args.export else 1)
    if args.export:
        return _export(args, _open_samples(args, prompts, count))
    return _score(args, prompts, count)


def _refuse_foreign_options(args: argparse.Namespace) -> None:
    task = next(name for name in _OF_TASKS if getattr(args, name))
    foreign = {option: f"--{other}" for other, options in _OF_TASKS.items() if other != task for option in options}
    if args.model is None:
        sampling = (*_SAMPLING, *sampler_options(args), "save_samples")
        foreign |= dict.fromkeys(sampling, "--model; images that exist already cannot heed it")
        if args.protocol:
            raise UserError("--protocol shapes asks for pictures of its own; give --model PATH in place of --samples")
    else:
        foreign |= {"by_order": "--samples"}
    if args.protocol:
        foreign |= dict.fromkeys(_OF_PROMPTS, "--metrics and --export")
    if args.export:
        foreign |= {"output": "--metrics and --protocol", "save_samples": "--metrics and --protocol"}
    for option, what in foreign.items():
        value = getattr(args, option)
        if value is not None and value is not False:
            raise UserError(f"--{option.replace('_', '-')} is for {what}; leave it out")
    if args.prompts is None and not args.protocol:
        raise UserError("--prompts FILE is needed, but for --protocol shapes")
    if args.export and args.export_to is None:
        raise UserError("--export needs --export-to FOLDER")


def _open_samples(args: argparse.Namespace, prompts: PromptSet, count: int) -> PromptedImages:
    if args.model is None:
        return PromptImages(args.samples, prompts, count, by_order=args.by_order)
    pipeline, options = _open_pipeline(args)
    return PipelinePromptImages(pipeline, prompts, count, **options)


def _open_pipeline(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model, and the options of `PipelinePromptImages` that were given."""
    pipeline = load_pipeline(
        args.model, str(PartialState().device), args.dtype or "float32", kinds=("TextToImagePipeline",)
    )
    return pipeline, {
        "adapters": load_adapters(pipeline, args.lora or []),
        "seed": args.seed or 0,
        "forward_batch_size": args.forward_batch_size or 32,
        "arguments": {name: getattr(args, name) for name in _ARGUMENTS},
        **sampler_options(args),
    }


def _score(args: argparse.Namespace, prompts: PromptSet, count: int) -> str | None:
    samples = _open_samples(args, prompts, count)
    models = _open_models(args)

    def evaluate(folder: Path | None, sink: SampleWriter | None) -> TextToImageResult:
        return evaluate_text_to_image(samples, models, folder=folder, batch_size=args.batch_size, sink=sink)

    return run_interruptible(args, len(samples), evaluate, lambda result: _write(result, args))


def _score_shapes(args: argparse.Namespace) -> str | None:
    prompts = ShapesPrompts(args.num_prompts or _PROMPTS_OF_EACH, args.seed or 0)
    pipeline, options = _open_pipeline(args)

    def evaluate(folder: Path | None, sink: SampleWriter | None) -> ShapesResult:
        return evaluate_shapes(pipeline, prompts, folder=folder, batch_size=args.batch_size, sink=sink, **options)

    return run_interruptible(args, len(prompts), evaluate, lambda result: _write(result, args))


def _write(result: TextToImageResult | ShapesResult, args: argparse.Namespace) -> None:
    if args.output:
        write_result(Path(args.output), result.as_dict())


def _open_models(args: argparse.Namespace) -> dict[ScoreName, ScoringModel]:
    names: dict[ScoreName, str] = {}
    for metric, option in _MODEL_OPTIONS.items():
        given = getattr(args, option)
        if (metric in args.metrics) != bool(given):
            raise UserError(
                f"--metrics {metric} needs --{option} ID_OR_FOLDER"
                if metric in args.metrics
                else f"--{option} is for --metrics {metric}; name that metric, or leave it out"
            )
        if given:
            names[metric] = given
    if args.pick_processor and "pick_score" not in names:
        raise UserError("--pick-processor is for --metrics pick_score; name that metric, or leave it out")
    return {metric: _open_model(args, metric, name) for metric, name in names.items()}


def _open_model(args: argparse.Namespace, metric: ScoreName, name: str) -> ScoringModel:
    option = f"--{_MODEL_OPTIONS[metric]}"
    processor = args.pick_processor if metric == "pick_score" else None
    subjects = {name: option, **({processor: "--pick-processor"} if processor and processor != name else {})}
    options = {
        start: f"{given} {subject}: "
        for subject, given in subjects.items()
        for start in (f"encoder {subject!r}: ", f"{subject}: ")
    }
    with naming({**options, "": f"{option} {name}: "}):
        return open_scoring_model(name, processor=processor, device=PartialState().device)


def _export(args: argparse.Namespace, samples: PromptedImages) -> str:
    if PartialState().num_processes > 1:
        raise UserError("--export runs in one process; start it without accelerate launch")
    written = _EXPORTS[args.export](
        args.export_to,
        samples.prompts,
        provide_from(samples),
        images_per_prompt=samples.images_per_prompt,
        any_count=args.any_count,
        batch_size=args.batch_size,
        resume=args.resume,
    )
    kept = len(samples.prompts) - written
    return f"{args.export_to}: {written} prompts x {samples.images_per_prompt} images written, {kept} kept"
