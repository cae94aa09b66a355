"""Every generator in every latent: does a pair train, sample and reload?

    python benchmarks/latent_generator_matrix.py [--output DIR] [--latents rae kl ...] [--generators sit dit ...]

Trains tiny autoencoders of every kind on the bundled digits' training split, then every generator in the latents of
each for 200 steps of 32 by the program that trains any generator, without alignment. Of each pair it measures the
held-out loss before and after, on the same latents, times, noise and labels:

- the flow's squared velocity error for generators that predict velocity or data,
- the squared error of the noise for DiT, a DDPM.

`After` is the released pipeline, read from disk: EMA weights. It is saved and loaded once more and must then draw the
same pictures. Beside the loss, which an untrained eye cannot read, an independent classifier says what share of 100
unguided samples shows the digit that was asked for.

Rule for a pair that makes sense: the generator's patches divide the latent. All pairs here do: latents of 4 x 4 tokens
take patches of 1, 8 x 8 of 2, pixels of 8, so that every network sees 16 tokens. Predictions are the published ones,
but for pixels, 192 numbers to a token, where networks of this width predict the data. A pair passes where the loss
falls by at least 20 %; one that does not is reported all the same. For scale: of white data of unit variance, a linear
predictor reaches a velocity error of 1.55 to 1.74 (by the shift) from 2, and an error of DiT's noise of 0.28 from 1.

Writes OUTPUT/results.json, a PNG of the samples of each pair, and with --table the Markdown table of docs/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL

import repagen
from repagen.config import load_config
from repagen.data import DataConfig, open_dataset
from repagen.data.digits import digits_to_images, load_digits
from repagen.flow.conditions import Conditions
from repagen.models.autoencoder_pixel import PixelAutoencoder
from repagen.models.latents import images_to_latents, latent_shape
from repagen.pipelines.grid import save_image_grid
from repagen.quickstart.judge import agreement, to_small, train_digit_classifier
from repagen.randomness import generator_for
from repagen.training import decoder, generator
from repagen.training.conditioning import ClassConditioning
from repagen.training.decoder_config import DecoderConfig
from repagen.training.generator_config import GeneratorConfig
from repagen.training.generator_loop import noise_process
from repagen.training.generator_model import build_model
from repagen.training.latent_cache import cache_latents
from repagen.training.latent_identity import open_autoencoder
from repagen.training.objective import GeneratorObjective

IMAGE_SIZE, LEAST_FALL = 32, 0.2
WIDTHS = {"hidden_size": 96, "num_heads": 4}
HEAD = {"head_hidden_size": 128, "head_depth": 1, "head_num_heads": 4}
# Generator => the published size that the tiny widths replace.
GENERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "sit": ("S", {**WIDTHS, "depth": 3}),
    "dit": ("S", {**WIDTHS, "depth": 3}),
    "lightningdit": ("B", {**WIDTHS, "depth": 3}),
    "ditdh": ("S", {**WIDTHS, "depth": 2, **HEAD}),
    "raev2": ("XL", {**WIDTHS, "depth": 2, **HEAD, "base_depth": 1}),
    "ddt": ("XL", {**WIDTHS, "depth": 2, "head_depth": 1}),
    "elt": ("L", {**WIDTHS, "depth": 2, "num_loops": 2}),
}
# Latent => side of the generator's patches, and what it is.
LATENTS: dict[str, tuple[int, str]] = {
    "rae": (1, "RAE: the bundled encoder's last layer"),
    "raev2": (1, "RAEv2: mean of all layers and the spatial mean"),
    "svg": (1, "SVG: the bundled encoder and a residual of 4 channels"),
    "kl": (2, "AutoencoderKL with a scaling factor, as SD-VAE"),
    "vavae": (2, "the same with statistics per channel, as VA-VAE"),
    "pixels": (8, "pixels in [-1, 1]"),
}
PIXEL_PREDICTION = "sample"


@dataclass(frozen=True)
class PairResult:
    """One pair.

    Attributes:
        latent, generator: its names.
        before, after: held-out loss of the new network and of the released pipeline.
        agreement: share of samples to which a classifier gives their own label.
        reloaded_equal: whether the pipeline, saved and loaded again, draws the same pictures.
        seconds: of this call's training; a finished run is not trained again.
    """

    latent: str
    generator: str
    before: float
    after: float
    agreement: float
    reloaded_equal: bool
    seconds: float

    @property
    def fall(self) -> float:
        """Share of the loss that training took away."""
        return 1 - self.after / self.before

    @property
    def passed(self) -> bool:
        """Whether the pair meets the bar."""
        return self.fall >= LEAST_FALL and self.reloaded_equal


def make_autoencoder(name: str, folder: Path, steps: int) -> Path:
    """Train the autoencoder of a latent for some steps, once; => its folder."""
    if name == "pixels":
        PixelAutoencoder(IMAGE_SIZE).save_pretrained(folder / "pixels")
        return folder / "pixels"
    preset, more = {
        "rae": ("digits_decoder", []),
        "raev2": (
            "digits_decoder",
            ["autoencoder.layers=[0, 1, 2]", "autoencoder.combination=mean_plus_spatial_mean",
             "autoencoder.normalised_pixels=false"],
        ),
        "svg": ("digits_svg", []),
        "kl": ("digits_kl", ["statistics=false"]),
        "vavae": ("digits_kl", []),
    }[name]  # fmt: skip
    words = [f"output_dir={folder / name}", f"max_steps={steps}", "sample.every_steps=0", "progress_bar=false", *more]
    trained = decoder.train(load_config(DecoderConfig, preset, words))
    if name == "kl":
        set_scaling_factor(trained)
    return trained


def set_scaling_factor(folder: Path) -> None:
    """Give a KL autoencoder the one factor that makes its training latents unit variance (LDM, section D.1)."""
    autoencoder: Any = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        posterior = autoencoder.encode(digits_to_images(load_digits("train")[0]) * 2 - 1).latent_dist
        deviation = posterior.sample(generator_for(0, "scaling factor")).std().item()
    autoencoder.register_to_config(scaling_factor=1 / deviation)
    autoencoder.save_pretrained(folder)


def cache_training_latents(autoencoder: Any, folder: Path) -> Path:
    """Encode the training digits once."""
    dataset: Any = open_dataset(DataConfig(kind="digits", subset="train", image_size=IMAGE_SIZE))
    cache_latents(autoencoder, dataset, folder)
    return folder


def pair_config(
    latent: str, name: str, autoencoder: Path, cache: Path, shape: tuple[int, int, int], output: Path, steps: int
) -> GeneratorConfig:
    """The configuration of one pair, from the preset of the digits."""
    size, widths = GENERATORS[name]
    patch_size = LATENTS[latent][0]
    prediction = [f"transformer.prediction={PIXEL_PREDICTION}"] if latent == "pixels" and name != "dit" else []
    channels, height, width = shape
    shift = (channels * height * width / 256) ** 0.5  # as the digits' preset; RAE's base is 4096
    words = [
        f"output_dir={output}", f"max_steps={steps}", "global_batch_size=32", "progress_bar=false",
        "sample.every_steps=0", "alignment.targets=[]", "data.kind=latents", f"data.path={cache}",
        f"autoencoder.path={autoencoder}",
        f"transformer={{architecture: {name}, size: {size}, patch_size: {patch_size}, overrides: {widths}}}",
        *prediction,
        "flow={}" if name == "dit" else f"flow.shift={shift}",  # a DDPM has steps in place of flow times
        f"sampler.preset={'dit-ddim' if name == 'dit' else 'repa-ode'}", "sampler.num_inference_steps=25",
        "optimizer.learning_rate=2.0e-3", "optimizer.schedule.warmup_steps=20", "ema.decay=0.98",
    ]  # fmt: skip
    return load_config(GeneratorConfig, "digits_generator", words)


def conditioning(config: GeneratorConfig) -> ClassConditioning:
    """The ten digits."""
    return ClassConditioning.of_all([str(digit) for digit in range(10)], config.label_dropout)


@torch.no_grad()
def held_out_loss(
    config: GeneratorConfig, model: Any, latents: torch.Tensor, labels: torch.Tensor, draws: int = 4
) -> float:
    """Mean loss of a network on latents (N, C, h, w) of held-out digits; times and noise are keyed, labels kept."""
    process = noise_process(config, model, tuple(latents.shape[1:]), conditioning(config).dropout)
    kept = Conditions(labels)
    objective = GeneratorObjective(model, process)
    losses = []
    for draw in range(draws):
        generators = [generator_for(0, "held out", index, draw) for index in range(len(latents))]
        sample = dataclasses.replace(process.draw(latents, kept, generators), conditions=kept)
        losses.append(objective(sample, {})["epsilon" if model.discrete_time else "flow"])
    return torch.cat(losses).mean().item()


def train_judge() -> torch.nn.Module:
    """A classifier of 8 x 8 digits that shares nothing with what it judges."""
    digits, labels = load_digits("train")
    return train_digit_classifier(torch.from_numpy(digits).float().div(255)[:, None], torch.from_numpy(labels), seed=0)


def run_pair(
    latent: str,
    name: str,
    autoencoder_folder: Path,
    cache: Path,
    output: Path,
    steps: int,
    judge: torch.nn.Module,
) -> PairResult:
    """Train one pair, measure it, draw ten samples of each digit and reload it."""
    autoencoder = open_autoencoder(str(autoencoder_folder))
    digits, labels = load_digits("validation")
    generators = [generator_for(0, "posterior", index) for index in range(len(labels))]
    latents = images_to_latents(autoencoder, digits_to_images(digits, IMAGE_SIZE), generator=generators)
    targets = torch.from_numpy(labels)
    shape = latent_shape(autoencoder, IMAGE_SIZE)
    config = pair_config(latent, name, autoencoder_folder, cache, shape, output / "run", steps)
    model = build_model(config, shape, conditioning(config).model_arguments).eval()
    before = held_out_loss(config, model, latents, targets)
    start = time.perf_counter()
    released = generator.train(config)
    seconds = time.perf_counter() - start
    pipe = repagen.ClassToImagePipeline.from_pretrained(released)
    after = held_out_loss(config, pipe.transformer, latents, targets)
    pictures = draw_digits(pipe, 10)
    save_image_grid(pictures, output / "samples.png", columns=10, gap_px=2)
    agreed = agreement(judge, to_small(pictures), torch.arange(len(pictures)) % 10)
    pipe.save_pretrained(output / "again")
    again = repagen.ClassToImagePipeline.from_pretrained(output / "again")
    equal = bool(torch.equal(draw_digits(pipe, 1), draw_digits(again, 1)))
    return PairResult(latent, name, before, after, agreed, equal, round(seconds, 1))


def draw_digits(pipe: Any, rounds: int) -> torch.Tensor:
    """Samples of each class in turn, (10 * rounds, 3, 32, 32), by the pipeline's own defaults."""
    pipe.set_progress_bar_config(disable=True)
    generators = [generator_for(0, "samples", index) for index in range(10 * rounds)]
    return pipe(class_labels=list(range(10)) * rounds, generator=generators, output_type="pt").images


