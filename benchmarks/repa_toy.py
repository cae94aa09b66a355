"""REPA at toy scale: does alignment change what a generator's inner tokens know, and what it draws?

    python benchmarks/repa_toy.py [--output DIR] [--seeds 0 1 2] [--steps N]

The paper's setting (2410.06940) in small: a SiT in the latents of a little AutoencoderKL, trained on the bundled
digits with and without REPA towards the bundled encoder; same seeds, same steps, same batches. Both are measured on
held-out digits, from EMA weights:

- patch cosine: a linear probe is fitted to the frozen block's tokens on training digits, for both runs alike, and its
  mean cosine to the encoder's tokens is taken on held-out digits (times uniform in [0, 1]).
- Frechet distance of unguided samples to all real digits, in the mean patch token of the encoder.

Writes results.json and curves.png to --output, and prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from toy_science import mean_and_interval

import repagen
from repagen.alignment import AlignmentTarget
from repagen.config import load_config
from repagen.data import DataConfig, digits_encoder_path, open_dataset
from repagen.data.digits import digits_to_images, load_digits
from repagen.evaluation.encoder_extractors import EncoderExtractor
from repagen.evaluation.generation import evaluate_generation
from repagen.evaluation.pipeline_images import PipelineImages
from repagen.evaluation.protocol import encoder_protocol
from repagen.evaluation.samples import DatasetImages
from repagen.flow.path import interpolate
from repagen.models.latents import images_to_latents
from repagen.quickstart.figures import save_loss_plot
from repagen.randomness import generator_for
from repagen.training import generator
from repagen.training.generator_config import GeneratorConfig

BLOCK, PROJECTOR_DIM, PROBE_STEPS = 2, 256, 600
SIT = [
    "transformer.architecture=sit",
    "transformer.patch_size=2",
    "transformer.prediction=velocity",
    "transformer.overrides={hidden_size: 128, depth: 4, num_heads: 4, learn_sigma: false}",
    "flow.shift=1.0",
    "sampler.preset=repa-ode",
]


def train_vae(folder: Path, steps: int = 800) -> Path:
    """Train a small AutoencoderKL on the digits: 32 px to a (4, 8, 8) latent of unit variance."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), norm_num_groups=8, latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip
    images = digits_to_images(load_digits("train")[0]) * 2 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (32,))]
        posterior = vae.encode(batch).latent_dist
        loss = F.l1_loss(vae.decode(posterior.sample()).sample, batch) + 1e-4 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(images[:256]).latent_dist.mean.std().item())
    vae.save_pretrained(folder)
    return folder


def train_generator(output: Path, vae: Path, seed: int, steps: int, aligned: bool) -> Path:
    """Train one SiT by the program that trains any generator."""
    target = f"{{encoder: digits, block: {BLOCK}, projector_dim: {PROJECTOR_DIM}}}"
    words = [
        f"output_dir={output}", f"seed={seed}", f"max_steps={steps}", f"autoencoder.path={vae}", *SIT,
        "data.kind=digits", "data.subset=train", "data.image_size=32",
        f"alignment.targets=[{target if aligned else ''}]",
    ]  # fmt: skip
    return generator.train(load_config(GeneratorConfig, "digits_generator", words))


def noisy_tokens(
    model: torch.nn.Module,
    latents: torch.Tensor,
    labels: torch.Tensor,
    class_tokens: torch.Tensor,
    draws: torch.Generator,
) -> torch.Tensor:
    """Patch tokens after the aligned block at uniform times, (B, N, D), without gradient."""
    tokens = []
    hook = model.blocks[BLOCK - 1].register_forward_hook(lambda module, args, output: tokens.append(output))
    t = torch.rand(len(latents), generator=draws)
    noise = torch.randn(latents.shape, generator=draws)
    further = {}
    if model.config.get("class_token_dim"):  # REG sees a noisy class token too
        further["class_token"] = interpolate(class_tokens, torch.randn(class_tokens.shape, generator=draws), t)
    with torch.no_grad():
        model(interpolate(latents, noise, t), t, class_labels=labels, **further)
    hook.remove()
    rows, columns = model.token_grid
    return tokens[0][:, : rows * columns]


