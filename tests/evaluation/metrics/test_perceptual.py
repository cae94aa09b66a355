"""LPIPS: numbers of the `lpips` package, layout read from the file, weights refused that are not what they claim."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from lpips_parts import random_alex_lpips, random_lpips, write_lpips
from safetensors.torch import save_file

from repagen import UserError
from repagen.evaluation.metrics import perceptual
from repagen.evaluation.metrics.perceptual import PerceptualDistance

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
@pytest.mark.parametrize(
    ("backbone", "weights"),
    [("vgg", random_lpips(VGG16)), ("alex", random_alex_lpips((64, 192, 384, 256, 256)))],
    ids=["vgg", "alex"],
)
def test_equals_the_lpips_package_with_the_same_weights(backbone, weights):
    lpips = pytest.importorskip("lpips")
    trunk, heads = weights
    theirs = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
    slices = [theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5]
    for part in slices:  # their slices keep torchvision's indices as names
        part.load_state_dict({k.removeprefix("features."): v for k, v in trunk.items()}, strict=False)
    theirs.load_state_dict(heads, strict=False)
    a, b = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    ours = PerceptualDistance(trunk, heads, backbone)(a, b)
    expected = theirs(a, b, normalize=True).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_distance_is_zero_for_equal_images_symmetric_and_per_image():
    network = PerceptualDistance(*random_lpips())
    a, b = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    assert torch.equal(network(a, a), torch.zeros(3))
    torch.testing.assert_close(network(a, b), network(b, a))
    torch.testing.assert_close(network(a, b)[1:2], network(a[1:2], b[1:2]))


def test_dead_features_give_finite_gradients():
    trunk, heads = random_lpips()
    trunk["features.5.bias"] = trunk["features.5.bias"] - 1e3  # every ReLU of the last stage is off
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    PerceptualDistance(trunk, heads)(images, torch.rand(1, 3, 16, 16)).sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().max() > 0


def test_frozen_and_eval_for_good():
    network = PerceptualDistance(*random_lpips()).train()
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_from_files_records_hashes_and_does_not_import_lpips(tmp_path):
    trunk, heads = write_lpips(tmp_path)
    sys.modules.pop("lpips", None)
    network = PerceptualDistance.from_files(trunk, heads)
    assert "lpips" not in sys.modules
    assert sorted(network.files) == ["tiny_heads.pth", "tiny_vgg.pth"]
    assert all(len(digest) == 64 for digest in network.files.values())
    again = PerceptualDistance(*random_lpips())
    a, b = torch.rand(2, 1, 3, 16, 16)
    assert torch.equal(network(a, b), again(a, b))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("part", "key"), [("trunk", "features.2.weight"), ("trunk", "features.5.bias"), ("heads", "lin1.model.1.weight")]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_refused_by_their_tensor(tmp_path, value, part, key, suffix):
    states = dict(zip(("trunk", "heads"), random_lpips(), strict=True))
    states[part][key].view(-1)[1] = value
    for name, state in states.items():
        (save_file if suffix == ".safetensors" else torch.save)(state, tmp_path / f"{name}{suffix}")
    with pytest.raises(UserError, match=rf"LPIPS {part}: .*{part}{re.escape(f'{suffix}:{key}')} is not finite"):
        PerceptualDistance.from_files(tmp_path / f"trunk{suffix}", tmp_path / f"heads{suffix}")


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_packaged_heads_are_the_pinned_file(backbone):
    pytest.importorskip("lpips")
    path = perceptual._packaged_heads(backbone)
    assert perceptual._verified_sha256(path, "heads") == perceptual.PUBLISHED_SHA256[f"{backbone}.pth"]
    assert sorted(perceptual._read_tensors(path, "heads")) == [f"lin{k}.model.1.weight" for k in range(5)]


def test_missing_trunk_says_how_to_get_it_or_do_without(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth.*download.*lpips\.weight=0"):
        PerceptualDistance.from_files()


def test_published_name_with_other_content_is_refused(tmp_path):
    trunk, heads = write_lpips(tmp_path)
    impostor = trunk.rename(tmp_path / "vgg16-397923af.pth")
    with pytest.raises(UserError, match="sha256"):
        PerceptualDistance.from_files(impostor, heads)


class _Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def test_a_pickle_runs_no_code(tmp_path):
    _, heads = write_lpips(tmp_path)
    torch.save({"features.0.weight": _Payload(tmp_path / "marker")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth"):
        PerceptualDistance.from_files(tmp_path / "evil.pth", heads)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop("features.2.bias"), r"features\.2\.bias"),
        (lambda t, h: t.pop("features.2.weight"), r"features\.0 comes features\.5"),
        (lambda t, h: t.update({"features.0.weight": torch.ones(4)}), "batch norm"),
        (lambda t, h: h.pop("lin1.model.1.weight"), "needs the keys"),
        (lambda t, h: h.update({"lin1.model.1.weight": torch.ones(1, 5, 1, 1)}), r"needs \(1, 6, 1, 1\)"),
    ],
)
def test_other_layouts_are_refused_by_name(change, message):
    trunk, heads = random_lpips()
    change(trunk, heads)
    with pytest.raises(UserError, match=message):
        PerceptualDistance(trunk, heads)
