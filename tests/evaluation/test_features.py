from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from repagen.evaluation.features import INCEPTION_FILE, full_float32, is_published_inception

from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation import EncoderExtractor, InceptionExtractor, open_extractor


def test_pooling_is_the_mean_of_patch_tokens_or_the_class_token(encoder: VisionEncoder) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = encoder(images.float() / 255)
    assert torch.equal(EncoderExtractor(encoder)(images), expected.tokens.mean(dim=1))
    assert torch.equal(EncoderExtractor(encoder, "cls")(images), expected.cls)


def test_large_images_are_resized_with_antialiasing(encoder: VisionEncoder) -> None:
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    small = F.interpolate(images.float() / 255, (16, 16), mode="bicubic", antialias=True)
    assert torch.equal(EncoderExtractor(encoder)(images), encoder(small).tokens.mean(dim=1))


def test_images_that_are_not_square_are_refused(extractor: EncoderExtractor) -> None:
    with pytest.raises(UserError, match="square images, got 16 x 20 px"):
        extractor(torch.zeros(1, 3, 16, 20, dtype=torch.uint8))


def test_the_identity_tells_weights_and_pooling_apart(encoder: VisionEncoder) -> None:
    mean, cls = EncoderExtractor(encoder).identity, EncoderExtractor(encoder, "cls").identity
    other = VisionEncoder.from_config(encoder.spec())
    assert mean.matches(EncoderExtractor(encoder).identity)
    assert not mean.matches(cls)
    assert not mean.matches(EncoderExtractor(other).identity)
    assert mean.weights_sha256 in (encoder.fingerprint(),) and mean.weights_sha256[:12] in str(mean)


def test_an_encoder_folder_is_opened(encoder: VisionEncoder, encoder_folder: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    opened = open_extractor(str(encoder_folder))
    assert opened.dimension == 16
    assert torch.allclose(opened(images), EncoderExtractor(encoder)(images), atol=1e-6)
    with pytest.raises(UserError, match="only for inception"):
        open_extractor(str(encoder_folder), weights="weights.pth")


def test_full_float32_switches_tf32_and_autocast_off_and_back() -> None:
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights in the layout of the published file."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network_class = module.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with torch.random.fork_rng(), mock.patch.object(network_class, "load_state_dict"):
        torch.manual_seed(0)
        torch.save({}, path)
        network = network_class("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    yield path
    path.unlink()


def test_inception_features_are_torch_fidelitys(inception_file: Path) -> None:
    from torch_fidelity.utils import create_feature_extractor

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours = open_extractor("inception", weights=inception_file)
    theirs = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(inception_file), verbose=False
    )
    features = ours(images)
    assert features.shape == (2, ours.dimension) == (2, 2048)
    assert torch.equal(features, theirs(images)[0])
    assert ours.identity.weights_sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert not is_published_inception(ours.identity)


def test_weights_in_the_cache_must_be_the_published_ones(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"Inception weights not found: .*6726825d\.pth; download https://"):
        InceptionExtractor()
    cached = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_file)
    with pytest.raises(UserError, match="the published weights begin with 6726825d"):
        InceptionExtractor()


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        InceptionExtractor(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
