"""What is read of a generator and an encoder, against passes written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repagen.data import DataConfig, ImageDataset, open_image_dataset
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation.representation.harvest import harvest_encoder, harvest_generator
from repagen.evaluation.representation.sources import FeatureSlice, GeneratorSource
from repagen.randomness import generator_for

FLOWS = ["sit", "lightningdit", "ditdh", "raev2", "ddt", "elt"]


def by_hand(pipeline: Any, dataset: ImageDataset, index: int, block: int, t: float, label: int) -> torch.Tensor:
    """Everything that a block put out for one image (L, D), all passes of a loop but the last forgotten."""
    image = dataset.load(index)["image"][None]
    latent = pipeline.vae.encode(image).latent
    noise = torch.randn(latent.shape[1:], generator=generator_for(0, "representation noise", index, 0))
    if isinstance(t, int):
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
        noisy, time = latent * kept.sqrt() + noise * (1 - kept).sqrt(), torch.tensor([t])
    else:
        noisy, time = latent * (1 - t) + noise * t, torch.tensor([t])
    seen: list[torch.Tensor] = []
    handle = pipeline.transformer.blocks[block - 1].register_forward_hook(lambda *parts: seen.append(parts[2]))
    with torch.no_grad():
        pipeline.transformer(noisy.float(), time, class_labels=torch.tensor([label]))
    handle.remove()
    return seen[-1][0]


@pytest.mark.parametrize("kind", FLOWS)
def test_a_block_is_read_on_the_straight_path_under_the_null_label(
    kind: str, make_pipeline: Callable[..., Any], digits: ImageDataset
) -> None:
    pipeline = make_pipeline(kind)
    harvest = harvest_generator(pipeline, digits, blocks=[3, 1], timesteps=[0.0, 0.7], indices=[4, 9], batch_size=2)
    assert harvest.slices == tuple(FeatureSlice(block, t) for t in (0.0, 0.7) for block in (1, 3))
    for place in harvest.slices:
        assert place.timestep is not None
        tokens = harvest.tokens(place)
        assert tokens.shape == (2, 16, 16) and harvest.grid == (4, 4)
        for row, index in enumerate((4, 9)):
            expected = by_hand(pipeline, digits, index, place.block, place.timestep, label=10)
            assert len(expected) >= 16
            torch.testing.assert_close(tokens[row], expected[:16], rtol=1e-4, atol=1e-4)


def test_tokens_of_time_and_class_are_left_out(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    assert len(by_hand(make_pipeline("raev2"), digits, 0, 1, 0.5, label=10)) > 16


@pytest.mark.parametrize(("t", "step"), [(0.0, 0), (0.3, 300), (1.0, 999)])
def test_a_ddpm_is_read_at_its_own_integer_steps(
    t: float, step: int, make_pipeline: Callable[..., Any], digits: ImageDataset
) -> None:
    pipeline = make_pipeline("dit")
    harvest = harvest_generator(pipeline, digits, blocks=[2], timesteps=[t], indices=[3])
    expected = by_hand(pipeline, digits, 3, 2, step, label=10)
    torch.testing.assert_close(harvest.tokens(harvest.slices[0])[0], expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_counts_time_backwards_is_told_so(
    make_pipeline: Callable[..., Any], digits: ImageDataset
) -> None:
    pipeline = make_pipeline("sit", time_direction="data_at_one")
    seen: list[torch.Tensor] = []
    pipeline.transformer.time_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    harvest_generator(pipeline, digits, timesteps=[0.2], indices=[0])
    torch.testing.assert_close(seen[0], torch.tensor([0.8]))


def test_features_depend_on_seed_and_image_alone(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    pipeline = make_pipeline()
    place = FeatureSlice(2, 0.5)

    def tokens(**options: Any) -> torch.Tensor:
        return harvest_generator(pipeline, digits, blocks=[2], **options).tokens(place)

    all_at_once = tokens(indices=range(10), batch_size=10)
    torch.testing.assert_close(all_at_once[[7, 2]], tokens(indices=[7, 2], batch_size=1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(all_at_once, tokens(indices=range(10), seed=1), atol=0.1)
    assert not torch.allclose(all_at_once, tokens(indices=range(10), draw=1), atol=0.1)


def test_the_null_label_tells_nothing(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    source = GeneratorSource(make_pipeline(), blocks=[3])
    told = GeneratorSource(make_pipeline(), blocks=[3], null_label=False)
    image = digits.load(0)["image"][None]

    def tokens(source: GeneratorSource, label: int) -> torch.Tensor:
        return source.tokens(source.slices, image, torch.tensor([label]), [0])[0]

    assert torch.equal(tokens(source, 1), tokens(source, 2)) and source.label == "null"
    assert not torch.allclose(tokens(told, 1), tokens(told, 2)) and told.label == "own"


def test_an_unconditional_model_is_given_no_label(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    source = GeneratorSource(make_pipeline(num_classes=0))
    assert source.label == "none"
    assert source.tokens(source.slices, digits.load(0)["image"][None], torch.tensor([1]), [0])[0].shape == (1, 16, 16)


def test_no_hook_is_left(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    pipeline = make_pipeline()
    harvest_generator(pipeline, digits, indices=[0])
    assert not any(block._forward_hooks for block in pipeline.transformer.blocks)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"blocks": [0]}, "^blocks: 0: the model has blocks 1 to 3"),
        ({}, {"blocks": [2, 4]}, "^blocks: 4: the model has blocks 1 to 3"),
        ({}, {"blocks": [2, 2]}, "^blocks: 2 2: give different blocks"),
        ({}, {"timesteps": [0.5, 1.5]}, r"^timesteps: 0.5 1.5: give different times in \[0, 1\]"),
        ({}, {"timesteps": [float("nan")]}, "^timesteps: nan"),
        ({"class_dropout_prob": 0.0}, {}, "^pipeline: it has no null label"),
        ({"class_token_dim": 8}, {}, "^pipeline: .* class token"),
    ],
)
def test_what_cannot_be_read_is_refused(
    config: dict[str, Any], options: dict[str, Any], message: str, make_pipeline: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=message):
        GeneratorSource(make_pipeline(**config), **options)


def test_images_of_another_size_are_refused(make_pipeline: Callable[..., Any]) -> None:
    pipeline = make_pipeline("ddt", sample_size=2)
    images = open_image_dataset(DataConfig(kind="digits", image_size=16))
    with pytest.raises(UserError, match=r"^data\.image_size: .*; set it to"):
        harvest_generator(pipeline, images, indices=[0])


def test_an_encoder_is_read_layer_by_layer(encoder: VisionEncoder, digits: ImageDataset) -> None:
    harvest = harvest_encoder(encoder, digits, indices=range(5), batch_size=3)
    assert harvest.slices == (FeatureSlice(0), FeatureSlice(1))
    images = torch.stack([digits.load(index)["image"] for index in range(5)])
    for place in harvest.slices:
        expected = encoder.reading(layers=place.block)(images).tokens
        torch.testing.assert_close(harvest.tokens(place), expected)
        torch.testing.assert_close(harvest.pooled(place), expected.mean(1))
    assert harvest.labels.tolist() == [digits.load(index)["label"] for index in range(5)]
    for layers, message in ([2], "2: the encoder has layers 0 to 1, or -2 to -1"), ([0, -2], "0 -2: give different"):
        with pytest.raises(UserError, match=f"^layers: {message}"):
            harvest_encoder(encoder, digits, layers=layers)


def test_layers_may_be_counted_from_the_end(encoder: VisionEncoder, digits: ImageDataset) -> None:
    assert harvest_encoder(encoder, digits, layers=[-1, -2], indices=[0]).slices == (FeatureSlice(0), FeatureSlice(1))


def test_parts_in_training_mode_are_read_in_eval_mode(
    make_pipeline: Callable[..., Any], digits: ImageDataset, tmp_path: Path
) -> None:
    """RAE noises latents in training mode; the cache would keep them as if it had not."""
    pipeline = make_pipeline()
    pipeline.vae = copy.deepcopy(pipeline.vae)
    pipeline.vae.register_to_config(noise_tau=0.8)
    expected = harvest_generator(pipeline, digits, indices=range(3))
    image = digits.load(0)["image"][None]
    pipeline.vae.train()
    pipeline.transformer.train()
    assert not torch.equal(pipeline.vae.encode(image).latent, pipeline.vae.encode(image).latent)
    modes = [module.training for module in (*pipeline.vae.modules(), *pipeline.transformer.modules())]
    found = harvest_generator(pipeline, digits, indices=range(3), cache=tmp_path)
    assert all(torch.equal(found.tokens(place), expected.tokens(place)) for place in found.slices)
    assert modes == [module.training for module in (*pipeline.vae.modules(), *pipeline.transformer.modules())]


def test_a_model_that_gives_no_numbers_is_named(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    pipeline = make_pipeline()
    pipeline.transformer.blocks[1].attn.to_q.weight.data[0] = float("nan")
    message = (
        r"^the generator: its features of block 2, t=0.5, computed in float32, are not finite; check its weights$"
    )
    with pytest.raises(UserError, match=message):
        harvest_generator(pipeline, digits, indices=[0])
