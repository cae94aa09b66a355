from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.evaluation.text_to_image.prompts import PromptSet
from repagen.evaluation.text_to_image.scores import ScoringModel, clip_score, open_scoring_model, pick_score

ROOT = Path(__file__).parents[3]
TEXTS = ["a red cat", "two dogs on a couch in the evening", "a boat"]


@pytest.fixture
def pictures(random_pictures: Any) -> np.ndarray:
    return random_pictures(6, seed=3)


@pytest.fixture
def given(tmp_path: Path, pictures: np.ndarray, write_pictures: Any, prompts_of: Any) -> list[object]:
    """Six images of three prompts."""
    prompts = prompts_of(TEXTS)
    folder = write_pictures(tmp_path / "images", pictures)
    return ["--samples", folder, "--prompts", prompts.path, "--images-per-prompt", 2]


def test_both_scores_with_all_they_depend_on(
    evaluate: Any, given: list[object], pictures: np.ndarray, clip: ScoringModel, clip_folder: Path, pick_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    models = ["--metrics", "clip_score", "pick_score", "--clip", clip_folder, "--pick", pick_folder]
    table = evaluate(*given, *models, "--batch-size", 4, "--output", tmp_path / "out/result.json")
    result = json.loads((tmp_path / "out/result.json").read_text())

    images, texts = torch.from_numpy(pictures).permute(0, 3, 1, 2), [text for text in TEXTS for _ in range(2)]
    pick = open_scoring_model(str(pick_folder))
    cosines = clip_score(clip.model, clip.processor, images, texts).double()
    picks = pick_score(pick.model, pick.processor, images, texts).double()
    assert result["metrics"] == pytest.approx(
        {
            "clip_score": float(cosines.mean()),
            "clip_score 100*max(cos,0)": 100 * max(float(cosines.mean()), 0),
            "clip_score 2.5*max(cos,0)": 2.5 * float(cosines.clamp(min=0).mean()),
            "pick_score": float(picks.mean()),
        },
        rel=1e-5,
    )
    assert (result["schema"], result["kind"], result["num_samples"]) == (1, "text_to_image", 6)
    assert result["spaces"] == {"clip_score": clip.identity.as_dict(), "pick_score": pick.identity.as_dict()}
    digests = [hashlib.sha256(b"16x16;" + picture.tobytes()).digest() for picture in pictures]
    assert result["samples"]["pixels_sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert result["samples"]["matched_by"] == "number"
    assert result["reference"]["truncated_prompts"] == {"clip_score": 1, "pick_score": 1}
    assert result["reference"]["count"] == 3
    assert "1 of 3 prompts are longer than the 20 tokens that the model of clip_score reads" in result["remarks"][0]
    assert result["versions"]["transformers"] and result["wall_time_s"] > 0

    second = result["per_prompt"][1]
    assert second["id"] == "00001"
    assert second["clip_score"] == pytest.approx(cosines[2:4].tolist(), abs=1e-6)
    assert second["pick_preferences"] == pytest.approx(picks[2:4].softmax(0).tolist(), abs=1e-4)

    lines = [line.split("  ", 1) for line in table.splitlines()]
    rows = {name: value.strip() for name, value in lines}
    assert rows["CLIPScore (cosine)"] == f"{result['metrics']['clip_score']:.6g}"
    assert rows["PickScore"] == f"{result['metrics']['pick_score']:.6g}"
    assert rows["N"] == "6 images of 3 prompts"
    assert clip.identity.weights_sha256[:12] in rows["model of clip_score"]
    assert rows["truncated prompts"] == "clip_score=1, pick_score=1"
    assert {"CLIPScore (100*max(cos,0))", "CLIPScore (2.5*max(cos,0))", "samples", "prompts", "versions", "wall time",
            "note"} <= rows.keys()  # fmt: skip


def test_the_figure_does_not_depend_on_the_batch(
    evaluate: Any, given: list[object], clip_folder: Path, tmp_path: Path
) -> None:
    found = []
    for batch_size in (1, 5):
        path = tmp_path / f"{batch_size}.json"
        words = ["--metrics", "clip_score", "--clip", clip_folder, "--batch-size", batch_size, "--output", path]
        evaluate(*given, *words)
        found.append(json.loads(path.read_text()))
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=1e-5)
    assert found[0]["samples"] == found[1]["samples"]
    assert found[0]["metrics"].keys() == {"clip_score", "clip_score 100*max(cos,0)", "clip_score 2.5*max(cos,0)"}


def test_a_single_image_a_prompt_has_no_preferences(
    evaluate: Any, dpg_prompts: PromptSet, pick_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number, prompt in enumerate(dpg_prompts.prompts):
        Image.new("RGB", (20 + number, 16), "red").save(tmp_path / "images" / f"{prompt.id}.png")
    words = ["--samples", tmp_path / "images", "--prompts", dpg_prompts.path, "--output", tmp_path / "r.json"]
    evaluate(*words, "--metrics", "pick_score", "--pick", pick_folder)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["samples"]["matched_by"] == "id" and result["remarks"] == []
    assert [row.keys() for row in result["per_prompt"]] == [{"id", "pick_score"}] * 3


def test_exports_of_a_folder(
    evaluate: Any, geneval_prompts: PromptSet, dpg_prompts: PromptSet, random_pictures: Any, write_pictures: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    eight = write_pictures(tmp_path / "eight", random_pictures(8, seed=1))
    out = tmp_path / "geneval"
    words = ["--samples", eight, "--prompts", geneval_prompts.path, "--export", "geneval", "--export-to", out]
    assert evaluate(*words) == f"{out}: 2 prompts x 4 images written, 0 kept\n"
    again = out / "00001/samples/00002.png"
    assert np.array_equal(np.array(Image.open(again)), np.array(Image.open(eight / "00006.png")))
    assert evaluate(*words, "--resume") == f"{out}: 0 prompts x 4 images written, 2 kept\n"

    twelve = write_pictures(tmp_path / "twelve", random_pictures(12, seed=2))
    out = tmp_path / "dpg_out"
    words = ["--samples", twelve, "--prompts", dpg_prompts.path, "--export", "dpg", "--export-to", out, "--by-order"]
    assert evaluate(*words) == f"{out}: 3 prompts x 4 images written, 0 kept\n"
    corner = np.array(Image.open(out / "COCOval42.png"))[16:, :16]
    assert np.array_equal(corner, np.array(Image.open(twelve / "00006.png")))


def test_a_dpg_export_gives_every_prompt_its_own_images(evaluate: Any, tmp_path: Path) -> None:
    """The colour of an image is that of its prompt."""
    (tmp_path / "prompts").mkdir()
    for number in range(1, 13):
        (tmp_path / f"prompts/p{number}.txt").write_text(f"colour {number}")
        (tmp_path / f"images/p{number}").mkdir(parents=True)
        for image in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"images/p{number}/{image}.png")
    words = ["--samples", tmp_path / "images", "--prompts", tmp_path / "prompts", "--export", "dpg"]
    evaluate(*words, "--export-to", tmp_path / "out")
    for number in range(1, 13):
        with Image.open(tmp_path / f"out/p{number}.png") as grid:
            assert grid.getcolors() == [(256, (number, 0, 0))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "clip_score"], "--metrics clip_score needs --clip ID_OR_FOLDER"),
        (["--metrics", "clip_score", "--clip", "x", "--pick", "y"], "--pick is for --metrics pick_score"),
        (["--metrics", "clip_score", "--clip", "x", "--pick-processor", "y"], "--pick-processor is for --metrics"),
        (["--metrics", "clip_score", "--clip", "x", "--resume"], "--resume is for --export"),
        (
            ["--metrics", "clip_score", "--clip", "no/model"],
            "error: --clip no/model: no such folder here, and not in the local cache",
        ),
        (["--metrics", "clip_score", "--clip", "x", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--metrics", "clip_score", "--images-per-prompt", "3"], "6 images, but 3 prompts x 3 = 9 are needed"),
        (["--metrics", "clip_score", "--clip", "/nope"], "error: --clip /nope: no such folder"),
        (["--metrics", "pick_score", "--pick", "/nope"], "error: --pick /nope: no such folder"),
        (["--export", "dpg"], "--export needs --export-to FOLDER"),
        (["--export", "dpg", "--export-to", "x", "--clip", "y"], "--clip is for --metrics"),
        (["--export", "dpg", "--export-to", "x"], "its prompts have no ids"),
        (["--metrics", "clip_score", "--by-order"], "--by-order is for prompts that have ids"),
        (["--metrics", "clip_score", "--export", "dpg"], "not allowed with argument"),
        ([], "one of the arguments --metrics --export --protocol is required"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    evaluate: Any, given: list[object], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate(*given, *words)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
    assert caught.value.code == 2
    assert len(error) == 1 and message in error[0]


@pytest.fixture
def refused(evaluate: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command, which must fail; => its message."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit):
            evaluate(*words)
        return capsys.readouterr().err

    return run


def test_a_place_that_cannot_take_the_result_is_refused_before_models_are_opened(
    refused: Any, given: list[object], tmp_path: Path
) -> None:
    (tmp_path / "notes.json").write_text('{"years": "of work"}')
    for output, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "notes.json", "exists and is no result of an evaluation"),
        (tmp_path / "notes.json/result.json", "notes.json is a file, so that no folder can be made there"),
        ("/proc/repagen/result.json", "nothing can be written in /proc"),
    ):
        words = ["--metrics", "clip_score", "--clip", "no/model", "--output", output]
        assert f"error: --output {output}" in (error := refused(*given, *words)) and message in error
    assert (tmp_path / "notes.json").read_text() == '{"years": "of work"}'
    words = ["--export", "geneval", "--export-to", tmp_path / "notes.json"]
    assert f"error: --export-to {tmp_path / 'notes.json'} is a file; name a folder" in refused(*given, *words)


def test_an_earlier_result_is_replaced(evaluate: Any, given: list[object], clip_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        evaluate(*given, "--metrics", "clip_score", "--clip", clip_folder, "--output", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["num_samples"] == 6
    assert not list(tmp_path.glob(".tmp*"))


def test_a_message_about_the_processor_names_its_option(refused: Any, given: list[object], pick_folder: Path) -> None:
    words = [*given, "--metrics", "pick_score", "--pick", pick_folder, "--pick-processor"]
    assert "error: --pick-processor /nope: no such folder" in refused(*words, "/nope")


@pytest.mark.parametrize("task", ["score", "export"])
def test_unreadable_images_stop_the_run_and_are_all_listed(
    evaluate: Any, given: list[object], clip_folder: Path, geneval_prompts: PromptSet, tmp_path: Path, task: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number in (1, 5):
        (tmp_path / f"images/{number:05d}.png").write_bytes(b"no picture")
    words = ["--metrics", "clip_score", "--clip", clip_folder]
    if task == "export":
        given[given.index("--prompts") + 1], given[-1] = geneval_prompts.path, 3
        words = ["--export", "geneval", "--export-to", tmp_path / "out", "--any-count"]
    with pytest.raises(SystemExit):
        evaluate(*given, *words, "--batch-size", 2)
    error = capsys.readouterr().err
    assert "2 unreadable images, 0 allowed: 00001.png (not a PNG" in error and "00005.png" in error
    assert "--max-bad-images" not in error


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(
    evaluate: Any, random_pictures: Any, write_pictures: Any, prompts_of: Any, clip_folder: Path, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "many", random_pictures(40, seed=3))
    words = ["--samples", folder, "--prompts", prompts_of(5 * TEXTS[:2]).path, "--images-per-prompt", 4]
    words += ["--metrics", "clip_score", "--clip", clip_folder, "--batch-size", 32, "--output"]
    evaluate(*words, tmp_path / "1.json")
    script = tmp_path / "evaluate.py"  # accelerate joins processes on CPUs only where an Accelerator asks for it
    script.write_text(
        "from accelerate import Accelerator\nfrom repagen.cli import main\n"
        "accelerator = Accelerator()\nmain()\naccelerator.end_training()\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command = [sys.executable, *launch, "evaluate", "text-to-image", *map(str, words), str(tmp_path / "2.json")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CLIPScore (cosine)") == 1
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json"))
    assert one.pop("wall_time_s") > 0 and two.pop("wall_time_s") > 0
    assert one.pop("metrics") == pytest.approx(two.pop("metrics"), rel=1e-5)
    for mine, other in zip(one.pop("per_prompt"), two.pop("per_prompt"), strict=True):
        assert mine["id"] == other["id"] and mine["clip_score"] == pytest.approx(other["clip_score"], abs=1e-6)
    assert one == two
