"""Images of prompts that a real, tiny pipeline draws; sampled, scored and exported by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_pipelines import tiny_pipeline

from repagen import TextToImagePipeline
from repagen.errors import UserError
from repagen.evaluation.text_to_image.prompted import PipelinePromptImages
from repagen.evaluation.text_to_image.prompts import PromptSet, prompt_set
from repagen.evaluation.text_to_image.scores import ScoringModel, clip_score

TEXTS = ["a red cat", "two dogs", "a boat"]
STEPS = ["--num-inference-steps", 2, "--guidance-scale", 2, "--forward-batch-size", 4]


@pytest.fixture(scope="session")
def pipe(text_folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(text_folder)


@pytest.fixture
def written(prompts_of: Any) -> PromptSet:
    return prompts_of(TEXTS)


def images_of(pipe: Any, count: int = 1, **options: Any) -> PipelinePromptImages:
    given = {"num_inference_steps": 2, "guidance_scale": 2.0, "forward_batch_size": 4, **options}
    return PipelinePromptImages(pipe, prompt_set("three", TEXTS), count, **given)


def test_an_image_is_a_function_of_seed_prompt_and_number(pipe: Any) -> None:
    one, three, other = images_of(pipe), images_of(pipe, 3), images_of(pipe, seed=1)
    drawn = torch.stack(three.load(range(9)))  # type: ignore[arg-type]
    assert torch.equal(torch.stack(one.load(range(3))), drawn[::3])  # type: ignore[arg-type]
    assert torch.equal(torch.stack(three.load([5, 8])), drawn[[5, 8]])  # type: ignore[arg-type]
    assert drawn.flatten(1).unique(dim=0).shape[0] == 9
    assert not torch.equal(torch.stack(other.load(range(3))), drawn[::3])  # type: ignore[arg-type]
    assert three.prompt_of(5).text == "two dogs" and three.describe(5) == "image 2 of prompt 00001"


def test_arguments_of_the_call_reach_the_picture_and_the_protocol(pipe: Any) -> None:
    wide = images_of(pipe, arguments={"width": 48, "negative_prompt": "a dog", "height": None})
    assert wide.load([0])[0].shape == (3, 32, 48)  # type: ignore[union-attr]
    assert {"width": 48, "negative_prompt": "a dog", "guidance_scale": 2.0}.items() <= wide.protocol.items()
    assert "height" not in wide.protocol and wide.protocol["prompts_sha256"] == prompt_set("other", TEXTS).sha256
    plain = images_of(pipe, arguments={"width": 48})
    assert not torch.equal(plain.load([0])[0], wide.load([0])[0])  # type: ignore[arg-type]


def test_what_does_not_fit_the_pipeline_is_refused_at_once(pipe: Any) -> None:
    with pytest.raises(UserError, match="height is 33; give a positive multiple of 2 px"):
        images_of(pipe, arguments={"height": 33})
    with pytest.raises(UserError, match="not looped"):
        images_of(pipe, num_loops=2)


def test_drawn_images_are_scored_saved_and_kept_when_killed(
    evaluate: Any, pipe: Any, text_folder: Path, written: PromptSet, clip: ScoringModel, clip_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ["--model", text_folder, "--prompts", written.path, "--images-per-prompt", 12, *STEPS, "--batch-size", 32]
    words += ["--metrics", "clip_score", "--clip", clip_folder, "--save-samples", tmp_path / "saved", "--output"]
    drawn: list[int] = []
    load = PipelinePromptImages.load

    def interrupted(self: PipelinePromptImages, indices: Any) -> Any:
        if drawn:
            raise RuntimeError("killed")
        drawn.extend(indices)
        return load(self, indices)

    monkeypatch.setattr(PipelinePromptImages, "load", interrupted)
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(*words, tmp_path / "killed.json")
    assert drawn == list(range(32)) and (tmp_path / "killed.json.partial").is_dir()
    drawn.clear()
    evaluate(*words, tmp_path / "killed.json")
    monkeypatch.undo()
    assert drawn == list(range(32, 36)) and not (tmp_path / "killed.json.partial").exists()

    result = json.loads((tmp_path / "killed.json").read_text())
    images = torch.stack(images_of(pipe, 12).load(range(36)))  # type: ignore[arg-type]
    saved = [np.array(Image.open(path)) for path in sorted((tmp_path / "saved").iterdir())]
    assert np.array_equal(np.stack(saved), images.permute(0, 2, 3, 1).numpy())
    cosines = clip_score(clip.model, clip.processor, images, [text for text in TEXTS for _ in range(12)])
    assert result["metrics"]["clip_score"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    facts = {"kind": "pipeline", "seed": 0, "num_inference_steps": 2, "guidance_scale": 2.0, "images_per_prompt": 12}
    assert facts.items() <= result["samples"].items() and result["reference"]["count"] == 3


def test_drawn_images_are_exported(evaluate: Any, pipe: Any, text_folder: Path, geneval_prompts: PromptSet,
                                   tmp_path: Path) -> None:  # fmt: skip
    words = ["--model", text_folder, "--prompts", geneval_prompts.path, *STEPS, "--seed", 3, "--export", "geneval"]
    evaluate(*words, "--export-to", tmp_path / "out")
    source = PipelinePromptImages(
        pipe, geneval_prompts, 4, seed=3, num_inference_steps=2, guidance_scale=2.0, forward_batch_size=4
    )
    second = np.array(Image.open(tmp_path / "out/00001/samples/00002.png"))
    assert np.array_equal(second, source.load([6])[0].permute(1, 2, 0).numpy())  # type: ignore[union-attr]


def test_shapes_are_scored_by_the_command(evaluate: Any, text_folder: Path, tmp_path: Path) -> None:
    words = ["--model", text_folder, "--protocol", "shapes", "--num-prompts", 2, "--seed", 5, *STEPS]
    table = evaluate(*words, "--output", tmp_path / "shapes.json")
    result = json.loads((tmp_path / "shapes.json").read_text())
    assert (result["kind"], result["schema"], result["num_samples"]) == ("shapes", 1, 12)
    assert result["metrics"]["seen, 2 objects: right"] in (0, 0.5, 1) and "unseen, 3 objects" in table
    assert result["prompts"]["seed"] == result["samples"]["seed"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "shapes", "--prompts", "x"], "--prompts is for --metrics and --export; leave it out"),
        (["--protocol", "shapes", "--clip", "x"], "--clip is for --metrics"),
        (["--metrics", "clip_score", "--clip", "x"], "--prompts FILE is needed"),
        (["--metrics", "clip_score", "--clip", "x", "--num-prompts", "3"], "--num-prompts is for --protocol"),
        (["--metrics", "clip_score", "--clip", "x", "--prompts", "x", "--by-order"], "--by-order is for --samples"),
        (["--export", "dpg", "--save-samples", "x"], "--save-samples is for --metrics and --protocol"),
        (["--protocol", "shapes", "--num-loops", "2"], "not looped"),
        (["--protocol", "shapes", "--width", "31"], "width is 31; give a positive multiple of 2 px"),
    ],
)
def test_a_mistake_is_one_line(
    evaluate: Any, text_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate("--model", text_folder, *words)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
    assert caught.value.code == 2 and len(error) == 1 and message in error[0]


def test_sampling_options_are_refused_for_images_that_exist(
    evaluate: Any, written: PromptSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--samples", tmp_path, "--prompts", written.path, "--metrics", "clip_score", "--clip", "x"]
    for option in (["--seed", "0"], ["--guidance-scale", "2"], ["--save-samples", "x"], ["--height", "32"]):
        with pytest.raises(SystemExit):
            evaluate(*words, *option)
        assert f"{option[0]} is for --model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate("--samples", tmp_path, "--protocol", "shapes")
    assert "--protocol shapes asks for pictures of its own" in capsys.readouterr().err


def test_a_pipeline_of_classes_is_refused(evaluate: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "classes")
    with pytest.raises(SystemExit):
        evaluate("--model", tmp_path / "classes", "--protocol", "shapes")
    assert "ClassToImagePipeline" in capsys.readouterr().err
