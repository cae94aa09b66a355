from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repagen import cli

ROOT = Path(__file__).parents[2]
DIGITS = ["data.kind=digits", "data.image_size=32"]


@pytest.fixture
def evaluate(encoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `repagen evaluate` with the tiny encoder; => what it printed."""

    def run(*words: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["repagen", "evaluate", "generation", "--extractor", str(encoder_folder), *words]
        )
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def folders(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> tuple[str, str]:
    samples = write_pictures(tmp_path / "samples", random_pictures(60, seed=1))
    reference = write_pictures(tmp_path / "reference", random_pictures(80, seed=2))
    return str(samples), str(reference)


def test_two_folders(evaluate: Any, folders: tuple[str, str], tmp_path: Path, encoder: Any) -> None:
    output = evaluate(
        "--samples", folders[0], "--reference", folders[1], "--output", str(tmp_path / "out/result.json")
    )
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert 0 < result["frechet_distance"] < 10
    assert 0.5 < result["precision"] <= 1 and 0.5 < result["recall"] <= 1
    assert (result["num_samples"], result["num_reference"]) == (60, 80)
    assert result["extractor"]["weights_sha256"] == encoder.fingerprint()
    assert result["samples"]["pixels_sha256"] != result["reference"]["pixels_sha256"]
    assert result["versions"]["torch"]
    assert not result["comparable"] and len(result["remarks"]) == 2
    lines = dict(line.split("  ", 1) for line in output.splitlines())
    assert lines["Frechet distance"].strip() == f"{result['frechet_distance']:.6g}  (not comparable)"
    assert {"precision, recall", "N", "extractor", "samples", "reference", "versions"} <= set(lines)
    assert "at least 2048" in lines["not comparable"]


def test_a_set_against_itself_is_perfect(evaluate: Any, folders: tuple[str, str], tmp_path: Path) -> None:
    evaluate("--samples", folders[0], "--reference", folders[0], "--output", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["frechet_distance"] < 1e-6
    assert (result["precision"], result["recall"]) == (1, 1)


def test_saved_reference_statistics_give_the_same_distance_to_the_same_extractor_only(
    evaluate: Any, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, statistics, first, second = folders[0], *(str(tmp_path / name) for name in ("s.npz", "1.json", "2.json"))
    evaluate("--samples", samples, "--reference", folders[1], "--save-reference", statistics, "--output", first)
    evaluate("--samples", samples, "--reference", statistics, "--output", second)
    results = [json.loads(Path(path).read_text()) for path in (first, second)]
    assert results[0]["frechet_distance"] == pytest.approx(results[1]["frechet_distance"], rel=1e-9)
    assert results[1]["num_reference"] == 80 and results[1]["recall"] is None
    assert results[1]["reference"]["of"] == results[0]["reference"]
    with pytest.raises(SystemExit):
        evaluate("--samples", samples, "--reference", statistics, "--pooling", "cls")
    assert "but the extractor is" in capsys.readouterr().err


def test_the_held_out_digits_lie_near_the_training_digits(evaluate: Any, tmp_path: Path) -> None:
    """Real against real is closer than noise against real."""
    np.savez(tmp_path / "noise.npz", arr_0=np.random.default_rng(0).integers(0, 256, (359, 32, 32, 3), np.uint8))
    distances = []
    for samples in ([*DIGITS, "data.subset=validation"], [str(tmp_path / "noise.npz")]):
        output = str(tmp_path / "result.json")
        evaluate("--samples", *samples, "--reference", *DIGITS, "data.subset=train", "--output", output)
        distances.append(json.loads(Path(output).read_text())["frechet_distance"])
    assert distances[0] < 0.1 * distances[1]


def test_a_pipeline_sampled_on_the_fly(
    evaluate: Any, folders: tuple[str, str], pipeline_folder: Path, tmp_path: Path
) -> None:
    results = []
    for batch_size in ("6", "25"):
        output = str(tmp_path / f"{batch_size}.json")
        sampling = ["--num-samples", "25", "--num-inference-steps", "3", "--seed", "4", "--label-mode", "random"]
        model = ["--model", str(pipeline_folder), *sampling, "--batch-size", batch_size]
        evaluate(*model, "--reference", folders[1], "--output", output)
        results.append(json.loads(Path(output).read_text()))
    one, other = results
    assert one["samples"] == {
        "kind": "pipeline",
        "path": str(pipeline_folder),
        "label_mode": "random",
        "seed": 4,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "shift": 1.0,
        "dtype": "float32",
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "guidance_interval": [0.0, 1.0],
        "zero_init_steps": 0,
        "size": "16x16",
        "pixels_sha256": one["samples"]["pixels_sha256"],
    }
    assert one["frechet_distance"] == pytest.approx(other["frechet_distance"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "missing", "--reference", *DIGITS], "no such folder of images: missing"),
        (["--samples", *DIGITS, "--reference", "missing"], "no such folder of images: missing"),
        (
            ["--samples", *DIGITS, "--reference", *DIGITS, "--seed", "1", "--guidance-scale", "2"],
            "--guidance-scale is",
        ),
        (
            ["--samples", *DIGITS, "--reference", *DIGITS, "--batch-size", "0"],
            "--batch-size must be at least 1",
        ),
        (["--model", "missing", "--reference", *DIGITS], "--model needs --num-samples"),
        (["--model", "missing", "--num-samples", "9", "--reference", *DIGITS], "--model missing: no pipeline folder"),
        (
            ["--samples", *DIGITS, "--reference", "data.kind=digits", "data.image_size=16"],
            "samples are 32x32, reference images 16x16",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    evaluate: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate(*words)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
    assert caught.value.code == 2
    assert len(error) == 1 and message in error[0]


def run_door(processes: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *(["-m", *launch] if launch else []), "eval/generation.py", *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(
    encoder_folder: Path, pipeline_folder: Path, folders: tuple[str, str], tmp_path: Path
) -> None:
    results = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        sampling = ["--model", str(pipeline_folder), "--num-samples", "31", "--num-inference-steps", "3"]
        words = [*sampling, "--reference", folders[1], "--extractor", str(encoder_folder)]
        done = run_door(processes, [*words, "--batch-size", "4", "--output", str(output)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Frechet distance") == 1
        results.append(json.loads(output.read_text()))
    one, two = results
    assert one.pop("frechet_distance") == pytest.approx(two.pop("frechet_distance"), rel=1e-6)
    assert one == two