def markdown_table(results: list[PairResult], steps: int, decoder_steps: int) -> str:
    """The page of docs/results: latents in rows, generators in columns."""
    found = {(result.latent, result.generator): result for result in results}
    names = [name for name in GENERATORS if any(result.generator == name for result in results)]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    passed = sum(result.passed for result in results)
    lines = [
        "# Every generator in every latent",
        "",
        f"`python benchmarks/latent_generator_matrix.py --table FILE`, {datetime.date.today()}, one CPU thread,",
        f"{versions}. Bundled digits, seed 0: {steps} steps of 32 per pair, tiny networks (width 96), autoencoders",
        f"trained for {decoder_steps} steps.",
        "",
        "Loss on the 355 held-out digits of a new network => of the released pipeline, and its fall; then the share",
        "of 100 unguided samples to which an independent classifier gives their own label (chance 10 %). The loss is",
        "the squared error of the velocity, of `dit` (a DDPM) of the noise; rows and columns are not comparable with",
        "each other. For scale: of white data of unit variance a linear predictor reaches 1.55 to 1.74 (by the time",
        "shift) from 2, and 0.28 from 1 for the noise, so that `dit` falls far without having learned the data.",
        "Predictions are the published ones, but for pixels (data).",
        "",
        "Every pair is sampled to a PNG, saved, and reloaded, and then draws the same pictures. The bar is a fall of",
        f"20 %: **{passed} of {len(results)} pairs meet it**"
        + (", those that do not are set in bold." if passed < len(results) else "."),
        f"{steps} steps are too few for samples worth looking at, as the shares show.",
        "",
        f"| latent | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for latent in LATENTS:
        cells = [_cell(found.get((latent, name))) for name in names]
        if any(cells):
            lines.append(f"| `{latent}` | {' | '.join(cells)} |")
    lines += ["", *(f"- `{latent}`: {what}." for latent, (_, what) in LATENTS.items())]
    return "\n".join(lines) + "\n"


def _cell(result: PairResult | None) -> str:
    if result is None:
        return ""
    text = f"{result.before:.2f} => {result.after:.2f} ({-100 * result.fall:+.0f} %), {result.agreement:.0%}"
    return text if result.passed else f"**{text}{'' if result.reloaded_equal else ', reload differs'}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/latent_generator_matrix"))
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--decoder-steps", type=int, default=300)
    parser.add_argument("--table", type=Path, help="write the Markdown table there")
    args = parser.parse_args()
    judge, results = train_judge(), []
    for latent in args.latents:
        autoencoder = make_autoencoder(latent, args.output / "autoencoders", args.decoder_steps)
        cache = cache_training_latents(open_autoencoder(str(autoencoder)), args.output / "latents" / latent)
        for name in args.generators:
            folder = args.output / "pairs" / f"{latent}-{name}"
            results.append(run_pair(latent, name, autoencoder, cache, folder, args.steps, judge))
            print(f"{latent:8} {name:14} {_cell(results[-1])} in {results[-1].seconds} s", flush=True)
    record = [{**dataclasses.asdict(result), "fall": result.fall, "passed": result.passed} for result in results]
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    table = markdown_table(results, args.steps, args.decoder_steps)
    if args.table:
        args.table.write_text(table)
    print(table)


if __name__ == "__main__":
    main()
