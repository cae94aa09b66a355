"""The latent cache: equal to encoding on the fly, byte-identical after a kill, and refused where it does not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from encoders.tiny_text_encoders import save_tiny
from PIL import Image

import repagen
from repagen.cli import main
from repagen.data import (
    CaptionConfig,
    DataConfig,
    ImageDataset,
    LatentShards,
    StreamBatchSampler,
    load_batches,
    open_dataset,
)
from repagen.encoders import VisionEncoder
from repagen.encoders.prompt_cache import CachedTextEncoder
from repagen.encoders.text import TextEncoder
from repagen.errors import UserError
from repagen.models.latents import images_to_latents
from repagen.training.latent_cache import CacheConfig, cache_latents, require_matching_cache

COUNT = 22
CONFIG = CacheConfig(batch_size=4, shard_rows=8)


def encoder_spec(width: int) -> dict[str, object]:
    return {
        "family": "dinov2_with_registers",
        "config": {
            "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2,
            "image_size": 16, "patch_size": 8, "num_register_tokens": 1,
        },
    }  # fmt: skip


@pytest.fixture
def encoder() -> VisionEncoder:
    torch.manual_seed(1)
    return VisionEncoder.from_config(encoder_spec(8))


@pytest.fixture
def autoencoder() -> repagen.RepresentationAutoencoder:
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    inner = VisionEncoder.from_config(encoder_spec(16))
    model = repagen.RepresentationAutoencoder.from_encoder(inner, decoder=decoder, image_size=16)
    model.set_statistics(torch.randn(16, 2, 2), torch.rand(16, 2, 2) + 0.5)
    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(noise):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "photos"


def opened(photos: Path, **options: object) -> ImageDataset:
    dataset = open_dataset(DataConfig(path=str(photos), image_size=16, **options))  # type: ignore[arg-type]
    assert isinstance(dataset, ImageDataset)
    return dataset


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}


def test_cached_samples_equal_encoding_on_the_fly(
    autoencoder: object, encoder: VisionEncoder, photos: Path, tmp_path: Path
) -> None:
    dataset = opened(photos)
    shards = cache_latents(autoencoder, dataset, tmp_path / "cache", encoders=[encoder], config=CONFIG)
    assert sorted(contents(tmp_path / "cache")) == [
        *(f"latents-0000{k}.safetensors" for k in range(3)),
        "manifest.json",
    ]
    assert len(shards) == COUNT and shards.class_names == ["a", "b"] and shards.latent_shape == (16, 2, 2)
    assert torch.equal(shards.labels, dataset.labels)
    for index in (0, 7, 8, 21):
        image, sample = dataset[index]["image"][None], shards[index]
        assert sample.keys() == {"latent", "label", "index", "targets"}
        assert (sample["label"], sample["index"]) == (dataset[index]["label"], index)
        torch.testing.assert_close(sample["latent"], images_to_latents(autoencoder, image)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sample["targets"][0], encoder(image).tokens[0], atol=1e-5, rtol=1e-5)
    assert "latents-00001.safetensors" in shards.describe(9) and "image 9" in shards.describe(9)


def test_mirrored_copies_are_drawn_by_the_generator(
    autoencoder: object, encoder: VisionEncoder, photos: Path, tmp_path: Path
) -> None:
    dataset = opened(photos)
    config = CacheConfig(batch_size=4, shard_rows=8, flips=True)
    shards = cache_latents(autoencoder, dataset, tmp_path / "cache", encoders=[encoder], config=config)
    mirrored = dataset[5]["image"].flip(-1)[None]
    latent, tokens = images_to_latents(autoencoder, mirrored)[0], encoder(mirrored).tokens[0]
    drawn = [shards.load(5, torch.Generator().manual_seed(seed)) for seed in range(100)]
    flipped = [sample for sample in drawn if torch.allclose(sample["latent"], latent, atol=1e-5)]
    plain = [sample for sample in drawn if torch.equal(sample["latent"], shards[5]["latent"])]
    assert len(flipped) + len(plain) == 100 and 30 < len(flipped) < 70
    torch.testing.assert_close(flipped[0]["targets"][0], tokens, atol=1e-5, rtol=1e-5)


def test_a_kl_autoencoder_keeps_mean_and_spread(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kl = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, scaling_factor=0.3, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    dataset = opened(photos)
    shards = cache_latents(kl, dataset, tmp_path / "cache", config=CONFIG)
    sample, images = shards[3], dataset[3]["image"][None]
    assert sample["targets"] == [] and sample["latent_std"].shape == (2, 8, 8)
    drawn = images_to_latents(kl, images, generator=torch.Generator().manual_seed(7))[0]
    noise = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(7))[0]
    torch.testing.assert_close(sample["latent"] + sample["latent_std"] * noise, drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shards_halve_the_size(autoencoder: object, photos: Path, tmp_path: Path, dtype: str) -> None:
    full = cache_latents(autoencoder, opened(photos), tmp_path / "full", config=CONFIG)
    config = CacheConfig(batch_size=4, shard_rows=8, dtype=dtype)  # type: ignore[arg-type]
    half = cache_latents(autoencoder, opened(photos), tmp_path / "half", config=config)
    assert half[2]["latent"].dtype == torch.float32
    torch.testing.assert_close(half[2]["latent"], full[2]["latent"], rtol=1e-2, atol=1e-2)
    sizes = [(tmp_path / name / "latents-00000.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.62 * sizes[0]


def test_bad_images_are_left_out_and_numbers_kept(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    for number in [*range(8), 9]:  # a whole shard and one more
        (photos / "ab"[number % 2] / f"{number:02d}.png").write_bytes(b"")
    dataset = opened(photos, max_bad_images=9)
    shards = cache_latents(autoencoder, dataset, tmp_path / "cache", config=CacheConfig(batch_size=4, shard_rows=4))
    good = [index for index in range(COUNT) if index not in dataset.bad_indices]
    assert len(good) == len(shards) == COUNT - 9
    assert torch.equal(shards.labels, dataset.labels[good])
    assert [int(shards.describe(i).split("image ")[1].split()[0]) for i in range(len(shards))] == good


def test_the_stream_reads_shards_with_and_without_workers(
    autoencoder: object, encoder: VisionEncoder, photos: Path, tmp_path: Path
) -> None:
    config = CacheConfig(batch_size=4, shard_rows=8, flips=True)
    cache_latents(autoencoder, opened(photos), tmp_path / "cache", encoders=[encoder], config=config)
    shards = open_dataset(DataConfig(kind="latents", path=str(tmp_path / "cache")))
    runs = []
    for workers in (0, 2):
        sampler = StreamBatchSampler(len(shards), 4, seed=0, num_steps=8)
        runs.append(list(load_batches(shards, sampler, 0, num_workers=workers)))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one["latent"], two["latent"]) and torch.equal(one["targets"][0], two["targets"][0])
        assert one["latent"].shape == (4, 16, 2, 2)


def test_the_same_call_again_changes_nothing(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache_latents(autoencoder, opened(photos), folder, config=CONFIG)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("latents*")}
    cache_latents(autoencoder, opened(photos), folder, config=CONFIG)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("latents*")} == before


@pytest.mark.parametrize("harm", ["remove", "truncate", "flip"])
def test_damage_is_named_on_opening_and_repaired_by_the_command(
    autoencoder: object, photos: Path, tmp_path: Path, harm: str
) -> None:
    folder = tmp_path / "cache"
    cache_latents(autoencoder, opened(photos), folder, config=CONFIG)
    whole, path = contents(folder), folder / "latents-00001.safetensors"
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        LatentShards(folder, verify=False)  # sizes alone do not show a flipped bit
    with pytest.raises(UserError, match=r"latents-00001\.safetensors"):
        LatentShards(folder)
    cache_latents(autoencoder, opened(photos), folder, config=CONFIG)
    assert contents(folder) == whole
    LatentShards(folder)


def test_other_models_are_refused_by_name(
    autoencoder: object, encoder: VisionEncoder, photos: Path, tmp_path: Path
) -> None:
    shards = cache_latents(autoencoder, opened(photos), tmp_path / "cache", encoders=[encoder], config=CONFIG)
    require_matching_cache(shards, autoencoder, [encoder])
    require_matching_cache(shards, autoencoder)  # a run that aligns with nothing needs no targets
    with pytest.raises(UserError, match="alignment target 0"):
        require_matching_cache(shards, autoencoder, [encoder.reading(norm_affine=False)])
    with pytest.raises(UserError, match="alignment target 1"):
        require_matching_cache(shards, autoencoder, [encoder, encoder])
    autoencoder.set_statistics(torch.zeros(16, 2, 2), torch.ones(16, 2, 2))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="another statistics"):
        require_matching_cache(shards, autoencoder, [encoder])
    torch.manual_seed(5)
    other = repagen.RepresentationAutoencoder.from_encoder(
        VisionEncoder.from_config(encoder_spec(16)), decoder="vit-b", image_size=16
    )
    with pytest.raises(UserError, match="another encoder"):
        require_matching_cache(shards, other)


def test_a_folder_of_another_cache_is_refused(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    cache_latents(autoencoder, opened(photos), tmp_path / "cache", config=CONFIG)
    autoencoder.set_statistics(None, None)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="another autoencoder"):
        cache_latents(autoencoder, opened(photos), tmp_path / "cache", config=CONFIG)
    with pytest.raises(UserError, match="not empty"):
        cache_latents(autoencoder, opened(photos), photos, config=CONFIG)
    assert sorted(path.name for path in photos.iterdir() if path.is_dir()) == ["a", "b"]


def test_manifests_that_lie_are_refused(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match="no latent cache"):
        LatentShards(tmp_path)
    cache_latents(autoencoder, opened(photos), folder, config=CONFIG)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace("latents-00000", "../latents-00000"))
    with pytest.raises(UserError, match="outside"):
        LatentShards(folder)
    (folder / "manifest.json").write_text(manifest[:50])
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        LatentShards(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        LatentShards(folder)


def command(autoencoder: object, photos: Path, tmp_path: Path, output: str) -> list[str]:
    if not (tmp_path / "ae").exists():
        autoencoder.save_pretrained(tmp_path / "ae")  # type: ignore[attr-defined]
    return [
        "cache", f"data.path={photos}", "data.image_size=16", "--autoencoder", str(tmp_path / "ae"),
        "--output", str(tmp_path / output), "--batch-size", "4", "--shard-rows", "2",
    ]  # fmt: skip


def test_command_caches_targets_of_named_encoders(
    autoencoder: object, encoder: VisionEncoder, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    encoder.save_pretrained(tmp_path / "enc")
    words = [*command(autoencoder, photos, tmp_path, "cache"), "--encoder", str(tmp_path / "enc")]
    monkeypatch.setattr(sys, "argv", ["repagen", *words])
    main()
    assert "22 latents 16x2x2 in 11 shards" in capsys.readouterr().out
    shards = LatentShards(tmp_path / "cache")
    assert shards[0]["targets"][0].shape == (4, 8)
    require_matching_cache(shards, repagen.RepresentationAutoencoder.from_pretrained(tmp_path / "ae"), [encoder])


def test_command_keeps_captions_and_their_embeddings(
    autoencoder: object, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Afterwards every caption is found without the text encoder, as the text encoder reads it."""
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        path.with_suffix(".txt").write_text(f"a red cube\nnumber {number}")
    text = save_tiny(tmp_path / "text", "qwen3")
    first, *others = command(autoencoder, photos, tmp_path, "cache")
    words = [first, "data.captions={}", *others, "--prompt-cache", str(tmp_path / "prompts"), "--text-encoder"]
    words += [str(text), "--max-length", "12", "--hidden-layer", "-2"]
    monkeypatch.setattr(sys, "argv", ["repagen", *words])
    main()
    assert capsys.readouterr().out.strip().endswith(f"text.cache={tmp_path / 'prompts'}")
    shards = LatentShards(tmp_path / "cache")
    texts = [text for index in range(COUNT) for text in shards.captions(index).texts]
    assert set(texts) == {"a red cube", *(f"number {number}" for number in range(COUNT))}
    encoder = TextEncoder.from_encoder(text, max_length=12, hidden_layer=-2)
    cached = CachedTextEncoder(tmp_path / "prompts")
    assert cached.cache.size()[0] == COUNT + 2  # and the empty one
    for one, other in zip(cached.encode(texts[:5]), encoder.encode(texts[:5]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text-encoder", "x"], "--text-encoder and --prompt-cache go together"),
        (["--text-encoder", "x", "--prompt-cache", "y"], "the images have no captions"),
        (
            ["data.captions.missing=empty", "--text-encoder", "no/where", "--prompt-cache", "y"],
            "--text-encoder: .*no/where",
        ),
    ],
)
def test_command_refuses_captions_it_cannot_encode(
    autoencoder: object, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    first, *others = command(autoencoder, photos, tmp_path, "cache")
    settings = [word for word in words if word.startswith("data.")]
    others += words[len(settings) :]
    monkeypatch.setattr(sys, "argv", ["repagen", "--debug", first, *settings, *others])
    with pytest.raises(UserError, match=message):
        main()


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_give_the_same_bytes(
    autoencoder: object, photos: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "repagen.cli", *command(autoencoder, photos, tmp_path, "whole")]
    killed = [sys.executable, "-m", "repagen.cli", *command(autoencoder, photos, tmp_path, "killed")]
    subprocess.run(whole, check=True, env=environment, capture_output=True, timeout=300)
    folder = tmp_path / "killed"
    for shards in (1, 4):
        process = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(folder.glob("latents-*.safetensors"))) < shards and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
    (folder / ".tmp-latents-00009.safetensors").write_bytes(b"torn")
    subprocess.run(killed, check=True, env=environment, capture_output=True, timeout=300)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, output in (([sys.executable], "one"), (torchrun, "two")):
        words = command(autoencoder, photos, tmp_path, output)
        subprocess.run(
            [*launcher, "-m", "repagen.cli", *words], check=True, env=environment, capture_output=True, timeout=300
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_cache_keeps_captions_and_several_sizes(tmp_path: Path) -> None:
    """Every cached latent is that of its own image with its own captions, whatever its size; and a batch has one."""
    torch.manual_seed(0)
    kl = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    folder = tmp_path / "photos"
    folder.mkdir()
    shapes = [(16, 16), (24, 16), (16, 24)]
    for number in range(11):
        width, height = shapes[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}\nanother blå {number}")
    config = DataConfig(
        path=str(folder), image_size=16, captions=CaptionConfig(), buckets=["1:1", "3:2", "2:3"], bucket_step=4,
        index_folder=str(tmp_path / "index"),
    )  # fmt: skip
    dataset = open_dataset(config)
    assert isinstance(dataset, ImageDataset)
    shards = cache_latents(kl, dataset, tmp_path / "cache", config=CacheConfig(batch_size=2, shard_rows=3))
    assert len(shards) == 11 and shards.bucket_sizes == [(8, 8), (6, 10), (10, 6)] and shards.has_captions
    assert shards.buckets is not None and shards.buckets.bincount().tolist() == [4, 4, 3]
    seen = []
    for row in range(11):
        source = int(shards.describe(row).split("image ")[1].split()[0])
        expected = images_to_latents(kl, dataset[source]["image"][None], sample_posterior=False)[0]
        torch.testing.assert_close(shards[row]["latent"], expected, atol=1e-5, rtol=1e-5)
        assert shards.captions(row) == dataset.captions(source) and shards[row]["caption"] == f"picture {source}"
        assert shards[row]["latent"].shape[1:] == shards.bucket_sizes[int(shards.buckets[row])]
        seen.append(source)
    assert sorted(seen) == list(range(11))
    sampler = StreamBatchSampler(11, 2, seed=0, num_steps=12, buckets=shards.buckets)
    assert {batch["latent"].shape[2:] for batch in load_batches(shards, sampler, 0)} == {(8, 8), (6, 10), (10, 6)}
    copy = open_dataset(DataConfig(kind="latents", path=str(tmp_path / "cache"), captions=CaptionConfig()))
    assert copy.captions(3) == shards.captions(3)


def test_several_sizes_of_representation_latents_and_of_targets(
    autoencoder: Any, encoder: VisionEncoder, tmp_path: Path
) -> None:
    """Latents and targets are those of the images, one size a shard."""
    sizes = [(16, 16), (16, 24), (24, 16)]
    (tmp_path / "photos").mkdir()
    for number in range(7):
        noise = np.random.default_rng(number).integers(0, 256, (*sizes[number % 3], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    words = {"buckets": [list(size) for size in sizes], "bucket_step": 8, "index_folder": str(tmp_path / "index")}
    dataset = opened(tmp_path / "photos", **words)
    shards = cache_latents(autoencoder, dataset, tmp_path / "cache", encoders=[encoder], config=CONFIG)
    assert shards.bucket_sizes == [(2, 2), (2, 3), (3, 2)]
    for row in range(len(shards)):
        source = int(shards.describe(row).split("image ")[1].split()[0])
        image, grid = dataset[source]["image"][None], shards.bucket_sizes[source % 3]
        sample = shards[row]
        assert sample["latent"].shape == (16, *grid)
        torch.testing.assert_close(sample["latent"], images_to_latents(autoencoder, image)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(sample["targets"][0], encoder(image, grid=grid).tokens[0], atol=1e-5, rtol=0)


def test_sizes_that_are_no_whole_tokens_are_refused(
    autoencoder: object, encoder: VisionEncoder, photos: Path, tmp_path: Path
) -> None:
    dataset = opened(photos, buckets=[[16, 18]], bucket_step=2, index_folder=str(tmp_path / "index"))
    with pytest.raises(UserError, match=r"data\.buckets: 16x18 px; allowed: multiples of the"):
        cache_latents(autoencoder, dataset, tmp_path / "cache", config=CONFIG)


def test_a_cache_without_captions_refuses_to_give_them(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    cache_latents(autoencoder, opened(photos), tmp_path / "cache", config=CONFIG)
    with pytest.raises(UserError, match=r"data\.captions: given, but data\.kind=latents"):
        open_dataset(DataConfig(kind="latents", path=str(tmp_path / "cache"), captions=CaptionConfig()))
