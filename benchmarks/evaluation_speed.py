"""How long an evaluation takes, beside torch-fidelity on the same images, and what it holds in memory.

    python benchmarks/evaluation_speed.py                                   # 256 images of 64 px, CPU or GPU
    python benchmarks/evaluation_speed.py --images 2048 --sampling 2048     # and sampling by a DiT^DH-XL, for a GPU

Both evaluate the same two sets with the same random Inception weights, in turns within one process: repagen from
memory to all metrics (FID, sFID, IS, KID, precision, recall, density, coverage, MIND), torch-fidelity from PNG files
to FID, IS, KID, precision, recall. Memory is the peak of a process of its own that evaluates so many small images.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

import repagen
from repagen.evaluation import (
    EncoderExtractor,
    EvaluationProtocol,
    ImageSource,
    InceptionExtractor,
    PipelineImages,
    TensorImages,
    encoder_protocol,
    evaluate_generation,
    load_protocol,
)
from repagen.evaluation.reporting import software_versions
from repagen.randomness import generator_for

METRICS = ["fd", "sfid", "inception_score", "kid", "precision_recall", "density_coverage", "mind"]


def random_inception(path: Path) -> Path:
    """Weights in the layout of the published file, random but alive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    torch.manual_seed(0)
    torch.save({}, path)
    with mock.patch.object(Network, "load_state_dict"):
        network = Network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    for name, parameter in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)
    return path


def random_images(count: int, size_px: int, seed: int) -> torch.Tensor:
    """uint8 pictures (count, 3, size, size) of noise around a colour of their own."""
    generator = torch.Generator().manual_seed(seed)
    noise = 40 * torch.randn(count, 3, size_px, size_px, generator=generator)
    colour = 128 + 30 * torch.randn(count, 3, 1, 1, generator=generator)
    return (noise + colour).clamp(0, 255).to(torch.uint8)


def write_pngs(images: torch.Tensor, folder: Path) -> str:
    """Write 00000.png ... and return the folder."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:05d}.png")
    return str(folder)


def whole_protocol(count: int) -> EvaluationProtocol:
    """All metrics of Inception's space; KID with subsets that so many images allow."""
    protocol = load_protocol("torch-fidelity")
    protocol.spaces[0].metrics = list(METRICS)  # type: ignore[arg-type]
    protocol.kernel.subset_size = min(1000, count // 2)
    return protocol


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Wall clock of a call, the device's work included."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare_with_torch_fidelity(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of both, in turns, and the largest relative difference of the metrics they share."""
    import torch_fidelity

    torch.backends.cudnn.allow_tf32 = False  # torch-fidelity leaves it on, which moves its features by 1e-3
    weights = random_inception(folder / "inception.pth")
    sides = [random_images(args.images, args.size, seed) for seed in (1, 2)]
    folders = [write_pngs(images, folder / f"side-{number}") for number, images in enumerate(sides)]
    protocol = whole_protocol(args.images)
    found: dict[str, Any] = {}

    def ours() -> None:
        extractors = {"inception": InceptionExtractor(weights, device)}
        found["ours"] = evaluate_generation(*(TensorImages(side) for side in sides), protocol, extractors).metrics

    def theirs() -> None:
        found["theirs"] = torch_fidelity.calculate_metrics(
            input1=folders[0], input2=folders[1], cuda=device.type == "cuda", isc=True, fid=True, kid=True, prc=True,
            feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), cache=False,
            kid_subset_size=protocol.kernel.subset_size, verbose=False,
        )  # fmt: skip

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(args.repeats):
        for name, function in (("ours", ours), ("theirs", theirs)):
            seconds[name].append(round(seconds_of(function, device), 2))
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    differences = {name: abs(found["ours"][name] / found["theirs"][key] - 1) for name, key in names.items()}
    found["differences"] = {name: float(f"{value:.2g}") for name, value in differences.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "images_per_side": args.images,
        "size_px": args.size,
        "seconds": seconds,
        "speedup": round(medians["theirs"] / medians["ours"], 3),
        "relative_differences": found["differences"],
    }


