"""`repagen evaluate representation`: what a generator's blocks, or an encoder's layers, know; tables and heat maps."""

from __future__ import annotations

import argparse
import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from repagen.errors import UserError, naming
from repagen.evaluation.representation.harvest import FeatureType
from repagen.evaluation.representation.readouts import PAIRS, ReadOut, ReadOutSettings
from repagen.evaluation.representation.request import DEFAULT_TIMESTEPS
from repagen.evaluation.representation.sweep import evaluate_representation
from repagen.pipelines.adapters import load_adapters
from repagen.pipelines.sample_command import load_pipeline

if TYPE_CHECKING:
    from repagen.data import ImageDataset
    from repagen.encoders import VisionEncoder
    from repagen.evaluation.representation.result import RepresentationResult


# Arguments that messages begin with => the options that they were given as.
OPTIONS = {
    "pipeline": "--model",
    "blocks": "--blocks",
    "layers": "--layers",
    "timesteps": "--timesteps",
    "readouts": "--readouts",
    "target": "--target",
    "data": "--data",
    "data.image_size": "--data data.image_size",
    "test_data": "--test-data",
    "num_images": "--num-images",
    "seeds": "--seeds",
    "settings.knn_neighbours": "--knn-neighbours",
    "settings.cknna_neighbours": "--cknna-neighbours",
    "settings.pck_images": "--pck-images",
    "dtype": "--feature-dtype",
    "cache": "--cache",
}
# Options of read-outs => the read-outs that look at them.
_READERS: dict[str, tuple[ReadOut, ...]] = {
    "knn_neighbours": ("knn",),
    "cknna_neighbours": ("cknna",),
    "pck_images": PAIRS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="PATH", help="folder or Hub id of a pipeline, whose generator is read")
    subject.add_argument("--encoder", metavar="PATH", help="folder or id of an encoder, whose layers are read")
    parser.add_argument(
        "--lora", nargs="+", metavar="PATH[=WEIGHT]", help="adapters to read the generator with; default weight 1"
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="data.KEY=VALUE", help="images, with their labels")
    parser.add_argument(
        "--test-data", nargs="+", metavar="data.KEY=VALUE", help="images to test on (default: a fifth of --data)"
    )
    parser.add_argument("--blocks", nargs="+", metavar="N", help="of a generator, from 1; or all (default)")
    parser.add_argument("--layers", nargs="+", metavar="N", help="of an encoder, from 0; or all (default)")
    default = " ".join(f"{t:g}" for t in DEFAULT_TIMESTEPS)
    parser.add_argument(
        "--timesteps", nargs="+", type=float, metavar="T", help=f"0 = data, 1 = noise (default {default})"
    )
    parser.add_argument(
        "--readouts",
        nargs="+",
        choices=typing.get_args(ReadOut),
        default=["linear", "knn"],
        metavar="NAME",
        help=f"of {', '.join(typing.get_args(ReadOut))} (default linear knn)",
    )
    parser.add_argument("--target", metavar="PATH", help="folder or id of the encoder that cknna and cka compare with")
    parser.add_argument("--num-images", type=int, metavar="N", help="images of each dataset, drawn at random")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="seeds 0 to K - 1 (default 1, at most 10)")
    parser.add_argument("--cache", metavar="DIR", help="keep features there, and take those that are there")
    parser.add_argument("--output", metavar="DIR", help="write result.json, table.txt and a PNG for each read-out")
    _add_further_arguments(parser)


def _add_further_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = ReadOutSettings()
    parser.add_argument("--batch-size", type=int, default=50, help="images at once (default 50)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model (default float32)"
    )
    parser.add_argument(
        "--feature-dtype",
        choices=typing.get_args(FeatureType),
        default="float32",
        help="in which features are stored (default float32)",
    )
    parser.add_argument("--knn-neighbours", type=int, metavar="K", help=f"of knn (default {defaults.knn_neighbours})")
    parser.add_argument(
        "--cknna-neighbours", type=int, metavar="K", help=f"of cknna (default {defaults.cknna_neighbours})"
    )
    parser.add_argument(
        "--pck-images", type=int, metavar="N", help="images to warp (default 100, or all where there are fewer)"
    )


