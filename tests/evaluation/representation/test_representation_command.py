from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import repagen
from repagen import cli
from repagen.evaluation import representation
from repagen.evaluation.representation.command import OPTIONS
from repagen.evaluation.representation.sources import EncoderSource

DIGITS = ["--data", "data.kind=digits", "data.subset=validation", "data.image_size=16"]


def without_null_label(pipeline_folder: Path, folder: Path) -> Path:
    """A copy of a pipeline whose generator was never trained without a label."""
    copy = shutil.copytree(pipeline_folder, folder / "pipeline")
    config = repagen.SiTTransformer2DModel.load_config(copy / "transformer")
    settings = {**config, "class_dropout_prob": 0.0}
    model: Any = repagen.SiTTransformer2DModel.from_config(settings)
    model.save_pretrained(copy / "transformer")
    return copy


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


def test_a_generator_with_an_adapter_is_another_one(
    evaluate: Callable[..., str], pipeline_folder: Path, tmp_path: Path
) -> None:
    pipeline = repagen.ClassToImagePipeline.from_pretrained(pipeline_folder)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipeline.transformer))
    words = ["--model", str(pipeline_folder), *DIGITS, "--num-images", "10", "--blocks", "1", "--timesteps", "0.5"]
    words += ["--readouts", "rmsc", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    values = {}
    for weight in (0, 1, 2):
        evaluate(*words, "--lora", f"{tmp_path / 'lora'}={weight}")
        result = json.loads((tmp_path / "out/result.json").read_text())
        assert result["subject"]["name"] == f"{pipeline_folder} + {tmp_path / 'lora'}={weight}"
        values[weight] = result["readings"][0]["values"]
    evaluate(*words)
    assert json.loads((tmp_path / "out/result.json").read_text())["readings"][0]["values"] == values[0]
    assert values[0] != values[1] != values[2]


def test_an_encoder(evaluate: Callable[..., str], encoder_folder: Path, tmp_path: Path) -> None:
    words = ["--encoder", str(encoder_folder), *DIGITS, "--layers", "-1", "--readouts", "knn", "rmsc"]
    printed = evaluate(*words, "--output", str(tmp_path))
    assert "layer 1" in printed and "layer 0" not in printed
    assert (tmp_path / "rmsc.png").is_file()


MODEL, ENCODER = ["--model", "PIPELINE", *DIGITS], ["--encoder", "ENCODER", *DIGITS]
FEW = ["--num-images", "40"]
CKNNA = ["--readouts", "cknna", "--target", "ENCODER"]
PCK = ["--readouts", "hyperfeatures_pck"]
ARGUMENTS: dict[str, tuple[list[str], str]] = {  # how each argument's message begins under the option's name
    "pipeline": (["--model", "NO_NULL_LABEL", *DIGITS], "--model: it has no null label"),
    "blocks": ([*MODEL, "--blocks", "3"], "--blocks: 3: the model has blocks 1 to 2"),
    "layers": (
        [*ENCODER, "--layers", "9"],
        "--layers: 9: the encoder has layers 0 to 1, or -2 to -1 counted from the",
    ),
    "timesteps": ([*MODEL, "--timesteps", "500"], "--timesteps: 500: give different times in [0, 1]"),
    "readouts": ([*MODEL, "--readouts", "cknna"], "--readouts: cknna compares with an encoder"),
    "target": ([*MODEL, "--target", "ENCODER"], "--target: cknna and cka alone compare with it"),
    "data": ([*ENCODER[:2], "--data", "data.path=FEW", "data.image_size=16"], "--data: 3 images are too few"),
    "data.image_size": ([*MODEL[:-1], "data.image_size=32"], "--data data.image_size: 32 px, but"),
    "test_data": ([*ENCODER, "--test-data", "data.path=FEW"], "--test-data: 3 images are too few"),
    "num_images": ([*MODEL, "--num-images", "4"], "--num-images: 4 are too few; give at least 8"),
    "seeds": ([*MODEL, "--seeds", "0"], "--seeds: give 1 to 10"),
    "settings.knn_neighbours": ([*ENCODER, "--num-images", "12"], "--knn-neighbours: must be from 1 to the "),
    "settings.cknna_neighbours": (
        [*ENCODER, *FEW, *CKNNA, "--cknna-neighbours", "40"],
        "--cknna-neighbours: must be from 1 to 39 with 40 images, got 40",
    ),
    "settings.pck_images": ([*ENCODER, *PCK, "--pck-images", "1"], "--pck-images: must be from 2 to the 355 images"),
    "dtype": ([*ENCODER, "--readouts", "rmsc", "--feature-dtype", "float16"], "--feature-dtype: features of layer"),
    "cache": ([*ENCODER, "--cache", "FILE"], "--cache: FILE is no folder"),
}


def test_every_argument_that_becomes_an_option_is_tried() -> None:
    assert list(ARGUMENTS) == list(OPTIONS)


def test_the_library_speaks_of_no_options() -> None:
    folder = Path(representation.__file__).parent
    for path in set(folder.glob("*.py")) - {folder / "command.py"}:
        assert not re.findall(r"(?<!-)--[a-z][a-z-]*", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *ARGUMENTS.values(),
        (
            ["--model", "missing", *DIGITS],
            "--model: pipeline 'missing': no such folder here, and not in the local cache",
        ),
        (["--encoder", "./missing", *DIGITS], "--encoder './missing': no such folder"),
        (["--model", "PIPELINE", "--data", "data.path=missing"], "--data data.path"),
        (["--model", "PIPELINE", "--data", "photos"], "--data photos: give settings of a dataset, such as data.path="),
        ([*ENCODER, "--test-data", "photos"], "--test-data photos: give settings of a dataset, such as data.path="),
        ([*MODEL, "--blocks", "first"], "--blocks first: give numbers, or all"),
        ([*MODEL, "--layers", "1"], "--layers does not go with --model; give --blocks"),
        ([*ENCODER, "--lora", "adapter"], "--lora does not go with --encoder"),
        ([*ENCODER, "--timesteps", "0.1"], "--timesteps: they are for generators"),
        ([*MODEL, "--num-images", "0"], "--num-images must be at least 1"),
        ([*ENCODER, "--readouts", "rmsc", "--knn-neighbours", "3"], "--knn-neighbours is for the read-outs knn, and"),
        ([*ENCODER, "--cknna-neighbours", "3"], "--cknna-neighbours is for the read-outs cknna, and none"),
        ([*ENCODER, "--pck-images", "3"], "--pck-images is for the read-outs pck, pck_identity, hyperfeatures_pck"),
        ([*ENCODER, *FEW, *PCK, "--pck-images", "41"], "--pck-images: must be from 2 to the 40 images, got 41"),
        ([*MODEL, "--output", "FILE"], "is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    evaluate: Callable[..., str],
    pipeline_folder: Path,
    encoder_folder: Path,
    tmp_path: Path,
    random_pictures: Callable[..., Any],
    write_pictures: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    write_pictures(tmp_path / "few/a", random_pictures(3, seed=0))
    places = {"PIPELINE": pipeline_folder, "ENCODER": encoder_folder, "FILE": tmp_path / "file"}
    if "NO_NULL_LABEL" in words:
        places["NO_NULL_LABEL"] = without_null_label(pipeline_folder, tmp_path)
    if "--feature-dtype" in words:  # features beyond float16
        monkeypatch.setattr(EncoderSource, "tokens", lambda *arguments: [torch.full((2, 16, 4), 1e6)] * 2)
    words = [str(places.get(word, word)).replace("=FEW", f"={tmp_path / 'few'}") for word in words]
    message = message.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as caught:
        evaluate(*words)
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
