"""The pass over originals and reconstructions: against the same done by hand, and everything it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lpips_parts import random_alex_lpips, random_lpips

from repagen import PixelAutoencoder, frechet_distance
from repagen.errors import UserError
from repagen.evaluation import EncoderExtractor, FolderImages, NpzImages, TensorImages, save_statistics
from repagen.evaluation.metrics.perceptual import PerceptualDistance
from repagen.evaluation.moments import FeatureMoments
from repagen.evaluation.reconstruction import evaluate
from repagen.evaluation.reconstruction.evaluate import evaluate_reconstruction
from repagen.evaluation.reconstruction.pixel_metrics import peak_signal_to_noise_ratio, structural_similarity
from repagen.evaluation.reference import load_statistics
from repagen.models.fingerprint import autoencoder_sha256

ALL = ("psnr", "ssim", "lpips", "rfid")


@pytest.fixture
def perceptual() -> PerceptualDistance:
    return PerceptualDistance(*random_lpips())


def rounded(images: torch.Tensor) -> torch.Tensor:
    return (images.clamp(0, 1) * 255).round()


def test_it_is_what_the_definitions_give(
    rae: Any, digits: Any, extractor: EncoderExtractor, perceptual: PerceptualDistance
) -> None:
    result = evaluate_reconstruction(
        rae, digits, metrics=ALL, extractor=extractor, perceptual=perceptual, batch_size=64
    )
    originals = torch.stack(digits.load(range(len(digits)))).float()
    with torch.no_grad():
        reconstructions = rounded(rae.decode(rae.encode(originals / 255).latent).sample)
        pair = originals / 255, reconstructions / 255
        columns = {
            "psnr": peak_signal_to_noise_ratio(*pair),
            "ssim": structural_similarity(*pair),
            "lpips": perceptual(*pair),
        }
    features = [extractor(side.to(torch.uint8))["features"] for side in (originals, reconstructions)]
    assert result.num_samples == len(result.per_image) == len(digits) == 355
    for metric, values in columns.items():
        assert result.metrics[metric] == pytest.approx(values.mean().item(), rel=1e-4)
        assert result.spread[metric].std == pytest.approx(values.std().item(), rel=1e-3)
        assert result.spread[metric].standard_error == pytest.approx(values.std().item() / 355**0.5, rel=1e-3)
        one_by_one = torch.tensor([image.values[metric] for image in result.per_image])
        torch.testing.assert_close(one_by_one, values, atol=2e-3, rtol=1e-3)
    assert result.metrics["rfid"] == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert result.metrics["rfid"] > 0.1 and result.metrics["psnr"] < 30


def test_rounding_is_by_the_nearest_level() -> None:
    """Off by 0.4 levels an autoencoder is perfect after rounding, off by 0.6 it is one level off everywhere."""

    class Shifted(PixelAutoencoder):
        shift = 0.0

        def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
            return (super().decode(latents, return_dict=False)[0] * (253 / 255) + self.shift / 255,)

    model = Shifted(image_size=32)
    pictures = torch.full((3, 3, 32, 32), 0, dtype=torch.uint8)
    source = TensorImages(pictures)
    for shift, expected in ((0.4, 100.0), (0.6, 20 * np.log10(255))):
        model.shift = shift
        result = evaluate_reconstruction(model, source, metrics=["psnr"])
        assert result.metrics["psnr"] == pytest.approx(expected, abs=1e-3)
        assert result.spread["psnr"].std == pytest.approx(0, abs=1e-4)


def test_an_autoencoder_that_gives_back_its_input_is_perfect(
    identity: Any, digits: Any, extractor: EncoderExtractor, perceptual: PerceptualDistance
) -> None:
    result = evaluate_reconstruction(identity, digits, metrics=ALL, extractor=extractor, perceptual=perceptual)
    assert result.metrics == {"psnr": 100.0, "ssim": 1.0, "lpips": 0.0, "rfid": pytest.approx(0, abs=1e-9)}
    assert result.samples["pixels_sha256"] == result.reference["pixels_sha256"]


def test_rfid_tells_a_perfect_autoencoder_from_other_images_of_the_same_kind(
    identity: Any, digits: Any, extractor: EncoderExtractor
) -> None:
    """What an npz of training statistics would measure: real against real, and not zero."""
    images = torch.stack(digits.load(range(len(digits))))
    halves = [extractor(images[start::2])["features"] for start in (0, 1)]
    result = evaluate_reconstruction(identity, digits, metrics=["rfid"], extractor=extractor)
    assert result.metrics["rfid"] < 1e-9 < 1e-4 < frechet_distance(*halves)
    assert result.per_image == () and result.spread == {}


def test_a_kl_autoencoder_is_read_by_its_mode(kl: Any, digits: Any) -> None:
    results = [evaluate_reconstruction(kl, digits, metrics=["psnr"], num_images=20) for _ in range(2)]
    assert results[0].samples["pixels_sha256"] == results[1].samples["pixels_sha256"]
    assert results[0].samples["latents"] == "mode of the posterior"
    index = results[0].per_image[3].index
    original = digits.load([index])[0][None].float() / 255
    with torch.no_grad():
        decoded = kl.decode(kl.encode(original * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    expected = peak_signal_to_noise_ratio(original, rounded(decoded) / 255).item()
    assert results[0].per_image[3].values["psnr"] == pytest.approx(expected, abs=2e-3)


def test_no_noise_is_added_even_to_a_model_in_training_mode(rae: Any, digits: Any) -> None:
    hashes = set()
    for mode in (False, True):
        rae.train(mode)
        hashes.add(evaluate_reconstruction(rae, digits, metrics=["psnr"], num_images=9).samples["pixels_sha256"])
        assert not rae.training
    assert len(hashes) == 1


def test_some_images_are_drawn_by_the_seed(identity: Any, digits: Any) -> None:
    drawn = [
        evaluate_reconstruction(identity, digits, metrics=["psnr"], num_images=30, seed=seed) for seed in (0, 0, 1)
    ]
    indices = [[image.index for image in result.per_image] for result in drawn]
    assert indices[0] == indices[1] == sorted(set(indices[0])) != indices[2]
    assert max(indices[0]) > 200  # not the first ones
    assert drawn[0].reference["drawn"] == "30 of 355, seed 0"


def test_no_figure_depends_on_the_batch_size(
    rae: Any, digits: Any, extractor: EncoderExtractor, perceptual: PerceptualDistance
) -> None:
    networks = {"metrics": ALL, "extractor": extractor, "perceptual": perceptual, "num_images": 70}
    one, other = (evaluate_reconstruction(rae, digits, batch_size=size, **networks) for size in (7, 64))
    assert one.per_image == other.per_image and one.samples == other.samples
    assert one.metrics["rfid"] == pytest.approx(other.metrics["rfid"], rel=1e-9)


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_several_processes_are_joined_to_the_moments_of_one(
    rae: Any, digits: Any, extractor: EncoderExtractor, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    task = evaluate._Task(rae, digits, {"psnr": peak_signal_to_noise_ratio}, extractor, 32)
    one = evaluate._run_share(task, range(100), 7, 0)
    shares = []
    for index in range(processes):
        state = SimpleNamespace(
            process_index=index, num_processes=processes, is_main_process=False, device=torch.device("cpu")
        )
        monkeypatch.setattr(evaluate, "PartialState", lambda state=state: state)
        shares.append(evaluate._run_share(task, range(100), 7, 0))
    whole = evaluate._join(shares)
    assert whole.figures == one.figures and whole.digests == one.digests
    for side in ("originals", "reconstructions"):
        [ours], [theirs] = (
            [moments.statistics() for moments in getattr(share, side).values()] for share in (whole, one)
        )
        assert ours.count == theirs.count == 100
        torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(ours.covariance, theirs.covariance, atol=1e-12, rtol=1e-12)


def test_the_result_says_all_it_depends_on(
    rae: Any, digits: Any, extractor: EncoderExtractor, perceptual: PerceptualDistance
) -> None:
    result = evaluate_reconstruction(
        rae, digits, metrics=ALL, extractor=extractor, perceptual=perceptual, num_images=50
    )
    facts = result.as_dict()
    assert (facts["schema"], facts["kind"], facts["num_samples"]) == (1, "reconstruction", 50)
    assert set(facts["metrics"]) == set(ALL)
    assert facts["spaces"] == {"encoder": extractor.identity.as_dict()}
    assert "per_image" not in facts and facts["wall_time_s"] > 0
    assert facts["samples"]["uint8"] == "rounded" and facts["samples"]["dtype"] == "float32"
    assert len(facts["samples"]["weights_sha256"]) == 64
    assert "vgg" in facts["definitions"]["lpips"] and facts["versions"]["torchmetrics"][0].isdigit()
    table = result.table()
    assert all(name in table for name in ("PSNR", "SSIM", "LPIPS", "originals", "wall time", "50 images"))
    assert "Frechet distance" in table and "at least 2048" in table  # a tiny encoder's is no rFID of the literature
    assert result.per_image_csv().splitlines()[0] == "index,name,psnr,ssim,lpips"
    assert len(result.per_image_csv().splitlines()) == 51


def test_the_backbone_of_lpips_is_stated(identity: Any, digits: Any) -> None:
    alex = PerceptualDistance(*random_alex_lpips(), "alex")
    result = evaluate_reconstruction(identity, digits, metrics=["lpips"], perceptual=alex, num_images=3)
    assert result.definitions == {"lpips": "v0.1, alex"}


def test_the_hash_of_weights_sees_the_decoder_and_the_encoder(rae: Any, digits: Any) -> None:
    hashes = [autoencoder_sha256(rae)]
    for part in ("decoder", "encoder"):
        other = copy.deepcopy(rae)
        changed = other.decoder if part == "decoder" else other.encoder.backbone.model
        with torch.no_grad():
            next(changed.parameters()).add_(1)
        other.encoder._fingerprint = None  # it is kept once computed
        hashes.append(autoencoder_sha256(other))
    assert len(set(hashes)) == 3 and autoencoder_sha256(rae) == hashes[0]


def test_bad_images_stop_the_run_or_are_left_out(
    identity: Any, tmp_path: Path, random_pictures: Any, write_pictures: Any, extractor: EncoderExtractor
) -> None:
    pictures = random_pictures(20, seed=1, size=32)
    folder = write_pictures(tmp_path / "all", pictures)
    for number in (0, 7):
        (folder / f"{number:05d}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"2 unreadable images, 1 allowed: 00000\.png .*, 00007\.png"):
        evaluate_reconstruction(identity, FolderImages(folder), metrics=["psnr"], max_bad_images=1, batch_size=3)
    result = evaluate_reconstruction(
        identity, FolderImages(folder), extractor=extractor, max_bad_images=2, batch_size=3
    )
    clean = write_pictures(tmp_path / "clean", np.delete(pictures, [0, 7], axis=0))
    expected = evaluate_reconstruction(identity, FolderImages(clean), extractor=extractor)
    assert result.num_samples == 18 and result.reference["left_out"] == ["00000.png", "00007.png"]
    assert result.reference["pixels_sha256"] == expected.reference["pixels_sha256"]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carries_images", [False, True])
def test_statistics_are_refused_with_the_reason(
    identity: Any, tmp_path: Path, extractor: EncoderExtractor, carries_images: bool, random_pictures: Any
) -> None:
    moments = FeatureMoments(4)
    moments.update(torch.randn(9, 4))
    path = tmp_path / "VIRTUAL.npz"
    save_statistics(path, {"encoder.features": moments.statistics()}, {"encoder": extractor.identity}, {})
    if carries_images:  # ADM's file holds 10,000 images beside the statistics
        np.savez(path, mu=np.zeros(4), sigma=np.eye(4), arr_0=random_pictures(5, seed=0, size=32))
    source: Any = NpzImages(path) if carries_images else load_statistics(path)
    with pytest.raises(UserError, match=r"same originals.*1\.9 where 0\.57.*repagen evaluate generation"):
        evaluate_reconstruction(identity, source, metrics=["psnr"])


def test_other_sizes_are_refused_by_name(
    rae: Any, identity: Any, kl: Any, tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    small = FolderImages(write_pictures(tmp_path / "small", random_pictures(3, seed=0, size=16)))
    for model in (rae, identity):
        with pytest.raises(UserError, match=r"00000\.png is 16x16: .* for images of 32 px; .*data\.image_size"):
            evaluate_reconstruction(model, small, metrics=["psnr"])
    odd = FolderImages(write_pictures(tmp_path / "odd", random_pictures(3, seed=0, size=17)))
    with pytest.raises(UserError, match=r"00000\.png is 17x17: .*positive multiple of the autoencoder's 2 px"):
        evaluate_reconstruction(kl, odd, metrics=["psnr"])
    wide = FolderImages(write_pictures(tmp_path / "wide", random_pictures(3, seed=0, size=32)[:, :, :16]))
    with pytest.raises(UserError, match=r"00000\.png is 16x32: .*square"):
        evaluate_reconstruction(kl, wide, metrics=["psnr"])
    mixed = write_pictures(tmp_path / "mixed", random_pictures(3, seed=0, size=32))
    write_pictures(mixed / "more", random_pictures(2, seed=0, size=16))
    with pytest.raises(UserError, match=r"more/00000\.png is 16x16: others are 32x32"):
        evaluate_reconstruction(kl, FolderImages(mixed), metrics=["psnr"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_reconstructions_that_are_not_finite_name_the_image(digits: Any, value: float) -> None:
    class Broken(PixelAutoencoder):
        def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
            images = super().decode(latents, return_dict=False)[0]
            images[images.flatten(1).mean(1) == images.flatten(1).mean(1).max(), 0, 0, 0] = value
            return (images,)

    images = torch.stack(digits.load(range(8))) // 2
    images[5] += 100
    with pytest.raises(UserError, match=r"reconstruction of tensor\[5\] has pixels that are not finite"):
        evaluate_reconstruction(Broken(image_size=32), TensorImages(images), metrics=["psnr"])


def test_a_figure_that_is_not_finite_names_the_image(identity: Any, kl: Any) -> None:
    """Weights so large that any difference is too much for float32."""
    trunk, heads = random_lpips()
    heads = {key: value * 1e38 for key, value in heads.items()}
    images = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    perceptual = PerceptualDistance(trunk, heads)
    result = evaluate_reconstruction(identity, TensorImages(images), metrics=["lpips"], perceptual=perceptual)
    assert result.metrics == {"lpips": 0.0}
    with pytest.raises(UserError, match=r"^lpips of tensor\[0\] is not finite"):
        evaluate_reconstruction(kl, TensorImages(images), metrics=["lpips"], perceptual=perceptual)


def test_what_is_no_autoencoder_is_refused_by_its_class(digits: Any) -> None:
    with pytest.raises(UserError, match=r"^autoencoder: Linear is none of .*AutoencoderKL"):
        evaluate_reconstruction(torch.nn.Linear(1, 1), digits, metrics=["psnr"])


def test_no_readable_image_is_said_so(identity: Any, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    for allowed in (0, 2, 9):
        with pytest.raises(UserError, match=r"^none of the 3 images can be read: 0\.png .*2\.png .*; replace them$"):
            evaluate_reconstruction(identity, FolderImages(tmp_path), metrics=["psnr"], max_bad_images=allowed)


def test_features_that_are_not_finite_name_the_image(identity: Any, digits: Any, extractor: EncoderExtractor) -> None:
    class Diverging(EncoderExtractor):
        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            dark = images.flatten(1).float().mean(1)[:, None] < 200
            return {name: rows.where(dark, torch.inf) for name, rows in super().__call__(images).items()}

    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[2] = 255
    with pytest.raises(UserError, match=r"features of tensor\[2\] are not finite"):
        evaluate_reconstruction(
            identity, TensorImages(images), metrics=["rfid"], extractor=Diverging(extractor.encoder)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["rfid"]}, "rfid needs an extractor"),
        ({"metrics": ["lpips"]}, "lpips needs its network"),
        ({"metrics": ["fid"]}, "fid given; allowed: psnr, ssim, lpips, rfid"),
        ({"metrics": []}, "none given"),
        ({"metrics": ["psnr"], "num_images": 1}, "1 images asked for.*from 2"),
        ({"metrics": ["psnr"], "num_images": 356}, "has 355"),
    ],
)
def test_what_cannot_be_computed_is_refused(identity: Any, digits: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_reconstruction(identity, digits, **options)


def test_one_image_is_refused(identity: Any, tmp_path: Path, random_pictures: Any, write_pictures: Any) -> None:
    folder = write_pictures(tmp_path / "one", random_pictures(1, seed=0, size=32))
    with pytest.raises(UserError, match="1 images asked for"):
        evaluate_reconstruction(identity, FolderImages(folder), metrics=["psnr"])
    (folder / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="at least 2 images that can be read, got 1"):
        evaluate_reconstruction(identity, FolderImages(folder), metrics=["psnr"], max_bad_images=1)


def test_a_metric_that_cannot_see_so_small_images_is_refused_before_the_pass(perceptual: PerceptualDistance) -> None:
    images = TensorImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(UserError, match="ssim cannot compare images of 4 px"):
        evaluate_reconstruction(PixelAutoencoder(image_size=4), images, metrics=["ssim"])
    deep = PerceptualDistance(*random_alex_lpips(), "alex")
    with pytest.raises(UserError, match="lpips cannot compare images of 4 px"):
        evaluate_reconstruction(PixelAutoencoder(image_size=4), images, metrics=["lpips"], perceptual=deep)
