"""`repagen evaluate text-to-image`: images against their prompts, or their export for other evaluators."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

from repagen.errors import UserError, naming
from repagen.evaluation.places import require_result_file, require_result_folder, write_result
from repagen.evaluation.text_to_image.evaluate import ScoreName, evaluate_text_to_image
from repagen.evaluation.text_to_image.export import IMAGES_PER_PROMPT, export_dpg, export_geneval, provide_from
from repagen.evaluation.text_to_image.matching import PromptImages
from repagen.evaluation.text_to_image.prompts import read_prompts
from repagen.evaluation.text_to_image.scores import ScoringModel, open_scoring_model

_EXPORTS: dict[str, Callable[..., int]] = {"geneval": export_geneval, "dpg": export_dpg}
_MODEL_OPTIONS: dict[ScoreName, str] = {"clip_score": "clip", "pick_score": "pick"}
# What the options are for: given beside the other task they would be passed over in silence.
_OF_METRICS = ("clip", "pick", "pick_processor", "output")
_OF_EXPORT = ("export_to", "resume", "any_count")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--samples", required=True, metavar="FOLDER", help="generated images")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="FILE.txt, FILE.jsonl (GenEval), or a folder of <id>.txt (DPG)",
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
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--metrics", nargs="+", choices=list(_MODEL_OPTIONS), help="scores to compute")
    task.add_argument(
        "--export", choices=list(_EXPORTS), help="write the images as this benchmark's evaluator reads them"
    )
    metrics = parser.add_argument_group("with --metrics")
    metrics.add_argument("--clip", metavar="ID_OR_FOLDER", help="CLIP model of clip_score")
    metrics.add_argument("--pick", metavar="ID_OR_FOLDER", help="model of pick_score: yuvalkirstain/PickScore_v1")
    metrics.add_argument(
        "--pick-processor", metavar="ID_OR_FOLDER", help="tokenizer and image processor, where not beside --pick"
    )
    metrics.add_argument("--output", metavar="FILE", help="write the result as JSON, with the scores of each image")
    export = parser.add_argument_group("with --export")
    export.add_argument("--export-to", metavar="FOLDER", help="new or empty folder")
    export.add_argument("--resume", action="store_true", help="keep what an earlier export to the folder completed")
    export.add_argument(
        "--any-count", action="store_true", help="allow another number of images a prompt than the benchmark's 4"
    )


def run(args: argparse.Namespace) -> str | None:
    """Score or export; return what there is to say on the main process and None on the others.

    Raises:
        UserError: on options that contradict each other, and as `evaluate_text_to_image` and the exports do.
    """
    for option in ("batch_size", "images_per_prompt"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    task, foreign = ("--metrics", _OF_METRICS) if args.export else ("--export", _OF_EXPORT)
    for option in foreign:
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} is for {task}; leave it out")
    if args.export and args.export_to is None:
        raise UserError("--export needs --export-to FOLDER")
    if args.output:
        require_result_file(Path(args.output))
    if args.export_to:
        require_result_folder(Path(args.export_to), "--export-to")
    prompts = read_prompts(args.prompts)
    if args.by_order and not prompts.named:
        raise UserError("--by-order is for prompts that have ids; these are matched by order anyway, leave it out")
    count = args.images_per_prompt or (IMAGES_PER_PROMPT if args.export else 1)
    samples = PromptImages(args.samples, prompts, count, by_order=args.by_order)
    return _export(args, samples) if args.export else _evaluate(args, samples)


def _evaluate(args: argparse.Namespace, samples: PromptImages) -> str | None:
    result = evaluate_text_to_image(samples, _open_models(args), batch_size=args.batch_size)
    if not PartialState().is_main_process:
        return None
    if args.output:
        write_result(Path(args.output), result.as_dict())
    return result.table()


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


def _export(args: argparse.Namespace, samples: PromptImages) -> str:
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