class LazyImages(ImageSource):
    """Random pictures made when they are asked for, so that they take no memory."""

    protocol = {"kind": "lazy"}  # noqa: RUF012

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, indices: Sequence[int]) -> list[Any]:
        """Draw the pictures."""
        return [
            torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator_for(0, "lazy", index))
            for index in indices
        ]

    def describe(self, index: int) -> str:
        """Its number."""
        return f"picture {index}"


def peak_mib(count: int) -> float:
    """Peak memory of evaluating so many small pictures with a small encoder, in this process."""
    config = {
        "model_type": "dinov2", "hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16,
        "image_size": 16,
    }  # fmt: skip
    encoder = repagen.VisionEncoder.from_config({"family": "dinov2", "config": config, "image_size": 16})
    protocol = encoder_protocol("tiny", metrics=["fd", "precision_recall"])
    protocol.precision_recall.num_samples = protocol.precision_recall.num_reference = 1000
    sides = LazyImages(count), LazyImages(1000)
    evaluate_generation(*sides, protocol, {"encoder": EncoderExtractor(encoder)})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_by_number() -> dict[str, float]:
    """Peak memory in MiB by the number of samples, each in a process of its own."""
    peaks = {}
    for count in (2_000, 20_000):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", str(count)], capture_output=True, text=True, check=True
        )
        peaks[str(count)] = round(float(done.stdout.splitlines()[-1]), 1)
    return peaks


def sampling_pipeline(device: torch.device) -> repagen.ClassToImagePipeline:
    """DiT^DH-XL in the 16 x 16 x 768 latents of an RAE with the ViT-XL decoder, random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {
        "model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "patch_size": 14, "image_size": 224, "num_register_tokens": 4,
    }  # fmt: skip
    encoder = repagen.VisionEncoder.from_config(
        {"family": "dinov2_with_registers", "config": config, "image_size": 224}
    )
    vae = repagen.RepresentationAutoencoder.from_encoder(encoder, decoder="vit-xl", image_size=256)
    transformer = repagen.DiTDHTransformer2DModel(sample_size=16, in_channels=768, num_classes=1000)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.93)
    return repagen.ClassToImagePipeline(transformer.eval(), vae.eval(), scheduler).to(device)


def sample_and_evaluate(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of sampling, and of evaluating the same images from memory; and whether images depend on their batch."""
    torch.set_float32_matmul_precision("high")  # TF32, as the published samplers
    weights = random_inception(folder / "inception.pth")
    pipeline = sampling_pipeline(device)
    source = PipelineImages(pipeline, args.sampling, num_inference_steps=50)
    source.load(range(32))
    samples: list[Any] = []
    sampling = seconds_of(lambda: samples.extend(source.load(range(args.sampling))), device)
    sevens = [image for start in range(0, 63, 7) for image in source.load(range(start, start + 7))]
    reference = TensorImages(random_images(args.sampling, 256, 3))
    extractors = {"inception": InceptionExtractor(weights, device)}
    protocol = whole_protocol(args.sampling)
    tensor = TensorImages(torch.stack(samples))
    evaluating = seconds_of(lambda: evaluate_generation(tensor, reference, protocol, extractors), device)
    return {
        "images": args.sampling,
        "num_inference_steps": 50,
        "sampling_s": round(sampling, 2),
        "evaluating_both_sides_s": round(evaluating, 2),
        "fid50k_sampling_min": round(sampling / args.sampling * 50_000 / 60, 1),
        "images_equal_in_batches_of_7": all(torch.equal(a, b) for a, b in zip(samples, sevens, strict=False)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="on each side")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--sampling", type=int, default=0, metavar="N", help="also sample so many images by an XL model"
    )
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if args.peak:
        print(peak_mib(args.peak))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        record: dict[str, Any] = {"versions": software_versions(), "threads": torch.get_num_threads()}
        record["torch_fidelity"] = compare_with_torch_fidelity(args, Path(name), device)
        record["peak_memory_mib"] = memory_by_number()
        if args.sampling:
            record["sampling"] = sample_and_evaluate(args, Path(name), device)
    text = json.dumps(record, indent=2)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
