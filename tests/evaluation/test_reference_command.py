"""`repagen reference`: make, merge, check and import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen import cli
from repagen.errors import UserError
from repagen.evaluation import (
    EncoderExtractor,
    ExtractorIdentity,
    FolderImages,
    Statistics,
    TensorImages,
    encoder_protocol,
    evaluate_generation,
    expected_frechet_bias,
    load_protocol,
    load_statistics,
    save_statistics,
)
from repagen.evaluation.reference_building import import_statistics, make_reference, merge_references
from repagen.evaluation.reference_report import suits

ROOT = Path(__file__).parents[2]
FEATURE = "encoder.features"


class Inception:
    """The names of Inception's features, without its network."""

    identity = ExtractorIdentity("inception-v3-compat", "6726825d" + "0" * 56, "kernel=tensorflow1-bilinear")
    dimensions: Mapping[str, int] = {"pool": 3, "spatial": 2, "logits": 4}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        values = images.flatten(1).float() / 64
        return {"pool": values[:, :3], "spatial": values[:, 3:5], "logits": values[:, 5:9]}


@pytest.fixture
def repagen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `repagen`; => what it printed."""

    def run(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["repagen", *map(str, words)])
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(repagen: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `repagen`, which has to fail with exit code 2; => its one line."""

    def run(*words: Any) -> str:
        with pytest.raises(SystemExit) as caught:
            repagen(*words)
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("repagen: error: ")]
        code = caught.value.code
        del caught  # its traceback holds this frame, and open files in others, until a garbage collection
        assert code == 2 and len(lines) == 1 and "Traceback" not in error
        return lines[0]

    return run