def held_out_patch_cosine(pipeline: Path, seed: int) -> float:
    """Fit a linear probe to the frozen tokens on the training digits; mean cosine on the held-out ones."""
    pipe = repagen.ClassToImagePipeline.from_pretrained(pipeline)
    encoder = repagen.VisionEncoder.from_pretrained(digits_encoder_path())
    split = {}
    for subset in ("train", "validation"):
        pictures, labels = load_digits(subset)
        images = digits_to_images(pictures)
        with torch.no_grad():
            latents = images_to_latents(pipe.vae, images, generator=torch.Generator().manual_seed(0))
        seen = encoder(images)
        split[subset] = latents, torch.from_numpy(labels), seen.cls, seen.tokens
    torch.manual_seed(seed)
    width, dim = pipe.transformer.config.hidden_size, encoder.hidden_size
    probe = repagen.RepresentationAlignment(width, [AlignmentTarget(dim, BLOCK, projector="linear")])
    projector, grid = probe.projectors[0], pipe.transformer.token_grid
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    draws = generator_for(seed, "probe")
    for _ in range(PROBE_STEPS):
        chosen = torch.randint(len(split["train"][0]), (128,), generator=draws)
        *given, targets = (part[chosen] for part in split["train"])
        projected = projector(noisy_tokens(pipe.transformer, *given, draws), grid)
        loss = -F.cosine_similarity(projected, targets, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    *given, targets = split["validation"]
    draws = generator_for(0, "held-out times")  # the same for all runs
    with torch.no_grad():
        cosines = [
            F.cosine_similarity(projector(noisy_tokens(pipe.transformer, *given, draws), grid), targets, dim=-1)
            for _ in range(4)
        ]
    return torch.stack(cosines).mean().item()


def frechet_distance(pipeline: Path, seed: int) -> float:
    """Distance of 2,000 unguided samples to all digits."""
    pipe = repagen.ClassToImagePipeline.from_pretrained(pipeline)
    extractor = EncoderExtractor(repagen.VisionEncoder.from_pretrained(digits_encoder_path()))
    reference = DatasetImages(open_dataset(DataConfig(kind="digits", image_size=32)))
    samples = PipelineImages(pipe, 2000, seed=seed, num_inference_steps=50)
    protocol = encoder_protocol(str(digits_encoder_path()), metrics=["fd"])
    result = evaluate_generation(samples, reference, protocol, {"encoder": extractor}, batch_size=250)
    return result.metrics["fd_encoder"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/repa_toy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    vae = train_vae(args.output / "vae")
    results: dict[str, dict[str, list[float]]] = {}
    for name in ("unaligned", "aligned"):
        found = results[name] = {"held_out_patch_cosine": [], "frechet_distance": []}
        for seed in args.seeds:
            pipeline = train_generator(args.output / f"{name}-{seed}", vae, seed, args.steps, name == "aligned")
            found["held_out_patch_cosine"].append(held_out_patch_cosine(pipeline, seed))
            found["frechet_distance"].append(frechet_distance(pipeline, seed))
    record = {"steps": args.steps, "seeds": args.seeds, "torch": torch.__version__, "results": results}
    (args.output / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    curves = {
        f"{name}, seed {args.seeds[0]}": (args.output / f"{name}-{args.seeds[0]}" / "metrics.jsonl", ["loss_flow"])
        for name in results
    }
    save_loss_plot(curves, args.output / "curves.png")
    for name, found in results.items():
        print(f"{name:10} " + "  ".join(f"{key} {mean_and_interval(values)}" for key, values in found.items()))


if __name__ == "__main__":
    main()
