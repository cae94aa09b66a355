from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.errors import UserError
from repagen.evaluation import InceptionExtractor
from repagen.evaluation.inception import INCEPTION_FILE, is_published_inception
from repagen.files import file_digest


def test_features_are_torch_fidelitys(inception_file: Path) -> None:
    from torch_fidelity.utils import create_feature_extractor

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    layers = ["2048", "logits_unbiased"]
    theirs = create_feature_extractor(
        "inception-v3-compat", layers, cuda=False, feature_extractor_weights_path=str(inception_file), verbose=False
    )
    spatial: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    ours = InceptionExtractor(inception_file)
    features = ours(images)
    assert {name: rows.shape[1] for name, rows in features.items()} == ours.dimensions
    assert ours.dimensions == {"pool": 2048, "spatial": 2023, "logits": 1008}
    pool, logits = theirs(images)
    assert features["pool"].std() > 1e-3  # the random weights are alive
    assert torch.equal(features["pool"], pool) and torch.equal(features["logits"], logits)
    # ADM flattens (height, width, channel): the channel runs fastest.
    [branch] = spatial
    assert branch.shape[2:] == (17, 17)
    for row, column, channel in ((0, 0, 6), (0, 1, 0), (16, 16, 6), (3, 5, 2)):
        place = (row * 17 + column) * 7 + channel
        assert torch.equal(features["spatial"][:, place], branch[:, channel, row, column])


def test_clean_fids_kernel_is_pillows_on_each_channel_in_floating_point(inception_file: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    resized = [
        np.asarray(
            Image.fromarray(image[..., channel].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        )
        for channel in range(3)
    ]
    clean = InceptionExtractor(inception_file, kernel="pillow-bicubic-float")
    usual = InceptionExtractor(inception_file)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    network = clean.network
    state = (torch.from_numpy(np.stack(resized))[None] - 128) / 128
    for name, module in network.named_children():
        if name != "fc":
            state = module(state)
    assert torch.allclose(clean(batch)["pool"], state.flatten(1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(usual(batch)["pool"], state.flatten(1), rtol=1e-2)
    assert not clean.identity.matches(usual.identity)


def test_the_identity_is_the_files_hash(inception_file: Path) -> None:
    identity = InceptionExtractor(inception_file).identity
    assert identity.weights_sha256 == file_digest(inception_file)["sha256"]
    assert not is_published_inception(identity)


def test_weights_in_the_cache_must_be_the_published_ones(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"Inception weights not found: .*6726825d\.pth; get them with `repagen download inception"
    ):
        InceptionExtractor()
    cached = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_file)
    with pytest.raises(UserError, match="the published weights begin with 6726825d"):
        InceptionExtractor()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": 1}, r"the tensor Conv2d_1a_3x3\.conv\.weight is missing"),
        ([torch.zeros(2)], "dict-like"),
        ({1: torch.zeros(2)}, ""),
    ],
)
def test_weights_of_something_else_are_refused(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=rf"foreign\.pth: not the weights of torch-fidelity's .*{reason}") as caught:
        InceptionExtractor(tmp_path / "foreign.pth")
    assert "\n" not in str(caught.value)


def test_a_tensor_of_another_shape_is_named(inception_file: Path, tmp_path: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    torch.save({**state, "fc.weight": torch.zeros(10, 2048)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"foreign\.pth: not the weights .*size mismatch for fc\.weight"):
        InceptionExtractor(tmp_path / "foreign.pth")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        InceptionExtractor(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
