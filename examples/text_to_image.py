"""Prompts to pictures, and what else the same pipeline does: guidance, editing, inpainting, interpolation.

    python examples/text_to_image.py [--model FOLDER_OR_HUB_ID] [--output DIR]

Without --model it is the bundled pipeline, which knows shapes on plain backgrounds. Each row of the sheet is one call
(seconds on two CPU cores).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import repagen
from repagen.data import shapes_pipeline_path
from repagen.pipelines.grid import save_image_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=str, default=str(shapes_pipeline_path()))
parser.add_argument("--output", type=Path, default=Path("runs/example_text_to_image"))
args = parser.parse_args()

pipe = repagen.TextToImagePipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)


def noise(*seeds: int) -> list[torch.Generator]:
    """One generator per image: a picture depends on its seed and prompt, not on its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


prompts = [
    "a large red circle at the bottom left on a white background",
    "a small yellow cross at the top right on a black background",
    "a blue square and a green triangle",
    "a purple square above a cyan circle",
    "three red triangles",
]
rows = {}
rows["five prompts"] = pipe(prompts, generator=noise(0, 1, 2, 3, 4)).images

# Away from the negative prompt instead of the learned null prompt; more guidance follows prompts more closely.
rows["'a circle', five seeds, with negative_prompt='a red circle on a white background'"] = pipe(
    "a circle",
    negative_prompt="a red circle on a white background",
    guidance_scale=3.0,
    num_images_per_prompt=5,
    generator=noise(0, 1, 2, 3, 4),
).images

picture = rows["five prompts"][0]
rows["the first picture, noised to t = 0, 0.05, 0.1, 0.2, 0.6 and drawn on as 'a large blue square ...'"] = [
    pipe(
        "a large blue square at the bottom left on a white background",
        image=picture,
        strength=strength,
        generator=noise(0),
    ).images[0]
    for strength in (0.0, 0.05, 0.1, 0.2, 0.6)
]

mask = Image.new("L", picture.size)
mask.paste(255, (mask.width // 2, 0, mask.width, mask.height // 2))  # white is drawn anew: the top right quadrant
scene = "a large red circle at the bottom left and a small {} at the top right on a white background"
things = ["blue square", "green triangle", "yellow cross", "purple square", "cyan circle"]
rows["the first picture, with something new in its top right quadrant"] = pipe(
    [scene.format(thing) for thing in things], image=picture, mask_image=mask, generator=noise(0, 1, 2, 3, 4)
).images

rows["between two prompts"] = pipe(
    "a large red circle at the bottom left on a white background",
    interpolate_to="a large blue square at the top right on a black background",
    interpolation=[0.0, 0.25, 0.5, 0.75, 1.0],
    num_images_per_prompt=5,
    generator=noise(0, 0, 0, 0, 0),
).images

sheet = args.output / "sheet.png"
save_image_grid([image for row in rows.values() for image in row], sheet, columns=5, enlarge=4, gap_px=4)
print(*(f"row {number}: {what}" for number, what in enumerate(rows, start=1)), sheet, sep="\n")
