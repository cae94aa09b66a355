"""The bundled digits and their encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from repagen.data import (
    DataConfig,
    data_config_from_words,
    digits_encoder_path,
    digits_to_images,
    load_digits,
    open_dataset,
)
from repagen.encoders import VisionEncoder
from repagen.errors import UserError


def test_digits_are_scikit_learns_in_8_bits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    images, labels = load_digits()
    assert np.array_equal(images, np.rint(original.images * 255 / 16).astype(np.uint8))
    assert np.array_equal(labels, original.target)


def test_the_split_is_fixed_disjoint_and_balanced() -> None:
    (images, labels), (train, train_labels), (validation, validation_labels) = map(
        load_digits, ("all", "train", "validation")
    )
    assert (len(train), len(validation)) == (1442, 355)
    for digit in range(10):
        of_digit = images[labels == digit]
        assert np.array_equal(validation[validation_labels == digit], of_digit[4::5])
        assert np.array_equal(train[train_labels == digit], np.delete(of_digit, np.s_[4::5], axis=0))


def test_images_are_replicated_bright_on_black() -> None:
    digits, _ = load_digits()
    images = digits_to_images(digits)
    assert images.shape == (1797, 3, 32, 32) and images.min() == 0 and images.max() == 1
    assert torch.equal(images[:, 0, 1::4, 2::4], torch.from_numpy(digits) / 255)
    assert torch.equal(images[:, 0], images[:, 2])
    assert (images[:, :, :, :4].mean() < 0.05) and images.mean() < 0.5


def test_the_dataset_gives_the_same_images() -> None:
    dataset = open_dataset(DataConfig(kind="digits", image_size=24, subset="validation"))
    digits, labels = load_digits("validation")
    assert len(dataset) == 355 and dataset.class_names == [str(digit) for digit in range(10)]
    assert torch.equal(dataset[17]["image"], digits_to_images(digits[17:18], 24)[0])
    assert dataset[17]["label"] == labels[17]


def test_words_become_a_config() -> None:
    config = data_config_from_words(["data.kind=digits", "data.image_size=32", "subset=train"][:2])
    assert config == DataConfig(kind="digits", image_size=32)


@pytest.mark.parametrize(
    "words",
    [
        ["data.kind"], ["kind=digits", "data.color=red"], ["data.kind=magic"], ["data.image_size=big"],
        ["data.path=${oc.env:HOME}"], ["data.path=a", "data.path=b"], ["other.path=a"], ["data.kind=folder"],
    ],
)  # fmt: skip
def test_wrong_words_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        data_config_from_words(words)


def test_the_encoder_is_small_and_knows_the_digits() -> None:
    folder = digits_encoder_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1_000_000
    assert json.loads((folder / "config.json").read_text())["model_type"] == "dinov2_with_registers"
    encoder = VisionEncoder.from_pretrained(folder, norm_affine=False)
    tokens = {}
    for subset in ("train", "validation"):
        output = encoder(digits_to_images(load_digits(subset)[0]))
        assert output.grid == (4, 4)
        tokens[subset] = output.tokens.mean(1).double()
    # Nearest class mean, fitted on the training split: weaker than the linear probe its README records.
    labels = torch.from_numpy(load_digits("train")[1])
    means = torch.stack([tokens["train"][labels == digit].mean(0) for digit in range(10)])
    guesses = torch.cdist(tokens["validation"], means).argmin(1).numpy()
    assert (guesses == load_digits("validation")[1]).mean() >= 0.97