@pytest.fixture
def photos(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> Path:
    return write_pictures(tmp_path / "photos", random_pictures(70, seed=2))


@pytest.fixture
def pictures(random_pictures: Any) -> torch.Tensor:
    return torch.from_numpy(random_pictures(70, seed=2)).permute(0, 3, 1, 2)


# --- make ----------------------------------------------------------------------------------------------------------


def test_made_statistics_serve_as_the_images_do(
    repagen: Any, photos: Path, tmp_path: Path, encoder_folder: Path, pictures: torch.Tensor, random_pictures: Any,
    write_pictures: Any, extractor: EncoderExtractor,
) -> None:  # fmt: skip
    output = tmp_path / "new/photos.npz"
    options = ["--extractor", encoder_folder, "--keep-images", 70]
    text = repagen("reference", "make", "--data", photos, *options, "--output", output)
    made = load_statistics(output)
    features = extractor(pictures)["features"].double().numpy()
    assert np.allclose(made.statistics[FEATURE].mean, features.mean(axis=0), rtol=1e-6, atol=1e-7)
    assert np.allclose(made.statistics[FEATURE].covariance, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-7)
    assert made.statistics[FEATURE].count == 70
    assert made.protocol["path"] == str(photos) and made.protocol["size"] == "16x16"
    assert "16 features of 70 images" in text and made.sha256 in text and "70 of 16x16" in text
    assert [path.name for path in output.parent.iterdir()] == ["photos.npz"]

    samples = FolderImages(write_pictures(tmp_path / "samples", random_pictures(50, seed=3)))
    extractors = {"encoder": extractor}
    results = [
        evaluate_generation(samples, reference, encoder_protocol("tiny"), extractors)
        for reference in (FolderImages(photos), made)
    ]
    for name, value in results[0].metrics.items():
        assert results[1].metrics[name] == pytest.approx(value, rel=1e-9)
    assert results[0].reference["pixels_sha256"] == results[1].reference["of"]["pixels_sha256"]
    assert 0.1 < results[0].metrics["precision_encoder"] < 1


def test_inceptions_statistics_have_the_names_that_other_tools_read(tmp_path: Path, pictures: torch.Tensor) -> None:
    make_reference(tmp_path / "made.npz", TensorImages(pictures), {"inception": Inception()})
    values = pictures.flatten(1).double().numpy() / 64
    with np.load(tmp_path / "made.npz", allow_pickle=False) as file:
        assert set(file) == {"repagen", "mu", "sigma", "mu_s", "sigma_s"}
        assert np.allclose(file["mu"], values[:, :3].mean(axis=0), rtol=1e-12)
        assert np.allclose(file["sigma_s"], np.cov(values[:, 3:5], rowvar=False), rtol=1e-12)


class Dying(Inception):
    """Inception that dies with its third batch."""

    def __init__(self, alive: bool) -> None:
        self.alive = alive
        self.calls = 0

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if not self.alive and self.calls == 3:
            raise KeyboardInterrupt
        return super().__call__(images)


def test_making_continues_where_it_was_killed(tmp_path: Path, pictures: torch.Tensor) -> None:
    source, again = TensorImages(pictures), Dying(alive=True)
    make_reference(tmp_path / "whole.npz", source, {"inception": Inception()}, keep_images=9)
    with pytest.raises(KeyboardInterrupt):
        make_reference(tmp_path / "made.npz", source, {"inception": Dying(False)}, batch_size=32, keep_images=9)
    assert not (tmp_path / "made.npz").exists()
    make_reference(tmp_path / "made.npz", source, {"inception": again}, batch_size=32, keep_images=9)
    assert again.calls == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.npz", "whole.npz"]
    with np.load(tmp_path / "made.npz") as made, np.load(tmp_path / "whole.npz") as whole:
        assert set(made) == set(whole) and all(np.array_equal(made[name], whole[name]) for name in whole)


def test_carried_images_are_a_random_subset_in_random_order(
    tmp_path: Path, photos: Path, pictures: torch.Tensor
) -> None:
    (photos / "00007.png").write_bytes(b"no image")
    for keep in (10, 20):
        make_reference(
            tmp_path / f"{keep}.npz", FolderImages(photos), {"inception": Inception()}, max_bad_images=1,
            keep_images=keep,
        )  # fmt: skip
    rows = {picture.numpy().tobytes(): number for number, picture in enumerate(pictures.permute(0, 2, 3, 1))}
    drawn = []
    for keep in (10, 20):
        with np.load(tmp_path / f"{keep}.npz") as file:
            drawn.append([rows[image.tobytes()] for image in file["arr_0"]])
    assert drawn[1][:10] == drawn[0] and len(set(drawn[1])) == 20
    assert 7 not in drawn[1] and drawn[1] != sorted(drawn[1]) and max(drawn[1]) > 40
    assert load_statistics(tmp_path / "20.npz").protocol["left_out"] == ["00007.png"]
    make_reference(
        tmp_path / "all.npz", FolderImages(photos), {"inception": Inception()}, max_bad_images=1, keep_images=70
    )
    carried = load_statistics(tmp_path / "all.npz").images
    assert carried is not None and len(carried) == 69


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "PHOTOS", "--extractor", "ENCODER", "--keep-images", "71"], "there are 70 images; keep fewer"),
        (["--data", "PHOTOS", "--extractor", "ENCODER", "--keep-images", "-1"], "--keep-images must be at least 0"),
        (["--data", "PHOTOS", "--extractor", "ENCODER", "--output", "x.pt"], "files that end with .npz; name it so"),
        (["--data", "PHOTOS", "--extractor", "ENCODER", "--output", "PHOTOS/x.npz"], "x.npz exists"),
        (["--data", "missing", "--extractor", "ENCODER"], "no such folder of images: missing"),
        (["--data", "PHOTOS"], "one of the arguments --protocol --extractor is required"),
        (["--data", "PHOTOS", "--protocol", "adm265"], "no protocol 'adm265'"),
        (["--data", "PHOTOS", "--protocol", "adm256", "--pooling", "cls"], "--pooling is for --extractor"),
        (["--data", "PHOTOS", "--extractor", "ENCODER", "--extractor-weights", "w"], "no space of this protocol is"),
        (["--data", "PHOTOS", "--protocol", "adm256"], "Inception weights not found"),
    ],
)
def test_what_cannot_be_made_is_refused(
    refused: Any, photos: Path, tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (photos / "x.npz").touch()
    names = {"PHOTOS": str(photos), "ENCODER": str(encoder_folder)}
    given = [names.get(word, word.replace("PHOTOS", names["PHOTOS"])) for word in words]
    output = [] if "--output" in words else ["--output", tmp_path / "out.npz"]
    assert message in refused("reference", "make", *given, *output)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.slow
def test_two_processes_make_what_one_makes(photos: Path, tmp_path: Path, encoder_folder: Path) -> None:
    words = ["make", "--data", photos, "--extractor", encoder_folder, "--keep-images", 8, "--batch-size", 32]
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, "eval/reference.py", *words, "--output", tmp_path / f"{processes}.npz"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("16 features of 70 images") == 1
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"]) and one["repagen"] == two["repagen"]
        assert np.allclose(one[f"sigma_{FEATURE}"], two[f"sigma_{FEATURE}"], rtol=1e-12, atol=1e-14)


# --- merge ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path, pictures: torch.Tensor) -> list[Path]:
    for name, some in {"a": pictures[:11], "b": pictures[11:40], "c": pictures[40:], "whole": pictures}.items():
        make_reference(tmp_path / f"{name}.npz", TensorImages(some), {"inception": Inception()})
    return [tmp_path / f"{name}.npz" for name in "abc"]


def test_merged_parts_are_the_whole(repagen: Any, parts: list[Path], tmp_path: Path) -> None:
    assert "3 parts" in repagen("reference", "merge", *parts, "--output", tmp_path / "merged.npz")
    merged, whole = (load_statistics(tmp_path / f"{name}.npz") for name in ("merged", "whole"))
    assert merged.extractors == whole.extractors and merged.protocol["size"] == "16x16"
    for feature, statistics in whole.statistics.items():
        assert merged.statistics[feature].count == 70
        for name in ("mean", "covariance"):
            ours, exact = getattr(merged.statistics[feature], name), getattr(statistics, name)
            assert torch.allclose(ours, exact, rtol=1e-12, atol=1e-13)


def test_what_has_been_merged_is_merged_again_but_not_with_its_own_parts(parts: list[Path], tmp_path: Path) -> None:
    merge_references(parts[:2], tmp_path / "ab.npz")
    with pytest.raises(UserError, match=r"ab\.npz and .*b\.npz hold the same images"):
        merge_references([tmp_path / "ab.npz", parts[2], parts[1]], tmp_path / "merged.npz")
    merge_references([tmp_path / "ab.npz", parts[2]], tmp_path / "merged.npz")
    assert len(load_statistics(tmp_path / "merged.npz").protocol["parts"]) == 3


def changed(path: Path, name: str, **changes: Any) -> Path:
    """A copy of a file that differs in one thing."""
    reference = load_statistics(path)
    content = {
        "statistics": {
            feature: Statistics(one.mean + 1, one.covariance, one.count)
            for feature, one in reference.statistics.items()
        },
        "extractors": reference.extractors,
        "protocol": {**reference.protocol, "pixels_sha256": name},
    }
    save_statistics(path.with_name(name), **{**content, **changes})
    return path.with_name(name)


def unusable_parts(part: Path) -> Iterator[tuple[str, list[Path]]]:
    statistics = load_statistics(part).statistics
    uncounted = {feature: Statistics(one.mean + 1, one.covariance) for feature, one in statistics.items()}
    other = ExtractorIdentity("inception-v3-compat", "6726825d" + "0" * 56, "kernel=pillow-bicubic-float")
    copy = Path(shutil.copy(part, part.with_name("copy.npz")))
    foreign = part.with_name("adm.npz")
    np.savez(foreign, mu=np.zeros(3), sigma=np.eye(3))
    yield "two files or more, got 1", [part]
    yield "hold the same images", [part, copy]
    yield "hold the same images", [part, changed(part, "pixels.npz", protocol=load_statistics(part).protocol)]
    yield "hold the same images", [part, changed(part, "numbers.npz", statistics=statistics)]
    yield "does not say of how many images", [part, changed(part, "uncounted.npz", statistics=uncounted)]
    yield "made with .* but the extractor is", [part, changed(part, "kernel.npz", extractors={"inception": other})]
    yield (
        "merge equal features",
        [part, changed(part, "pool.npz", statistics={"inception.pool": statistics["inception.pool"]})],
    )
    yield "of images of 8x8, but .* of 16x16", [part, changed(part, "size.npz", protocol={"size": "8x8"})]
    yield "does not say which extractor made it", [part, foreign]


def test_parts_that_do_not_belong_together_are_refused(parts: list[Path], tmp_path: Path) -> None:
    for message, paths in unusable_parts(parts[0]):
        with pytest.raises(UserError, match=message) as caught:
            merge_references(paths, tmp_path / "merged.npz")
        assert "\n" not in str(caught.value)
    merge_references([parts[0], changed(parts[0], "another.npz")], tmp_path / "merged.npz")


# --- check ---------------------------------------------------------------------------------------------------------


def lines_of(text: str) -> dict[str, str]:
    return {name: line.strip() for name, line in (row.split("  ", 1) for row in text.splitlines())}


def test_check_says_what_a_file_of_ours_holds(
    repagen: Any, refused: Any, photos: Path, tmp_path: Path, encoder_folder: Path, extractor: EncoderExtractor
) -> None:
    path = tmp_path / "made.npz"
    repagen("reference", "make", "--data", photos, "--extractor", encoder_folder, "--output", path)
    lines = lines_of(repagen("reference", "check", path))
    statistics = load_statistics(path).statistics[FEATURE]
    bias = expected_frechet_bias(statistics.covariance, num_samples=50_000, num_reference=70)
    assert f"at a distance of {bias:.3g}" in lines[FEATURE] and "rank 15" in lines[FEATURE]  # a norm comes last
    assert extractor.identity.weights_sha256[:12] in lines["extractor of encoder"]
    assert "kind=folder" in lines["made from"] and "pixels_sha256=" in lines["made from"]
    assert "70 reference images, but 16 features need at least 2048" in lines["note"]
    assert repagen("reference", "check", path, "--extractor", encoder_folder).splitlines()[-1] == (
        "suits custom, without precision_encoder, recall_encoder"
    )
    assert "but the extractor is" in refused(
        "reference", "check", path, "--extractor", encoder_folder, "--pooling", "cls"
    )
    assert "--pooling is for a check against" in refused("reference", "check", path, "--pooling", "cls")


@pytest.mark.parametrize(
    ("arrays", "dimension", "layout", "extractor"),
    [
        (("mu", "sigma"), 8, "mu and sigma", "not recorded, and not Inception's"),
        (("mu", "sigma", "avg_mu", "avg_sigma"), 8, "FD-Loss", "not recorded, and not Inception's"),
        pytest.param(
            ("mu", "sigma", "mu_s", "sigma_s"), 2048, "ADM", "taken for inception-v3-compat", marks=pytest.mark.slow
        ),
    ],
)
def test_check_recognises_the_files_of_other_tools(
    repagen: Any, tmp_path: Path, arrays: tuple[str, ...], dimension: int, layout: str, extractor: str
) -> None:
    values = {name: np.eye(dimension) if "sigma" in name else np.zeros(dimension) for name in arrays}
    np.savez(tmp_path / "foreign.npz", **values)  # type: ignore[arg-type]
    lines = lines_of(repagen("reference", "check", tmp_path / "foreign.npz"))
    assert lines["layout"] == layout and lines["made from"] == "not recorded"
    assert extractor in lines["extractor"]
    features = [line for name, line in lines.items() if "." in name]
    assert len(features) == len(arrays) // 2
    assert all(f"{dimension} features of an unknown number of images, rank {dimension};" in line for line in features)


def test_check_refuses_what_is_no_covariance_or_of_another_size(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "foreign.npz"
    np.savez(path, mu=np.zeros(2), sigma=np.diag([1.0, -1.0]))
    assert "sigma of inception.pool is not a covariance" in refused("reference", "check", path)
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2), arr_0=np.zeros((1, 512, 512, 3), np.uint8))
    assert "adm256 is for 256 px, but" in refused("reference", "check", path, "--protocol", "adm256")
    assert "need the arrays mu and sigma" in refused("reference", "check", _images(tmp_path))
    assert "no such file" in refused("reference", "check", tmp_path / "missing.npz")


