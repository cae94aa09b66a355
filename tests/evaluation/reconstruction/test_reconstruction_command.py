"""`repagen evaluate reconstruction`, and its door on several processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lpips_parts import write_lpips
from PIL import Image

from repagen import cli

ROOT = Path(__file__).parents[3]
DIGITS = ["data.kind=digits", "data.image_size=32", "data.subset=validation"]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command => what it printed."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["repagen", "evaluate", "reconstruction", *words])
        cli.main()
        return capsys.readouterr().out

    return run


def test_all_metrics_of_a_saved_autoencoder(
    evaluate: Any, rae_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    trunk, heads = write_lpips(tmp_path)
    output = evaluate(
        "--autoencoder", str(rae_folder), "--data", *DIGITS, "--metrics", "psnr", "ssim", "lpips", "rfid",
        "--extractor", str(encoder_folder), "--lpips-backbone", "vgg", "--lpips-weights", str(trunk),
        "--lpips-heads", str(heads), "--num-images", "40", "--output", str(tmp_path / "out"),
    )  # fmt: skip
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["kind"], result["num_samples"]) == ("reconstruction", 40)
    assert result["samples"]["path"] == str(rae_folder)
    assert "tiny_vgg.pth" in result["definitions"]["lpips"]
    rows = list(csv.DictReader((tmp_path / "out/per_image.csv").read_text().splitlines()))
    for metric in ("psnr", "ssim", "lpips"):
        mean = np.mean([float(row[metric]) for row in rows])
        assert mean == pytest.approx(result["metrics"][metric], rel=1e-6)
    with Image.open(tmp_path / "out/worst_and_median.png") as picture:
        assert json.loads(picture.info["repagen"])["by"] == "lpips"
    assert f"{result['metrics']['psnr']:.2f} +- " in output and "40 images" in output
    assert result["reference"]["pixels_sha256"][:12] in output


def test_an_autoencoder_is_found_in_a_pipeline(evaluate: Any, pipeline_folder: Path) -> None:
    data = ["data.kind=digits", "data.image_size=16", "data.subset=validation"]
    output = evaluate("--autoencoder", str(pipeline_folder), "--data", *data, "--metrics", "psnr", "--num-images", "5")
    assert "PSNR" in output and "SSIM" not in output and "Frechet" not in output


def test_a_result_is_replaced_whole(evaluate: Any, rae_folder: Path, encoder_folder: Path, tmp_path: Path) -> None:
    """No figures of single images stay beside a result that has none."""
    words = ["--autoencoder", str(rae_folder), "--data", *DIGITS, "--num-images", "9", "--output", str(tmp_path / "o")]
    evaluate(*words, "--metrics", "psnr")
    names = ["per_image.csv", "result.json", "worst_and_median.png"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == names
    evaluate(*words, "--metrics", "rfid", "--extractor", str(encoder_folder))
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["result.json"]
    assert list(json.loads((tmp_path / "o/result.json").read_text())["metrics"]) == ["rfid"]


@pytest.fixture
def refused(evaluate: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command, which must fail; => its message."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit):
            evaluate(*words)
        return capsys.readouterr().err

    return run


def test_a_place_that_cannot_take_the_result_is_refused_before_anything_is_opened(
    refused: Any, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("years of work")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/result.json").write_text('{"years": "of work"}')
    for output, message in (
        ("notes", "is a file; name a folder"),
        ("notes/out", "notes is a file, so that no folder can be made there"),
        ("/proc/repagen", "nothing can be written in /proc"),
        ("foreign", "its result.json is no result of an evaluation"),
    ):
        place = str(tmp_path / output)
        error = refused("--autoencoder", "missing", "--data", "missing", "--output", place)
        assert f"error: --output {place}" in error and message in error
    assert (tmp_path / "notes").read_text() == "years of work"


def test_another_model_than_an_autoencoder_is_named(refused: Any, encoder_folder: Path) -> None:
    error = refused("--autoencoder", str(encoder_folder), "--data", *DIGITS, "--metrics", "psnr")
    assert f"error: --autoencoder {encoder_folder} holds no autoencoder: Dinov2Model is none of" in error


def test_broken_weights_of_lpips_name_option_and_tensor(refused: Any, rae_folder: Path, tmp_path: Path) -> None:
    trunk, heads = write_lpips(tmp_path)
    state = torch.load(heads, weights_only=True)
    state["lin1.model.1.weight"][0, 2] = torch.nan
    torch.save(state, heads)
    lpips = ["--lpips-backbone", "vgg", "--lpips-weights", str(trunk), "--lpips-heads", str(heads)]
    error = refused("--autoencoder", str(rae_folder), "--data", *DIGITS, "--metrics", "lpips", *lpips)
    assert f"--lpips-heads: {heads}:lin1.model.1.weight is not finite" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", *DIGITS, "--max-bad", "-1"], "--max-bad must be at least 0, got -1"),
        (["--data", *DIGITS, "data.max_bad_images=2"], "data.max_bad_images=2: is for training; say here --max-bad 2"),
        (
            ["--data", *DIGITS, "--metrics", "psnr", "--extractor", "x"],
            "--extractor is for rfid; add it: --metrics psnr",
        ),
        (["--data", *DIGITS, "--metrics", "psnr", "--pooling", "cls"], "--pooling is for rfid"),
        (["--data", *DIGITS, "--metrics", "psnr", "--extractor-weights", "x"], "--extractor-weights is for rfid"),
        (["--data", *DIGITS, "--metrics", "rfid", "--lpips-backbone", "vgg"], "--lpips-backbone is for lpips"),
        (["--data", *DIGITS, "--pooling", "cls"], "--pooling is for --extractor ENCODER"),
        (["--data", "missing"], "no such folder of images: missing"),
        (["--data", *DIGITS, "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--data", *DIGITS, "--extractor-weights", "missing.pth"], "Inception weights not found: missing.pth"),
        (["--data", *DIGITS, "--metrics", "lpips", "--lpips-weights", "missing.pth"], "--lpips-weights: no file at"),
        (["--data", *DIGITS, "--metrics", "psnr", "--lpips-weights", "x.pth"], "--metrics psnr lpips"),
        (["--data", *DIGITS[:1], "data.image_size=16", "--metrics", "psnr"], "digit 0 of subset all is 16x16"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    evaluate: Any, rae_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate("--autoencoder", str(rae_folder), *words)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
    assert caught.value.code == 2
    assert len(error) == 1 and message in error[0]


def test_weights_of_lpips_are_never_fetched(
    evaluate: Any,
    rae_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        evaluate("--autoencoder", str(rae_folder), "--data", *DIGITS, "--metrics", "lpips")
    assert "--lpips-weights: no alexnet weights at" in capsys.readouterr().err


def test_statistics_in_place_of_originals_are_refused(
    evaluate: Any, rae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(SystemExit):
        evaluate("--autoencoder", str(rae_folder), "--data", str(tmp_path / "VIRTUAL_imagenet256_labeled.npz"))
    assert "the same originals" in capsys.readouterr().err


def run_door(processes: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *(["-m", *launch] if launch else []), "eval/reconstruction.py", *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(
    rae_folder: Path, encoder_folder: Path, tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    folder = write_pictures(tmp_path / "images", random_pictures(31, seed=1, size=32))
    (folder / "00009.png").write_bytes(b"broken")
    words = ["--autoencoder", str(rae_folder), "--data", str(folder), "--extractor", str(encoder_folder)]
    results, tables = [], []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        options = ["--batch-size", "4", "--max-bad", "1", "--output", str(output)]
        done = run_door(processes, [*words, *options])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Frechet distance") == 1
        results.append(json.loads((output / "result.json").read_text()))
        tables.append((output / "per_image.csv").read_text())
    one, two = results
    assert one["metrics"].pop("rfid") == pytest.approx(two["metrics"].pop("rfid"), rel=1e-9)
    del one["wall_time_s"], two["wall_time_s"]
    assert one == two and one["num_samples"] == 30
    assert tables[0] == tables[1]