def run(args: argparse.Namespace) -> str:
    """Read; write what was asked for; return the table.

    Raises:
        UserError: on options that do not fit together, and as `evaluate_representation` does.
    """
    if PartialState().num_processes > 1:
        raise UserError("repagen evaluate representation runs in one process; start it without accelerate launch")
    for option in ("batch_size", "num_images", *_READERS):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if args.lora and args.encoder:
        raise UserError("--lora does not go with --encoder; adapters are for the generator of --model")
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output}: is no folder; name a folder, or one to be made")
    blocks, settings = _blocks(args), _settings(args)
    data = _open_data(args.data, "--data")
    test_data = _open_data(args.test_data, "--test-data") if args.test_data else None
    target = _open_encoder(args.target, "--target", "float32") if args.target else None
    with naming({f"{argument}: ": f"{option}: " for argument, option in OPTIONS.items()}):
        result = evaluate_representation(
            _open_subject(args),
            data,
            test_data=test_data,
            readouts=args.readouts,
            blocks=blocks,
            timesteps=args.timesteps,
            target=target,
            num_images=args.num_images,
            seeds=range(args.seeds),
            batch_size=args.batch_size,
            settings=settings,
            dtype=args.feature_dtype,
            cache=args.cache,
        )
    if args.output:
        write_result(result, Path(args.output))
    return result.table()


def write_result(result: RepresentationResult, folder: Path) -> None:
    """Write result.json, table.txt and a heat map for each read-out into a folder, which is made."""
    from repagen.evaluation.representation.heatmap import save_heat_maps

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    (folder / "table.txt").write_text(result.table() + "\n", encoding="utf-8")
    save_heat_maps(result, folder)


def _blocks(args: argparse.Namespace) -> list[int] | None:
    """The numbers of --blocks or --layers; None for all."""
    option, other = ("blocks", "layers") if args.model else ("layers", "blocks")
    if getattr(args, other) is not None:
        subject = "--model" if args.model else "--encoder"
        raise UserError(f"--{other} does not go with {subject}; give --{option}")
    words = getattr(args, option)
    if words is None or words == ["all"]:
        return None
    wrong = [word for word in words if not word.lstrip("-").isdecimal()]
    if wrong:
        raise UserError(f"--{option} {wrong[0]}: give numbers, or all")
    return [int(word) for word in words]


def _settings(args: argparse.Namespace) -> ReadOutSettings:
    given = {name: value for name in _READERS if (value := getattr(args, name)) is not None}
    for name in given:
        if not set(_READERS[name]) & set(args.readouts):
            raise UserError(
                f"--{name.replace('_', '-')} is for the read-outs {', '.join(_READERS[name])}, and none of them is "
                "among --readouts; add one, or leave it out"
            )
    return ReadOutSettings(**given)


def _open_data(words: list[str], option: str) -> ImageDataset:
    from repagen.data import data_config_from_words, open_image_dataset

    if paths := [word for word in words if "=" not in word]:
        raise UserError(
            f"{option} {paths[0]}: give settings of a dataset, such as data.path={paths[0]} data.image_size=256"
        )
    with naming({"data": f"{option} data"}):
        return open_image_dataset(data_config_from_words(words))


def _open_subject(args: argparse.Namespace) -> Any:
    if args.encoder:
        return _open_encoder(args.encoder, "--encoder", args.dtype)
    pipeline = load_pipeline(args.model, str(PartialState().device), args.dtype)
    if args.lora:
        load_adapters(pipeline, args.lora)
        pipeline.fuse_lora()  # the hash of the weights, by which features are kept, then covers adapters and factors
        pipeline.unload_lora_weights()
        pipeline.register_to_config(_name_or_path=" + ".join([args.model, *args.lora]))
    return pipeline


def _open_encoder(name: str, option: str, dtype: str) -> VisionEncoder:
    import torch

    from repagen.encoders import VisionEncoder

    with naming({"encoder ": f"{option} "}):
        encoder = VisionEncoder.from_pretrained(name, dtype=getattr(torch, dtype), local_files_only=True)
        return encoder.to(PartialState().device)
