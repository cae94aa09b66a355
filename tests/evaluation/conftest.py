"""Small real parts for the tests of evaluation: an encoder with random weights, folders of random pictures."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from pipelines.tiny_pipelines import any_size_autoencoder, tiny_text_pipeline, tiny_text_transformer

import repagen
from repagen.encoders import VisionEncoder
from repagen.evaluation import EncoderExtractor

TINY_DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


@pytest.fixture(scope="session")
def encoder() -> VisionEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return VisionEncoder.from_config({"family": "dinov2", "config": TINY_DINOV2, "image_size": 16})


@pytest.fixture(scope="session")
def extractor(encoder: VisionEncoder) -> EncoderExtractor:
    return EncoderExtractor(encoder)


@pytest.fixture(scope="session")
def pipeline_folder(encoder: VisionEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of random weights: 10 classes, 16 px."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        decoder = {
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        }
        vae = repagen.RepresentationAutoencoder.from_encoder(encoder, decoder=decoder, image_size=16)
        transformer = repagen.SiTTransformer2DModel(
            sample_size=4, patch_size=1, in_channels=16, hidden_size=16, depth=2, num_heads=2, num_classes=10
        )
        for parameter in transformer.parameters():  # its zero-initialised head would make every picture the same
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = FlowMatchEulerDiscreteScheduler()
    repagen.ClassToImagePipeline(transformer.eval(), vae.eval(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(encoder: VisionEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in the layout of the published file: random, and such that features differ from image to image."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    with torch.random.fork_rng(), mock.patch.object(Network, "load_state_dict"):
        torch.manual_seed(0)
        network = Network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        for name, parameter in network.named_parameters():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(parameter)
        torch.nn.init.normal_(network.fc.weight, std=0.1)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def random_pictures() -> Callable[..., np.ndarray]:
    """Random pictures (count, size, size, 3) uint8 whose colour varies from one to the next."""

    def make(count: int, seed: int, size: int = 16) -> np.ndarray:
        generator = np.random.default_rng(seed)
        pictures = generator.normal(128, 40, (count, size, size, 3)) + generator.normal(0, 30, (count, 1, 1, 3))
        return pictures.clip(0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def write_pictures() -> Callable[[Path, np.ndarray], Path]:
    """Write pictures as 00000.png, 00001.png ... and return the folder."""

    def write(folder: Path, pictures: np.ndarray) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{number:05d}.png")
        return folder

    return write


@pytest.fixture
def online_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of a Hub that may be asked, and the certainty that it was not."""
    tried: list[Any] = []

    def record(*address: Any, **_: Any) -> None:
        tried.append(address)
        raise OSError("no network here")

    for module, name, value in (
        (huggingface_hub.constants, "HF_HUB_OFFLINE", False),
        (huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
        (socket, "getaddrinfo", record),
        (socket.socket, "connect", record),
    ):
        monkeypatch.setattr(module, name, value)
    yield tmp_path / "hub"
    assert not tried


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline that draws pictures of 32 px."""
    folder = tmp_path_factory.mktemp("text") / "pipeline"
    pipe = tiny_text_pipeline(transformer=tiny_text_transformer(sample_size=16), vae=any_size_autoencoder())
    pipe.save_pretrained(folder)
    return folder