def _images(folder: Path) -> Path:
    np.savez(folder / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    return folder / "images.npz"


def test_a_file_suits_a_protocol_but_for_what_it_lacks(tmp_path: Path, pictures: torch.Tensor) -> None:
    make_reference(tmp_path / "made.npz", TensorImages(pictures), {"inception": Inception()})
    protocol = load_protocol("adm256")
    reference = load_statistics(tmp_path / "made.npz")
    assert (
        suits(protocol, "adm256", reference, {"inception": Inception()}) == "suits adm256, without precision, recall"
    )
    del reference.statistics["inception.spatial"]
    assert "without sfid, precision" in suits(protocol, "adm256", reference, {"inception": Inception()})
    del reference.statistics["inception.pool"]
    with pytest.raises(UserError, match=r"holds no statistics of inception\.pool"):
        suits(protocol, "adm256", reference, {"inception": Inception()})


# --- import --------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path, extractor: EncoderExtractor, encoder: Any, pictures: torch.Tensor) -> Path:
    """A file as FD-Loss writes it: the class token's statistics and the mean tokens'."""
    features = [one(pictures)["features"].double().numpy() for one in (EncoderExtractor(encoder, "cls"), extractor)]
    cls, mean = ((one.mean(axis=0), np.cov(one, rowvar=False)) for one in features)
    np.savez(tmp_path / "vit.npz", mu=cls[0], sigma=cls[1], avg_mu=mean[0], avg_sigma=mean[1])
    return tmp_path / "vit.npz"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_imported_statistics_serve_the_stated_space(
    repagen: Any, refused: Any, foreign: Path, photos: Path, tmp_path: Path, encoder_folder: Path, encoder: Any,
    pooling: Any, random_pictures: Any, write_pictures: Any,
) -> None:  # fmt: skip
    output, options = tmp_path / "imported.npz", ["--extractor", encoder_folder, "--pooling", pooling]
    text = repagen("reference", "import", foreign, *options, "--num-images", 70, "--output", output)
    assert "stated by the user, not verified" in text and "ports of one network differ" in text
    imported = load_statistics(output)
    assert imported.protocol["sources"]["encoder"]["sha256"] == load_statistics(foreign).sha256
    extractors = {"encoder": EncoderExtractor(encoder, pooling)}
    samples = FolderImages(write_pictures(tmp_path / "samples", random_pictures(50, seed=3)))
    protocol = encoder_protocol("tiny", pooling=pooling, metrics=["fd"])
    distances = [
        evaluate_generation(samples, reference, protocol, extractors).metrics["fd_encoder"]
        for reference in (FolderImages(photos), imported)
    ]
    assert distances[1] == pytest.approx(distances[0], rel=1e-5) and distances[0] > 0.01
    with pytest.raises(UserError, match="does not say which extractor made it"):
        evaluate_generation(samples, load_statistics(foreign), protocol, extractors)
    assert "says itself what made it" in refused(
        "reference", "import", output, *options, "--output", tmp_path / "again.npz"
    )


def test_files_of_several_spaces_become_one(tmp_path: Path) -> None:
    protocol = load_protocol("edm2-dinov2")
    generator = np.random.default_rng(0)
    for name in ("dinov2", "inception"):
        features = generator.normal(size=(20, 3))
        np.savez(tmp_path / f"{name}.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))

    class Dinov2(Inception):
        dimensions: Mapping[str, int] = {"features": 3}

    extractors = {"dinov2": Dinov2(), "inception": Inception()}
    paths = [tmp_path / f"{rule.name}.npz" for rule in protocol.spaces]
    import_statistics(paths, protocol.spaces, extractors, tmp_path / "both.npz")
    both = load_statistics(tmp_path / "both.npz")
    for path, feature in zip(paths, ("dinov2.features", "inception.pool"), strict=True):
        with np.load(path) as file:
            assert np.array_equal(both.statistics[feature].covariance.numpy(), file["sigma"])
    assert suits(protocol, "edm2-dinov2", both, extractors) == "suits edm2-dinov2"


def test_imports_that_contradict_themselves_are_refused(
    refused: Any, foreign: Path, tmp_path: Path, encoder_folder: Path
) -> None:
    small = tmp_path / "small.npz"
    np.savez(small, mu=np.zeros(8), sigma=np.eye(8))
    options = ["--extractor", encoder_folder, "--output", tmp_path / "out.npz"]
    for words, message in {
        (small,): "holds 8 features, but",
        (foreign, small): "2 files and 1 spaces",
        (foreign, "--space", "dinov2"): "protocol custom has the spaces encoder",
        (foreign, foreign, "--space", "encoder", "encoder"): "name each space once",
        (foreign, "--num-images", 1): "--num-images must be at least 2",
    }.items():
        assert message in refused("reference", "import", *words, *options)
    several = ["--protocol", "edm2-dinov2", "--output", tmp_path / "out.npz"]
    assert "has the spaces dinov2, inception; say which" in refused("reference", "import", foreign, *several)
    inception = load_protocol("adm256").spaces
    with pytest.raises(UserError, match="avg_mu says that a transformer made it"):
        import_statistics([foreign], inception, {"inception": Inception()}, tmp_path / "out.npz")


def test_an_unreadable_image_stops_making(refused: Any, photos: Path, encoder_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(photos / "ok.png")
    (photos / "bad.png").write_bytes(b"no image")
    words = ["--data", photos, "--extractor", encoder_folder, "--output", tmp_path / "out.npz"]
    assert "1 unreadable images, 0 allowed: bad.png" in refused("reference", "make", *words)
