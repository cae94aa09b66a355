from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from repagen import cli

DIGITS = ["--data", "data.kind=digits", "data.subset=validation", "data.image_size=16"]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run `repagen evaluate representation`; => what it printed."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["repagen", "evaluate", "representation", *words])
        cli.main()
        return capsys.readouterr().out

    return run


def test_a_generator_against_an_encoder(
    evaluate: Callable[..., str], pipeline_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    words = [
        "--model",
        str(pipeline_folder),
        *DIGITS,
        "--num-images",
        "60",
        "--blocks",
        "2",
        "1",
        "--timesteps",
        "0.1",
    ]
    words += ["0.5", "--readouts", "linear", "cknna", "--target", str(encoder_folder), "--seeds", "2"]
    words += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    printed = evaluate(*words)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "result.json", "table.txt", "linear.png", "cknna.png",
    }  # fmt: skip
    assert (tmp_path / "out/table.txt").read_text() == printed
    assert result["subject"]["name"] == str(pipeline_folder)
    images = result["data"]["images"]
    assert images["measured"] == images["train"] + images["test"] == 60 and 8 < images["test"] < 16
    assert len(result["readings"]) == 8 and all(len(reading["values"]) == 2 for reading in result["readings"])
    assert result["last"]["linear"]["block"] == 2
    with Image.open(tmp_path / "out/linear.png") as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(100_000) or []) > 10
    evaluate(*words)
    again = json.loads((tmp_path / "out/result.json").read_text())
    assert again["readings"] == result["readings"]


def test_an_encoder(evaluate: Callable[..., str], encoder_folder: Path, tmp_path: Path) -> None:
    words = ["--encoder", str(encoder_folder), *DIGITS, "--layers", "-1", "--readouts", "knn", "rmsc"]
    printed = evaluate(*words, "--output", str(tmp_path))
    assert "layer 1" in printed and "layer 0" not in printed
    assert (tmp_path / "rmsc.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "missing", *DIGITS], "--model missing: no pipeline folder"),
        (["--encoder", "./missing", *DIGITS], "--encoder './missing': no such folder"),
        (["--model", "PIPELINE", "--data", "data.path=missing"], "--data data.path"),
        (["--model", "PIPELINE", *DIGITS, "--blocks", "3"], "--blocks 3: the model has blocks 1 to 2"),
        (["--model", "PIPELINE", *DIGITS, "--blocks", "first"], "--blocks first: give numbers, or all"),
        (["--model", "PIPELINE", *DIGITS, "--layers", "1"], "--layers does not go with --model; give --blocks"),
        (["--encoder", "ENCODER", *DIGITS, "--layers", "2"], "--layers: [2] must be"),
        (["--encoder", "ENCODER", *DIGITS, "--timesteps", "0.1"], "--timesteps is for generators"),
        (["--model", "PIPELINE", *DIGITS, "--timesteps", "500"], "--timesteps 500: give different times in [0, 1]"),
        (["--model", "PIPELINE", *DIGITS, "--readouts", "cknna"], "--readouts cknna compares with an encoder"),
        (["--model", "PIPELINE", *DIGITS, "--seeds", "0"], "--seeds: give 1 to 10"),
        (["--model", "PIPELINE", *DIGITS, "--num-images", "0"], "--num-images must be at least 1"),
        (["--model", "PIPELINE", *DIGITS, "--num-images", "4"], "--num-images 4: too few; give at least 8"),
        (["--encoder", "ENCODER", *DIGITS, "--knn-neighbours", "999"], "--knn-neighbours: must be from 1 to the"),
        (
            [
                "--encoder",
                "ENCODER",
                *DIGITS,
                "--target",
                "ENCODER",
                "--readouts",
                "cknna",
                "--cknna-neighbours",
                "355",
            ],
            "--cknna-neighbours: must be from 1 to 354",
        ),
        (["--model", "PIPELINE", *DIGITS, "--output", "FILE"], "is no folder"),
        (
            ["--model", "PIPELINE", "--data", "data.kind=digits", "data.image_size=32"],
            "--data: data.image_size: 32 px, but",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    evaluate: Callable[..., str],
    pipeline_folder: Path,
    encoder_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    places = {"PIPELINE": pipeline_folder, "ENCODER": encoder_folder, "FILE": tmp_path / "file"}
    with pytest.raises(SystemExit) as caught:
        evaluate(*(str(places.get(word, word)) for word in words))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
    assert caught.value.code == 2
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("option", ["--encoder", "--target"])
def test_encoders_are_not_looked_up(
    option: str,
    evaluate: Callable[..., str],
    online_cache: Path,
    encoder_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    subject = [] if option == "--encoder" else ["--encoder", str(encoder_folder)]
    with pytest.raises(SystemExit):
        evaluate(*subject, option, "org/nowhere", *DIGITS, "--num-images", "60")
    assert "hf download org/nowhere" in capsys.readouterr().err
