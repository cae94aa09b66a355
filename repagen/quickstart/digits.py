"""The quickstart on real handwritten digits: the whole path from pixels to a judged pipeline, on a CPU.

It calls the same programs as real training, with the presets `digits_decoder` and `digits_generator`: train the
autoencoder's decoder, cache latents and alignment targets, train a DiT^DH with REPA, reload the released pipeline,
sample, evaluate. The same command again continues where a stopped one left off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from repagen.config import load_config
from repagen.data import DataConfig, digits_encoder_path
from repagen.data.digits import DigitsDataset, digits_to_images, load_digits
from repagen.encoders import VisionEncoder
from repagen.evaluation.encoder_extractors import EncoderExtractor
from repagen.evaluation.generation import evaluate_generation
from repagen.evaluation.pipeline_images import PipelineImages
from repagen.evaluation.protocol import encoder_protocol
from repagen.evaluation.reconstruction.pixel_metrics import peak_signal_to_noise_ratio
from repagen.evaluation.result import GenerationResult
from repagen.evaluation.samples import DatasetImages, NpzImages
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.pipelines.class_to_image import ClassToImagePipeline
from repagen.pipelines.grid import save_image_grid
from repagen.quickstart.clock import Clock, readable_seconds
from repagen.quickstart.figures import save_loss_plot
from repagen.quickstart.judge import agreement, nearest_distance, to_small, train_digit_classifier
from repagen.training import decoder, generator
from repagen.training.decoder import DecoderConfig
from repagen.training.generator_config import GeneratorConfig
from repagen.training.latent_cache import cache_latents

NUM_SAMPLES = 500
_SAMPLE_BATCH = 100
_GRID_COLUMNS = 10  # one row a class


@dataclass(frozen=True)
class DigitsReport:
    """What the quickstart found; distances are between 8x8 pictures with values in [0, 1].

    Attributes:
        class_agreement: fraction of unguided samples to which an independent classifier gives their own label.
        classifier_accuracy: of that classifier on held-out real digits.
        reconstruction_psnr_db: of held-out digits through the autoencoder.
        frechet_distance: samples against all real digits, in the mean patch token of the bundled encoder.
        precision, recall: k = 3, in the same features.
        nearest_training_distance_of_samples: mean distance to the nearest training picture.
        nearest_training_distance_of_held_out: the same of held-out digits; far below it would mean copies.
        num_samples: number of samples behind all this.
        seconds: wall clock of the parts of this call.
    """

    class_agreement: float
    classifier_accuracy: float
    reconstruction_psnr_db: float
    frechet_distance: float
    precision: float | None
    recall: float | None
    nearest_training_distance_of_samples: float
    nearest_training_distance_of_held_out: float
    num_samples: int
    seconds: dict[str, float]


def run(output: Path, seed: int) -> str:
    """Run the quickstart and describe what it made.

    Args:
        output: folder of everything.
        seed: of weights, batches, noise and samples.

    Raises:
        UserError: the folder cannot be used.
    """
    clock = Clock()
    pipeline_folder = train_digits(output, seed=seed, clock=clock)
    report, result = judge_digits(output, pipeline_folder, seed=seed, clock=clock)
    record = {**asdict(report), "evaluation": result.as_dict()}
    (output / "metrics.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return _summary(output, pipeline_folder, report)


def train_digits(
    output: Path, *, seed: int = 0, overrides: dict[str, Sequence[str]] | None = None, clock: Clock | None = None
) -> Path:
    """Train autoencoder and generator on the bundled digits' training split.

    Args:
        output: folder of both runs and of the latent cache.
        seed: of both runs.
        overrides: `key=value` words by preset (`digits_decoder`, `digits_generator`), for example fewer steps.
        clock: takes the times.

    Returns:
        The folder of the released pipeline.

    Raises:
        UserError: the folder cannot be used, or an override is wrong.
    """
    clock, overrides = clock or Clock(), overrides or {}

    def words(preset: str, folder: str, *more: str) -> list[str]:
        return [f"output_dir={output / folder}", f"seed={seed}", *more, *overrides.get(preset, ())]

    clock.begin("decoder", "autoencoder: train a decoder for the frozen encoder's tokens")
    config = load_config(DecoderConfig, "digits_decoder", words("digits_decoder", "decoder"))
    autoencoder_folder = decoder.train(config)
    clock.begin("cache", "cache: latents and alignment targets of the training digits")
    autoencoder = RepresentationAutoencoder.from_pretrained(autoencoder_folder)
    encoder = VisionEncoder.from_pretrained(digits_encoder_path())
    cache_latents(autoencoder, DigitsDataset(config.data), output / "latents", encoders=[encoder])
    clock.begin("generator", "generator: train a DiT^DH on the latents, aligned with the encoder (REPA)")
    sources = (f"autoencoder.path={autoencoder_folder}", "data.kind=latents", f"data.path={output / 'latents'}")
    return generator.train(
        load_config(GeneratorConfig, "digits_generator", words("digits_generator", "generator", *sources))
    )


def judge_digits(
    output: Path, pipeline_folder: Path, *, seed: int, clock: Clock
) -> tuple[DigitsReport, GenerationResult]:
    """Reload the pipeline, sample without guidance, and judge the samples; writes `samples.npz` and the pictures."""
    clock.begin("sampling", f"pipeline: reload it and draw {NUM_SAMPLES} unguided samples")
    pipeline = ClassToImagePipeline.from_pretrained(pipeline_folder)
    drawn = PipelineImages(pipeline, NUM_SAMPLES, seed=seed)
    samples, labels = _draw(drawn), torch.arange(NUM_SAMPLES) % 10
    np.savez(output / "samples.npz", arr_0=samples.permute(0, 2, 3, 1).numpy())
    shown = [Image.fromarray(samples[i].permute(1, 2, 0).numpy()) for i in labels[:100].argsort(stable=True)]
    save_image_grid(shown, output / "samples.png", columns=_GRID_COLUMNS, enlarge=2, gap_px=8)
    curves = {
        "decoder": (output / "decoder" / "metrics.jsonl", ["l1"]),
        "generator": (output / "generator" / "metrics.jsonl", ["loss_flow", "loss_alignment"]),
    }
    save_loss_plot(curves, output / "loss.png")

    clock.begin("evaluation", "evaluation: an independent classifier, Frechet distance, recall, nearest neighbours")
    extractor = EncoderExtractor(VisionEncoder.from_pretrained(digits_encoder_path()))
    reference = DatasetImages(DigitsDataset(DataConfig(kind="digits", image_size=32)))
    protocol = encoder_protocol(str(digits_encoder_path()))
    result = evaluate_generation(NpzImages(output / "samples.npz"), reference, protocol, {"encoder": extractor})
    train_x, train_y = _pictures("train")
    held_x, held_y = _pictures("validation")
    pictures = to_small(samples.float() / 255)
    classifier = train_digit_classifier(train_x, train_y, seed=seed)
    clock.begin("")
    report = DigitsReport(
        class_agreement=agreement(classifier, pictures, labels),
        classifier_accuracy=agreement(classifier, held_x, held_y),
        reconstruction_psnr_db=_reconstruction_psnr_db(output / "decoder" / "autoencoder"),
        frechet_distance=result.metrics["fd_encoder"],
        precision=result.metrics.get("precision_encoder"),
        recall=result.metrics.get("recall_encoder"),
        nearest_training_distance_of_samples=nearest_distance(pictures, train_x),
        nearest_training_distance_of_held_out=nearest_distance(held_x, train_x),
        num_samples=NUM_SAMPLES,
        seconds=clock.seconds,
    )
    return report, result


def _draw(drawn: PipelineImages) -> torch.Tensor:
    """Sample all images (N, 3, S, S) uint8, with a progress bar."""
    from tqdm import tqdm

    batches = range(0, len(drawn), _SAMPLE_BATCH)
    rows: list[Any] = []
    for start in tqdm(batches, desc="samples", unit="batch"):
        rows += drawn.load(range(start, min(start + _SAMPLE_BATCH, len(drawn))))
    return torch.stack(rows)


def _pictures(subset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    digits, labels = load_digits(subset)
    return torch.from_numpy(digits).float().div(255)[:, None], torch.from_numpy(labels)


@torch.no_grad()
def _reconstruction_psnr_db(autoencoder_folder: Path) -> float:
    """Mean PSNR of the held-out digits in dB."""
    autoencoder = RepresentationAutoencoder.from_pretrained(autoencoder_folder)
    images = digits_to_images(load_digits("validation")[0])
    return peak_signal_to_noise_ratio(autoencoder(images).sample.clamp(0, 1), images).mean().item()


def _summary(output: Path, pipeline_folder: Path, report: DigitsReport) -> str:
    return f"""
class agreement   {report.class_agreement:.1%} of {report.num_samples} unguided samples (the judge: \
{report.classifier_accuracy:.1%} on held-out digits)
recall            {_figure(report.recall)}, precision {_figure(report.precision)}, Frechet distance \
{report.frechet_distance:.3f} in the digits encoder
reconstruction    {report.reconstruction_psnr_db:.1f} dB PSNR on held-out digits
nearest training  samples {report.nearest_training_distance_of_samples:.2f}, held-out digits \
{report.nearest_training_distance_of_held_out:.2f} (mean pixel distance; much smaller would mean copies)
wall clock        {readable_seconds(report.seconds)}
files             {output}/samples.png, loss.png, metrics.json, samples.npz; the pipeline in {pipeline_folder}

Next:
  repagen sample --model {pipeline_folder} --class-labels 3 7 --guidance-scale 1.5 --output {output}/more
  repagen evaluate generation --model {pipeline_folder} --num-samples 1000 --reference data.kind=digits \
data.image_size=32 --extractor {digits_encoder_path()}
  repagen recipes"""


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
