"""What the blocks of a generator know, with and without REPA, at toy scale.

    python benchmarks/representation_toy.py [--output DIR] [--seeds 0 1 2] [--steps N]

The generators of `repa_toy.py`: a SiT in the latents of a little AutoencoderKL, trained on the bundled digits with and
without REPA towards the bundled encoder (block 2), same seeds, steps and batches. Every block is read at five times by
`repagen.evaluation.representation`: probes trained on the training digits and tested on the held-out ones, likeness to
the bundled encoder, spatial structure, correspondence under known warps, and learned mixes of all slices. Seed i reads
the generators that were trained with seed i, with noise and probes of seed i: the intervals are over trainings.

Writes results.json, and tables and heat maps of `aligned` and `unaligned` generators and of the encoder, to --output.
A finished generator is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from repa_toy import train_generator, train_vae

import repagen
from repagen.data import DataConfig, digits_encoder_path, open_image_dataset
from repagen.evaluation.representation.command import write_result
from repagen.evaluation.representation.readouts import ReadOut, ReadOutSettings
from repagen.evaluation.representation.result import Reading, RepresentationResult
from repagen.evaluation.representation.sweep import evaluate_representation

READOUTS: tuple[ReadOut, ...] = (
    "linear", "knn", "cknna", "cka", "lds", "cds", "rmsc", "pck", "pck_identity",
    "hyperfeatures", "hyperfeatures_pck",
)  # fmt: skip
SETTINGS = ReadOutSettings(pck_images=60, correspondence_epochs=3)


def read(subject: Any, encoder: repagen.VisionEncoder, seed: int) -> RepresentationResult:
    """All read-outs of a generator or an encoder."""
    train, test = (
        open_image_dataset(DataConfig(kind="digits", image_size=32, subset=subset))
        for subset in ("train", "validation")
    )
    result = evaluate_representation(
        subject,
        train,
        test_data=test,
        readouts=READOUTS,
        target=encoder,
        seeds=(seed,),
        settings=SETTINGS,
        batch_size=128,
    )
    assert result.target is not None
    return dataclasses.replace(result, target={**result.target, "name": "digits"})  # it lies elsewhere everywhere


def pooled(name: str, results: list[RepresentationResult]) -> RepresentationResult:
    """The results of several trainings as one, a value a training."""
    first = results[0]
    readings = tuple(
        Reading(
            item.readout,
            item.place,
            tuple(result.reading(item.readout, item.place).values[0] for result in results),
        )
        for item in first.readings
    )
    return dataclasses.replace(
        first,
        subject={
            **first.subject,
            "name": name,
            "weights": " ".join(result.subject["weights"][:12] for result in results),
        },
        readings=readings,
        mixes={key: [result.mixes[key][0] for result in results] for key in first.mixes},
        seeds=tuple(seed for result in results for seed in result.seeds),
        seconds=sum(result.seconds for result in results),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/representation_toy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    encoder = repagen.VisionEncoder.from_pretrained(digits_encoder_path())
    vae = train_vae(args.output / "vae")
    record: dict[str, Any] = {"steps": args.steps, "seeds": args.seeds}
    for name in ("unaligned", "aligned"):
        results = []
        for seed in args.seeds:
            folder = args.output / f"{name}-{seed}"
            if not (folder / "pipeline" / "model_index.json").is_file():
                train_generator(folder, vae, seed, args.steps, aligned=name == "aligned")
            pipe = repagen.ClassToImagePipeline.from_pretrained(folder / "pipeline")
            results.append(read(pipe, encoder, seed))
        result = pooled(name, results)
        write_result(result, args.output / name)
        record[name] = result.as_dict()
        print(f"{name}\n{result.table()}\n")
    result = pooled("digits encoder", [read(encoder, encoder, args.seeds[0])])
    write_result(result, args.output / "encoder")
    record["encoder"] = result.as_dict()
    print(f"encoder\n{result.table()}")
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
