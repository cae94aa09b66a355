"""A new object from ten pictures: LoRA teaches the pipeline of drawn shapes what a ring is.

    python benchmarks/shapes_lora.py --pipeline FOLDER [--output DIR] [--set KEY=VALUE ...]

No training scene of the generator and of the encoders shows a ring, and no caption names one: its word is in the
tokenizer, and nothing was learned of it (the decoder has seen rings). Ten pictures of one to three rings, in four of
the six colours, at all places and in both sizes, are written with captions beside them as users have them (`.txt`, one
caption a line, in several forms). The pipeline is fine-tuned on them by the program that users run, mode `lora`, with
its own images of ordinary prompts for what it shall not forget (prior preservation). The adapter is loaded as users
load it.

The judge is the exact checker of the shapes. It says what share of the pictures of fresh ring prompts is right in
shape and colour at once: in the four colours shown, in the two that no ring was shown in, and of a ring beside an
ordinary object, which no picture shows; and how the pipeline does ordinary prompts before and after, from the same
noise. Pictures are drawn from the adapter unfused and fused.

Writes OUTPUT/results.json, and OUTPUT/rings.png: the ten pictures, and ten samples of each sort in a row below.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import repagen
from repagen.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    QUADRANTS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    ScenePrompt,
    check_picture,
    draw_scene,
    sample_scene,
)
from repagen.evaluation.text_to_image.prompted import PipelinePromptImages
from repagen.evaluation.text_to_image.prompts import prompt_set
from repagen.evaluation.text_to_image.shapes import GROUPS, ShapesPrompts, ShapesScore, Share, evaluate_shapes
from repagen.pipelines.grid import save_image_grid
from repagen.randomness import derived_seed
from repagen.training import finetune
from repagen.training.finetune_config import load_finetune_config

NUM_PICTURES, SHOWN_SAMPLES, PRIOR_PROMPTS = 10, 10, 2000
# All linear layers but the time's: attention, feed-forward and modulation of blocks and head, and the text's.
_TARGETS = (
    "[to_q, to_k, to_v, to_out.0, ff.linear_in, ff.linear_out, modulation, modulation_out, condition_proj, proj_out, "
    "text_embedder.proj, text_embedder.pooled_proj]"
)
RINGS_SHOWN = [1, 2, 3, 3, 3] * 2
COLOURS_SHOWN, COLOURS_NEW = list(COLOURS)[:4], list(COLOURS)[4:]
SETTINGS = [
    "max_steps=2000", "global_batch_size=64", "optimizer.learning_rate=7e-4", "optimizer.schedule.kind=linear",
    "optimizer.beta2=0.99", "ema.decay=0.99", "flow.time=logit_normal", "lora.rank=32", "lora.alpha=32",
    f"lora.target_modules={_TARGETS}", "prior.share=0.8",
]  # fmt: skip


def ring(index: int, colours: Sequence[str], place: int, random: np.random.Generator) -> SceneObject:
    """Ring `index`: colours take turns, then sizes."""
    colour, size = colours[index % len(colours)], list(SIZES)[index // len(colours) % len(SIZES)]
    offset = tuple(random.uniform(-1.0, 1.0, 2).round(3).tolist())
    return SceneObject("ring", colour, size, QUADRANTS[place % len(QUADRANTS)], offset)  # type: ignore[arg-type]


def shown_scenes() -> list[Scene]:
    """The ten scenes that are taught: one to three rings each, 24 together, no two alike."""
    random = np.random.default_rng(derived_seed(0, "rings that are shown"))
    every = len(COLOURS_SHOWN) * len(SIZES)
    rings = (ring(index, COLOURS_SHOWN, index + index // every, random) for index in itertools.count())
    return [
        Scene(tuple(itertools.islice(rings, count)), list(BACKGROUNDS)[number % len(BACKGROUNDS)])
        for number, count in enumerate(RINGS_SHOWN)
    ]


def asked_scene(index: int, colours: Sequence[str], beside: bool) -> Scene:
    """Scene `index` of those asked for: a ring, perhaps beside an ordinary object of another colour."""
    random = np.random.default_rng(derived_seed(1, f"rings/{'+'.join(colours)}/{beside}", index))
    place, elsewhere = random.permutation(len(QUADRANTS))[:2]
    objects = [ring(index, colours, int(place), random)]
    if beside:
        other = str(random.choice([name for name in COLOURS if name != objects[0].colour]))
        size, quadrant = str(random.choice(list(SIZES))), QUADRANTS[int(elsewhere)]
        objects.append(SceneObject(SHAPES[index % len(SHAPES)], other, size, quadrant))  # type: ignore[arg-type]
    return Scene(tuple(objects), list(BACKGROUNDS)[int(random.integers(len(BACKGROUNDS)))])


def write_pictures(folder: Path) -> Path:
    """Write the ten pictures with their captions beside them, as `00.png` and `00.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(shown_scenes()):
        Image.fromarray(draw_scene(scene)).save(folder / f"{index:02d}.png")
        captions = "\n".join(prompt.text for prompt in scene.prompts())
        (folder / f"{index:02d}.txt").write_text(captions + "\n", encoding="utf-8")
    return folder


def ring_prompts(count: int) -> dict[str, list[ScenePrompt]]:
    """Fresh prompts by sort, `count` of each: they say everything of a scene, and are no caption that is taught."""
    taught = {prompt.text for scene in shown_scenes() for prompt in scene.prompts()}
    sorts = {
        "colours shown": (COLOURS_SHOWN, False),
        "new colours": (COLOURS_NEW, False),
        "beside an ordinary object": (COLOURS_SHOWN, True),
    }
    found = {}
    for name, (colours, beside) in sorts.items():
        all_prompts = (asked_scene(index, colours, beside).prompts()[0] for index in range(4 * count))
        found[name] = [prompt for prompt in all_prompts if prompt.text not in taught][:count]
    return found


def prior_prompts(scored: Iterable[str], count: int = PRIOR_PROMPTS) -> list[str]:
    """Prompts of ordinary scenes in all forms, none of those that are scored."""
    seed, left_out = derived_seed(0, "prior of rings"), set(scored)
    forms = (sample_scene(seed, index).prompts() for index in itertools.count())
    texts = (prompts[index % len(prompts)].text for index, prompts in enumerate(forms))
    return list(itertools.islice((text for text in texts if text not in left_out), count))


def draw(pipeline: Any, prompts: Sequence[ScenePrompt], **options: Any) -> list[torch.Tensor]:
    """One picture (3, 32, 32) uint8 of each prompt; noise depends on the prompt's number alone."""
    texts = prompt_set("prompts of rings", [prompt.text for prompt in prompts])
    return list(PipelinePromptImages(pipeline, texts, **options).load(range(len(texts))))


def kinds_right(pictures: Sequence[torch.Tensor], prompts: Sequence[ScenePrompt]) -> Share:
    """The share of pictures whose objects all have their shape and colour, with no others."""
    verdicts = [
        check_picture(picture.permute(1, 2, 0).numpy(), prompt)
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    return Share(sum(verdict.kind for verdict in verdicts), len(verdicts))


def train_adapter(
    pipeline: Path, pictures: Path, output: Path, prior: Sequence[str], more: Sequence[str] = ()
) -> tuple[Path, float]:
    """Fine-tune by the program that users run; => folder of the adapter, seconds (prior images included)."""
    prompts = output / "prior.txt"
    prompts.write_text("\n".join(prior) + "\n", encoding="utf-8")
    words = [
        f"pipeline={pipeline}", f"data.path={pictures}", "data.image_size=32", f"output_dir={output / 'lora'}",
        f"prior.prompts={prompts}", "device=cpu", "precision=fp32", "gradient_checkpointing=false", "num_workers=0",
        "sample.every_steps=0", "micro_batch_size=null", *SETTINGS, *more,
    ]  # fmt: skip
    settings = dict(word.split("=", 1) for word in words)  # the last word about a key counts
    started = time.perf_counter()
    adapter = finetune.train(load_finetune_config("finetune_lora", [f"{key}={it}" for key, it in settings.items()]))
    return adapter, time.perf_counter() - started


def ordinary_points(before: ShapesScore, after: ShapesScore) -> dict[str, dict[str, float]]:
    """Sort of ordinary scenes => per cent of pictures with shapes, colours, positions and count right, and the change.

    `all` is of all sorts together.
    """
    hits = {
        "before": {str(group): shares["all four"] for group, shares in before.shares.items()},
        "after": {str(group): shares["all four"] for group, shares in after.shares.items()},
    }
    for shares in hits.values():
        shares["all"] = Share(sum(s.hits for s in shares.values()), sum(s.total for s in shares.values()))
    rows = {name: {when: 100 * shares[name].value for when, shares in hits.items()} for name in hits["before"]}
    return {name: {**row, "change": row["after"] - row["before"]} for name, row in rows.items()}


def run(pipeline: Path, output: Path, count: int, more: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """Teach, load and judge; => what came out.

    Args:
        pipeline: folder of the pipeline of shapes.
        output: folder of everything.
        count: prompts of each sort.
        more: further `key=value` settings of the fine-tuning.
        options: sampling options; those not given are the pipeline's.
    """
    pictures = write_pictures(output / "rings")
    ordinary, asked = ShapesPrompts(count, 0, GROUPS), ring_prompts(count)
    tuned: Any = repagen.TextToImagePipeline.from_pretrained(pipeline)
    before = evaluate_shapes(tuned, ordinary, **options).score
    rings_before = {name: kinds_right(draw(tuned, prompts, **options), prompts) for name, prompts in asked.items()}
    prior = prior_prompts(prompt.text for _, prompt in ordinary)
    adapter, seconds = train_adapter(pipeline, pictures, output, prior, more)
    tuned.load_lora_weights(adapter)
    drawn = {name: draw(tuned, prompts, **options) for name, prompts in asked.items()}
    after = evaluate_shapes(tuned, ordinary, **options).score
    show(drawn, output / "rings.png")
    few = asked["colours shown"][:SHOWN_SAMPLES]
    unfused = draw_floats(tuned, few, **options)
    tuned.fuse_lora()
    fused = draw_floats(tuned, few, **options)
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    size = (adapter / "pytorch_lora_weights.safetensors").stat().st_size
    rings_after = {name: kinds_right(drawn[name], prompts) for name, prompts in asked.items()}
    return {
        "prompts_of_each_sort": count,
        "rings_right": {
            name: {"before": rings_before[name].value, "after": share.value, "confidence_95": list(share.interval)}
            for name, share in rings_after.items()
        },
        "ordinary_percent": ordinary_points(before, after),
        "ordinary_before": before.metrics(),
        "ordinary_after": after.metrics(),
        "adapter_bytes": size,
        "adapter_by_generator": size / weights.stat().st_size,
        "fused_difference": (fused - unfused).abs().max().item(),
        "training_seconds": round(seconds, 1),
    }


def draw_floats(pipeline: Any, prompts: Sequence[ScenePrompt], **options: Any) -> torch.Tensor:
    """Pictures (N, 3, 32, 32) in [0, 1], not rounded, from the same noise at every call."""
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    texts = [prompt.text for prompt in prompts]
    images: torch.Tensor = pipeline(texts, generator=generators, output_type="pt", **options).images
    return images


def show(drawn: dict[str, list[torch.Tensor]], path: Path) -> None:
    """Write the ten pictures, and ten samples of each sort in a row below."""
    rows = [torch.from_numpy(draw_scene(scene)).permute(2, 0, 1) for scene in shown_scenes()[:SHOWN_SAMPLES]]
    rows += [picture for pictures in drawn.values() for picture in pictures[:SHOWN_SAMPLES]]
    save_image_grid(torch.stack(rows).float() / 255, path, columns=SHOWN_SAMPLES, enlarge=2, gap_px=4)


def main() -> None:
    """Run it and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="a pipeline of shapes, by shapes_text_to_image")
    parser.add_argument("--output", type=Path, default=Path("runs/shapes_lora"))
    parser.add_argument("--num-prompts", type=int, default=100, help="of each sort (%(default)s)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the fine-tuning"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "repagen": repagen.__version__},
        "settings": [*SETTINGS, *args.set],
        **run(args.pipeline, args.output, args.num_prompts, args.set),
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: record[key] for key in ("rings_right", "ordinary_percent")}, indent=2))


if __name__ == "__main__":
    main()
