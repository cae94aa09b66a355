"""Sample from a pipeline: classes by name or id, one seed an image, guidance in an interval of the time.

    python examples/sample.py [--model FOLDER_OR_HUB_ID] [--output DIR]

Without --model a small generator of handwritten digits is trained first (about a minute on two CPU cores).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import repagen
from repagen.pipelines.grid import save_image_grid
from repagen.quickstart.digits import train_digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model")
parser.add_argument("--output", type=Path, default=Path("runs/example_sample"))
parser.add_argument("--steps", type=int, default=400, help="training steps of the small generator")
args = parser.parse_args()

model = args.model or train_digits(
    args.output,
    overrides={"digits_decoder": ["max_steps=300"], "digits_generator": [f"max_steps={args.steps}"]},
)
pipe = repagen.ClassToImagePipeline.from_pretrained(model)

names = list(pipe.config.id2label.values())[:8]
images = pipe(
    class_labels=names,  # ids, or a mixture of both, work as well
    num_inference_steps=25,
    guidance_scale=1.5,
    guidance_interval=(0.1, 1.0),  # t = 0 is data, t = 1 is noise; outside it no null pass is made
    generator=[torch.Generator().manual_seed(seed) for seed in range(len(names))],
).images
save_image_grid(images, args.output / "grid.png", columns=len(images))
print(f"{', '.join(names)}: {args.output / 'grid.png'}")
