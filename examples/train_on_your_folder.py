"""Train on a folder of class folders: autoencoder, statistics, latent cache, generator, pipeline.

    python examples/train_on_your_folder.py [--images FOLDER] [--output DIR]

Without --images a folder of handwritten digits is written first, so that the example runs as it is (about a minute on
two CPU cores). The sizes here are toys; for photographs start from the presets that `repagen recipes` lists, which are
the same programs: `accelerate launch train/decoder.py --config ... data.path=FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import repagen
from repagen.config import load_config
from repagen.data.digits import load_digits
from repagen.training import decoder, generator
from repagen.training.decoder import DecoderConfig
from repagen.training.generator_config import GeneratorConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=Path)
parser.add_argument("--output", type=Path, default=Path("runs/example_folder"))
parser.add_argument("--steps", type=int, default=300, help="training steps of the decoder and of the generator")
args = parser.parse_args()

images = args.images
if images is None:
    images = args.output / "images"
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for index, (picture, label) in enumerate(zip(*load_digits("train"), strict=True)):
        folder = images / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{index:04d}.png")

data = ["data.kind=folder", f"data.path={images}", "data.image_size=32"]
steps = [f"max_steps={args.steps}"]
autoencoder = decoder.train(
    load_config(DecoderConfig, "digits_decoder", [f"output_dir={args.output / 'decoder'}", *data, *steps])
)
# The encoder runs on the fly here; `repagen cache` would write the latents to disk once.
pipeline = generator.train(
    load_config(
        GeneratorConfig,
        "digits_generator",
        [f"output_dir={args.output / 'generator'}", f"autoencoder.path={autoencoder}", *data, *steps],
    )
)
pipe = repagen.ClassToImagePipeline.from_pretrained(pipeline)
print(f"{pipeline} knows {', '.join(pipe.config.id2label.values())}")
