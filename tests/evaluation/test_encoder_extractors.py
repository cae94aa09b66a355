from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation import EncoderExtractor, ExtractorRule, open_extractor
from repagen.evaluation.extractor import full_float32, in_fixed_batches


def features_of(extractor: object, images: torch.Tensor) -> torch.Tensor:
    return extractor(images)["features"]  # type: ignore[operator]


def test_pooling_is_the_mean_of_patch_tokens_or_the_class_token(encoder: VisionEncoder) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = encoder(images.float() / 255)
    assert torch.equal(features_of(EncoderExtractor(encoder), images), expected.tokens.mean(dim=1))
    assert torch.equal(features_of(EncoderExtractor(encoder, "cls"), images), expected.cls)


def test_large_images_are_resized_with_antialiasing(encoder: VisionEncoder) -> None:
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    small = F.interpolate(images.float(), (16, 16), mode="bicubic", antialias=True) / 255
    assert torch.equal(features_of(EncoderExtractor(encoder), images), encoder(small).tokens.mean(dim=1))


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


def test_a_rule_opens_an_encoder_folder(encoder: VisionEncoder, encoder_folder: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    opened = open_extractor(ExtractorRule("encoder", str(encoder_folder)))
    assert opened.dimensions == {"features": 16}
    assert torch.allclose(features_of(opened, images), features_of(EncoderExtractor(encoder), images), atol=1e-6)
    with pytest.raises(UserError, match="only for inception-v3-compat"):
        open_extractor(ExtractorRule("encoder", str(encoder_folder)), weights="weights.pth")


def test_bfloat16_runs_under_autocast_and_is_another_extractor(encoder: VisionEncoder) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    exact, coarse = EncoderExtractor(encoder), EncoderExtractor(encoder, precision="bfloat16")
    difference = (features_of(exact, images) - features_of(coarse, images)).abs().max()
    assert 0 < difference < 0.2
    assert not exact.identity.matches(coarse.identity)


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


def test_networks_see_one_shape_whatever_the_number_of_images() -> None:
    shapes = []

    def network(images: torch.Tensor) -> dict[str, torch.Tensor]:
        shapes.append(tuple(images.shape))
        return {"sum": images.float().flatten(1).sum(dim=1, keepdim=True)}

    images = torch.randint(0, 256, (11, 3, 4, 4), dtype=torch.uint8)
    features = in_fixed_batches(network, images, 4)["sum"]
    assert shapes == [(4, 3, 4, 4)] * 3
    assert torch.equal(features, images.float().flatten(1).sum(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("architecture", "pooling", "size_px"),
    [("test_vit", "cls", 160), ("test_vit", "mean", 96), ("test_convnext", "mean", 64), ("test_vit2", "mean", None)],
)
def test_any_model_of_timm_is_pooled(tmp_path: Path, architecture: str, pooling: Any, size_px: int | None) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=7)
    save_for_hf(model, tmp_path, model_args={})
    extractor = open_extractor(ExtractorRule("timm", str(tmp_path), size_px=size_px, pooling=pooling))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    config = model.pretrained_cfg
    side = size_px or config["input_size"][-1]
    pixels = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    sized = {"img_size": side} if size_px and architecture == "test_vit" else {}
    same = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, **sized).eval()
    with torch.no_grad():
        tokens = same.forward_features((pixels - mean) / std)
    if tokens.ndim == 4:
        expected = tokens.mean(dim=(2, 3))
    else:
        expected = tokens[:, 0] if pooling == "cls" else tokens[:, same.num_prefix_tokens :].mean(dim=1)
    assert torch.allclose(features_of(extractor, images), expected, atol=1e-5)
    assert f"size={side}" in extractor.identity.settings and "port=timm" in extractor.identity.settings
    with pytest.raises(UserError, match="square images"):
        extractor(torch.zeros(1, 3, 16, 20, dtype=torch.uint8))


def save_clip(folder: Path) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(folder)
    return model, processor


def test_clip_embeddings_are_projected_and_of_length_one(tmp_path: Path) -> None:
    model, processor = save_clip(tmp_path)
    extractor = open_extractor(ExtractorRule("clip", str(tmp_path), kernel="pillow-bicubic"))
    images = torch.randint(0, 256, (2, 3, 50, 50), dtype=torch.uint8)
    pixels = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = F.normalize(model(pixels).image_embeds, dim=1)
    features = features_of(extractor, images)
    assert features.shape == (2, 12)
    assert torch.allclose(features, expected, atol=2e-3)  # transformers' torch backend resizes a little differently


COMMIT = "0123456789" * 4
MISSING = {"clip": "org/nowhere", "timm": "vit_large_patch16_224.mae", "encoder": "org/nowhere"}


def put_in_cache(cache: Path, repo_id: str, files: Path) -> None:
    """As huggingface_hub does it."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(files, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_model_is_one_line_and_not_looked_up(online_cache: Path, kind: Any) -> None:
    repo_id = MISSING[kind] if kind != "timm" else f"timm/{MISSING[kind]}"
    with pytest.raises(UserError, match=f"not in the local cache; fetch it once with `hf download {repo_id}`"):
        open_extractor(ExtractorRule(kind, MISSING[kind]))
    empty = online_cache.parent / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "dinov2"}')
    put_in_cache(online_cache, repo_id, empty)
    with pytest.raises(UserError, match=rf"no model\.safetensors .*; fetch it with `hf download {repo_id}`$"):
        open_extractor(ExtractorRule(kind, MISSING[kind]))


def test_cached_models_are_opened_without_the_network(
    online_cache: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    save_clip(tmp_path / "clip")
    timm_folder = tmp_path / "timm"
    save_for_hf(timm.create_model("test_vit.r160_in1k"), timm_folder, model_args={})
    (timm_folder / "config.json").unlink()  # timm fetches the weights alone
    for kind, model, repo_id, files in (
        ("encoder", "org/encoder", "org/encoder", encoder_folder),
        ("clip", "org/clip", "org/clip", tmp_path / "clip"),
        ("timm", "test_vit.r160_in1k", "timm/test_vit.r160_in1k", timm_folder),
    ):
        put_in_cache(online_cache, repo_id, files)
        cached = open_extractor(ExtractorRule(kind, model))  # type: ignore[arg-type]
        if kind == "timm":
            save_for_hf(cached.network.model, files, model_args={})  # type: ignore[attr-defined]
        local = open_extractor(ExtractorRule(kind, str(files)))  # type: ignore[arg-type]
        assert torch.equal(features_of(cached, images), features_of(local, images))
