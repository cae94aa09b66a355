from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import repagen
from repagen import cli
from repagen.data.shapes import sample_scene
from repagen.data.shapes.dataset import VALIDATION_SEED
from repagen.evaluation import generation_command, open_images

ROOT = Path(__file__).parents[2]
DIGITS = ["data.kind=digits", "data.image_size=32"]


@pytest.fixture
def evaluate(encoder_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `repagen evaluate generation`, in the tiny encoder's space unless told otherwise; => its output."""

    def run(*words: str, space: tuple[str, ...] = ("--extractor", str(encoder_folder))) -> str:
        monkeypatch.setattr(sys, "argv", ["repagen", "evaluate", "generation", *space, *words])
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def folders(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> tuple[str, str]:
    samples = write_pictures(tmp_path / "samples", random_pictures(60, seed=1))
    reference = write_pictures(tmp_path / "reference", random_pictures(80, seed=2))
    return str(samples), str(reference)


@pytest.fixture
def own_protocol(tmp_path: Path, encoder_folder: Path) -> tuple[str, str]:
    """Options that ask for a protocol of one's own: two spaces, random labels, truncated pixels."""
    space = f"extractor: {{kind: encoder, model: {encoder_folder}, pooling: POOLING}}"
    path = tmp_path / "own.yaml"
    path.write_text(
        "title: two readings of one encoder\nsource: this test\nlabel_mode: random\nrounding: truncate\n"
        f"num_samples: 40\nspaces:\n"
        f"  - name: patches\n    {space.replace('POOLING', 'mean')}\n    metrics: [fd, mind]\n"
        f"  - name: cls\n    {space.replace('POOLING', 'cls')}\n    metrics: [fd, density_coverage]\n"
    )
    return "--protocol", str(path)


def test_two_folders(evaluate: Any, folders: tuple[str, str], tmp_path: Path) -> None:
    output = evaluate("--samples", folders[0], "--reference", folders[1], "--output", f"{tmp_path}/out/result.json")
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert set(result["metrics"]) == {"fd_encoder", "precision_encoder", "recall_encoder"}
    assert (result["num_samples"], result["num_reference"]) == (60, 80)
    assert f"{result['metrics']['fd_encoder']:.6g}  (not comparable)" in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_a_protocol_of_ones_own(
    evaluate: Any, folders: tuple[str, str], own_protocol: tuple[str, str], pipeline_folder: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "result.json")
    model = ["--model", str(pipeline_folder), "--num-inference-steps", "2", "--seed", "3"]
    evaluate(*model, "--reference", folders[1], "--output", output, space=own_protocol)
    result = json.loads(Path(output).read_text())
    assert result["protocol"] == "own" and result["deviations"] == []
    assert set(result["metrics"]) == {"fd_patches", "mind_patches", "fd_cls", "density_cls", "coverage_cls"}
    assert result["samples"] == {
        "kind": "pipeline",
        "path": str(pipeline_folder),
        "label_mode": "random",
        "seed": 3,
        "rounding": "truncate",
        "forward_batch_size": 32,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "shift": 1.0,
        "scheduler_config": result["samples"]["scheduler_config"],
        "dtype": "float32",
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "guidance_interval": [0.0, 1.0],
        "zero_init_steps": 0,
        "size": "16x16",
        "pixels_sha256": result["samples"]["pixels_sha256"],
    }
    assert result["num_samples"] == 40
    assert result["samples"]["scheduler_config"]["stochastic_sampling"] is False


def test_a_text_pipeline_draws_the_captions_of_the_reference(
    evaluate: Any, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    call = repagen.TextToImagePipeline.__call__

    def listening(self: Any, prompt: Any, **options: Any) -> Any:
        asked.extend(prompt)
        return call(self, prompt, **options)

    monkeypatch.setattr(repagen.TextToImagePipeline, "__call__", listening)
    reference = ["data.kind=shapes", "data.subset=validation", "data.image_size=32", "data.num_images=24"]
    words = ["--model", str(text_folder), "--num-samples", "32", "--num-inference-steps", "2", "--metrics", "fd"]
    evaluate(*words, "--reference", *reference, "--output", str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())
    captions = [sample_scene(VALIDATION_SEED, index).prompts()[0].text for index in range(24)]
    assert sorted(asked[:24]) == sorted(captions) and asked[24:] == asked[:8]
    assert result["samples"]["label_mode"] == "prompts" and result["num_reference"] == 24


def test_a_text_pipeline_needs_a_reference_with_captions(
    evaluate: Any, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (([], "they are the captions of --reference"), (["--label-mode", "random"], "--label-mode")):
        with pytest.raises(SystemExit):
            evaluate("--model", str(text_folder), "--num-samples", "9", "--reference", *DIGITS, *more)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_samples_are_written_where_asked(
    evaluate: Any, folders: tuple[str, str], pipeline_folder: Path, tmp_path: Path, suffix: str
) -> None:
    saved, first, second = f"{tmp_path}/saved{suffix}", f"{tmp_path}/1.json", f"{tmp_path}/2.json"
    model = ["--model", str(pipeline_folder), "--num-samples", "37", "--num-inference-steps", "2"]
    evaluate(*model, "--reference", folders[1], "--save-samples", saved, "--output", first)
    evaluate("--samples", saved, "--reference", folders[1], "--output", second)
    one, other = (json.loads(Path(path).read_text()) for path in (first, second))
    assert one["samples"]["pixels_sha256"] == other["samples"]["pixels_sha256"]
    assert one["metrics"] == other["metrics"]
    if suffix:
        with np.load(saved, allow_pickle=False) as file:
            assert file.files == ["arr_0"] and file["arr_0"].shape == (37, 16, 16, 3)
        assert not list(tmp_path.glob(".tmp-*"))
    else:
        assert sorted(path.name for path in Path(saved).iterdir())[36] == "000036.png"


def test_saved_reference_statistics_give_the_same_distance_to_the_same_extractor_only(
    evaluate: Any, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, statistics, first, second = folders[0], *(f"{tmp_path}/{name}" for name in ("s.npz", "1.json", "2.json"))
    evaluate("--samples", samples, "--reference", folders[1], "--save-reference", statistics, "--output", first)
    evaluate("--samples", samples, "--reference", statistics, "--output", second)
    one, other = (json.loads(Path(path).read_text()) for path in (first, second))
    assert one["metrics"]["fd_encoder"] == pytest.approx(other["metrics"]["fd_encoder"], rel=1e-9)
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
        distances.append(json.loads(Path(output).read_text())["metrics"]["fd_encoder"])
    assert distances[0] < 0.1 * distances[1]


def test_bad_images_are_listed_or_left_out(
    evaluate: Any, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (3, 40):
        (Path(folders[0]) / f"{number:05d}.png").write_bytes(b"broken")
    Image.new("RGB", (16, 16)).save(Path(folders[0]) / "animated.gif")
    words = ["--samples", folders[0], "--reference", folders[1]]
    with pytest.raises(SystemExit):
        evaluate(*words)
    error = capsys.readouterr().err
    assert "3 unreadable images, 0 allowed" in error and "--max-bad 3" in error
    assert all(name in error for name in ("00003.png", "00040.png", "animated.gif"))
    evaluate(*words, "--max-bad", "3", "--output", f"{tmp_path}/result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_samples"] == 58
    assert result["samples"]["left_out"] == ["00003.png", "00040.png", "animated.gif"]
    crops = ["data.kind=folder", f"data.path={folders[0]}", "data.image_size=16"]
    with pytest.raises(SystemExit):
        evaluate("--samples", *crops, "--reference", folders[1])
    error = capsys.readouterr().err
    assert "2 unreadable images" in error and all(name in error for name in ("00003.png", "00040.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "missing", "--reference", *DIGITS], "no such folder of images: missing"),
        (["--samples", *DIGITS, "--reference", "missing"], "no such folder of images: missing"),
        (
            ["--samples", *DIGITS, "--reference", *DIGITS, "--guidance-scale", "2"],
            "--guidance-scale is for --model",
        ),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--seed", "1"], "--seed is for --model"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--lora", "x"], "--lora is for --model"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--save-samples", "x"], "--save-samples is for --model"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--max-bad", "-1"], "--max-bad must be at least 0"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--output", "."], "--output . is a folder"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--protocol", "adm256"], "exclude each other"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--extractor-weights", "w"], "weights are Inception's"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--normalisers", "missing"], "missing: cannot be read as a"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--save-reference", "r.json"], "files that end with .npz"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--output", "README.md"], "is no result of an evaluation"),
        (["--samples", *DIGITS, "--reference", *DIGITS, "--metrics", "fd", "fd"], "at least one metric, each once"),
        (
            ["--samples", *DIGITS, "--reference", *DIGITS, "--output", "/proc/x/y.json"],
            "nothing can be written in /proc",
        ),
        (["--model", "missing", "--reference", *DIGITS], "--model needs --num-samples"),
        (
            ["--model", "missing", "--num-samples", "9", "--reference", *DIGITS],
            "--model: pipeline 'missing': no such folder here, and not in the local cache",
        ),
        (
            ["--samples", *DIGITS, "--reference", "data.kind=digits", "data.image_size=16"],
            "samples: images are 32x32, those of the reference 16x16",
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


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (["--protocol", "adm"], "no protocol 'adm'"),
        ([], "Inception weights not found"),
        (["--metrics", "fd"], "--metrics is for --extractor; a protocol fixes it"),
        (["--extractor", "inception"], "Inception's metrics are those of --protocol torch-fidelity"),
        (["--protocol", "adm256"], "protocol adm256 compares with statistics"),
    ],
)
def test_a_wrong_protocol_is_one_line(
    evaluate: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    space: list[str], message: str, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    if "adm256" in space:
        space = [*space, "--extractor-weights", str(request.getfixturevalue("inception_file"))]
    with pytest.raises(SystemExit):
        evaluate("--samples", *DIGITS, "--reference", *DIGITS, space=tuple(space))
    assert message in capsys.readouterr().err


def test_statistics_of_another_image_size_are_refused(
    evaluate: Any, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = str(tmp_path / "digits.npz")
    evaluate("--samples", *DIGITS, "--reference", *DIGITS, "--save-reference", statistics)
    with pytest.raises(SystemExit):
        evaluate("--samples", folders[0], "--reference", statistics)
    assert "samples: images are 16x16, those of the reference 32x32" in capsys.readouterr().err


def test_a_folder_of_somebody_else_is_not_removed(
    evaluate: Any, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "result.json.partial"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        evaluate("--samples", folders[0], "--reference", folders[1], "--output", str(tmp_path / "result.json"))
    assert "would be removed with thesis.txt in it" in capsys.readouterr().err
    assert (place / "thesis.txt").exists()


def test_normalisers_without_a_ratio_are_refused(
    evaluate: Any, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "n.json").write_text('{"spaces": {"encoder": {"frechet_distance": 1.0}}, "source": "this test"}')
    with pytest.raises(SystemExit):
        evaluate("--samples", folders[0], "--reference", folders[1], "--normalisers", str(tmp_path / "n.json"))
    assert "normalisers are for FDr, which protocol custom does not measure" in capsys.readouterr().err


def test_adapters_are_part_of_what_was_evaluated(
    evaluate: Any, folders: tuple[str, str], pipeline_folder: Path, tmp_path: Path
) -> None:
    pipe: Any = repagen.ClassToImagePipeline.from_pretrained(pipeline_folder)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapter = tmp_path / "adapter"
    pipe.save_lora_weights(adapter, get_peft_model_state_dict(pipe.transformer, adapter_name="default"))
    words = ["--model", str(pipeline_folder), "--num-samples", "33", "--num-inference-steps", "2"]
    words += ["--reference", folders[1], "--output", str(tmp_path / "result.json")]

    def samples(*lora: str) -> Any:
        evaluate(*words, *lora)
        return json.loads((tmp_path / "result.json").read_text())["samples"]

    plain, whole, half = samples(), samples("--lora", str(adapter)), samples("--lora", f"{adapter}=0.5")
    assert "adapters" not in plain
    [fact] = half["adapters"]
    file = adapter / "pytorch_lora_weights.safetensors"
    assert fact == {"path": str(adapter), "weight": 0.5, "sha256": sha256(file.read_bytes()).hexdigest()}
    assert len({facts["pixels_sha256"] for facts in (plain, whole, half)}) == 3


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_saved_samples_survive_a_kill_before_the_result(
    evaluate: Any, folders: tuple[str, str], pipeline_folder: Path, tmp_path: Path, suffix: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    saved, output = tmp_path / f"saved{suffix}", str(tmp_path / "result.json")
    words = ["--model", str(pipeline_folder), "--num-samples", "37", "--num-inference-steps", "2"]
    words += ["--reference", folders[1], "--output", output]

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(generation_command, "_write", killed)
        evaluate(*words, "--save-samples", str(saved))
    elsewhere = tmp_path / f"elsewhere{suffix}"
    with pytest.raises(SystemExit):
        evaluate(*words, "--save-samples", str(elsewhere))
    assert "extractors or settings (written)" in capsys.readouterr().err
    evaluate(*words, "--save-samples", str(saved))
    assert len(open_images([str(saved)])) == 37
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(SystemExit):  # what is there belongs to a finished evaluation
        evaluate(*words, "--save-samples", str(saved))
    assert "exists and is not empty" in capsys.readouterr().err


def test_another_sampler_does_not_continue_an_interrupted_evaluation(
    evaluate: Any, folders: tuple[str, str], pipeline_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    words = ["--model", str(model), "--num-samples", "37", "--num-inference-steps", "2", "--reference", folders[1]]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(generation_command, "_write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        evaluate(*words, "--output", str(tmp_path / "result.json"))
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stochastic_sampling": True}))
    with pytest.raises(SystemExit):
        evaluate(*words, "--output", str(tmp_path / "result.json"))
    assert "extractors or settings (origin, source)" in capsys.readouterr().err


# --- processes -----------------------------------------------------------------------------------------------------


def started(words: list[str], processes: int = 1) -> list[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *(["-m", *launch] if launch else []), "eval/generation.py", *words]


def run_door(words: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = started(words, processes)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_processes_and_batch_sizes_give_one_result(
    encoder_folder: Path, pipeline_folder: Path, folders: tuple[str, str], tmp_path: Path
) -> None:
    """Every figure and every pixel; the statistics to 1e-12."""
    results, statistics, images = [], [], []
    for processes, batch_size in ((1, 7), (1, 32), (2, 7), (2, 32)):
        place = tmp_path / f"{processes}-{batch_size}"
        words = ["--model", str(pipeline_folder), "--num-samples", "151", "--num-inference-steps", "3"]
        words += ["--reference", folders[1], "--extractor", str(encoder_folder), "--batch-size", str(batch_size)]
        words += ["--output", f"{place}.json", "--save-samples", f"{place}", "--save-reference", f"{place}.npz"]
        done = run_door(words, processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Frechet distance") == 1
        results.append(json.loads(Path(f"{place}.json").read_text()))
        statistics.append(dict(np.load(f"{place}.npz", allow_pickle=False)))
        images.append([path.read_bytes() for path in sorted(place.iterdir())])
    assert len(images[0]) == 151
    for result, arrays, pngs in zip(results, statistics, images, strict=True):
        assert pngs == images[0]
        for name in ("mu_encoder.features", "sigma_encoder.features"):
            assert np.allclose(arrays[name], statistics[0][name], rtol=1e-12, atol=1e-14)
        assert result["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-9)
        assert result["samples"] == results[0]["samples"]


@pytest.mark.slow
def test_killed_at_ten_points_it_comes_to_the_same_score(
    encoder_folder: Path, folders: tuple[str, str], tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    samples = str(write_pictures(tmp_path / "many", random_pictures(1500, seed=3)))
    words = ["--samples", samples, "--reference", folders[1], "--extractor", str(encoder_folder), "--batch-size", "32"]
    whole, output = tmp_path / "whole.json", tmp_path / "killed.json"
    assert run_door([*words, "--output", str(whole)]).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    blocks = tmp_path / "killed.json.partial" / "samples"
    kills = 0
    for wanted in range(4, 44, 4):  # blocks on disk at which to kill
        with subprocess.Popen(
            started([*words, "--output", str(output)]), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and len(list(blocks.glob("*.json"))) < wanted:
                time.sleep(0.002)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
    assert kills == 10 and not output.exists()
    assert run_door([*words, "--output", str(output)]).returncode == 0
    one, other = (json.loads(path.read_text()) for path in (whole, output))
    assert one["metrics"] == other["metrics"]
    assert one["samples"]["pixels_sha256"] == other["samples"]["pixels_sha256"]
    assert not (tmp_path / "killed.json.partial").exists()
