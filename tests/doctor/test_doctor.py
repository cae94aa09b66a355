"""`repagen doctor`: what works here, and whether data and models are sound."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_pipelines import TEXT_LENGTH, tiny_text_pipeline
from safetensors.torch import load_file, save_file

import repagen
from repagen.data import CaptionConfig, DataConfig
from repagen.doctor import command, hub, machine
from repagen.doctor.dataset import check_dataset
from repagen.doctor.model import check_model
from repagen.doctor.report import Finding, Report, Section, readable_size
from repagen.errors import OneLineParser, ProblemsFound, UserError
from repagen.layers.attention_trial import AttentionTrial


def parse(*words: str) -> argparse.Namespace:
    parser = OneLineParser(prog="repagen doctor")
    command.add_arguments(parser)
    return parser.parse_args(words)


def finding(section: Section, name: str) -> Finding:
    [found] = [one for one in section.findings if one.name == name]
    return found


def write_picture(path: Path, seed: int, width: int = 20, height: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    folder = tmp_path / "birds"
    for number in range(6):
        write_picture(folder / "crane" / f"{number}.png", number)
    for number in range(2):
        write_picture(folder / "owl" / f"{number}.png", 100 + number, 16, 40)
    return folder


def check(folder: Path, **settings: Any) -> Section:
    return check_dataset(DataConfig(path=str(folder), image_size=16, **settings))


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_whole_report(birds: Path, tmp_path: Path) -> None:
    words = ["data.image_size=16", f"data.path={birds}", "--json", str(tmp_path / "report.json")]
    text = command.run(parse(*words))
    for line in ("Software", "Hardware", "Attention backends, tried", "Hugging Face Hub", "Dataset"):
        assert line in text.splitlines()
    assert "native on cpu         samples and trains in float32, bfloat16, float16" in text
    assert "flash, flash_varlen: needs the package flash_attn, which is not installed" in text
    assert text.endswith("no problem found") and "Traceback" not in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == 0
    versions = {one["name"]: one["facts"]["version"] for one in report["sections"]["Software"]}
    assert (versions["repagen"], versions["torch"].split("+")[0]) == (
        repagen.__version__,
        torch.__version__.split("+")[0],
    )


def test_problems_are_told_apart_from_wrong_usage(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "attention", lambda: Section("Attention backends, tried", []))
    (birds / "owl/0.png").write_bytes(b"")
    with pytest.raises(ProblemsFound) as caught:
        command.run(parse(f"data.path={birds}", "--model", "no/such"))
    assert "! broken images" in str(caught.value) and str(caught.value).endswith("2 problems, marked with !")
    for words in (["data.nonsense=1"], ["--json", "no/such/folder/report.json"], ["--no-such-option"]):
        with pytest.raises(UserError):
            command.run(parse(*words))


def test_a_folder_for_the_json_is_refused_before_any_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "software", lambda: pytest.fail("checks began"))
    with pytest.raises(UserError, match="this is a folder; name a file"):
        command.run(parse("--json", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_marks_and_counts() -> None:
    findings = [Finding("a", "fine"), Finding("bcd", "look", "note", ["why"]), Finding("e", "bad", "problem")]
    assert Report([Section("Part", findings)]).text().splitlines() == [
        "Part", "  a    fine", "- bcd  look", "         why", "! e    bad", "", "1 problem, marked with !",
    ]  # fmt: skip
    assert [readable_size(size) for size in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]


# --- the machine ---------------------------------------------------------------------------------------------------


def test_a_backend_with_wrong_values_is_a_problem_and_a_missing_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {
        "native": AttentionTrial(0.0, 0.0, 0.1),
        "flex": AttentionTrial(0.0, None, 0.1, "no backward here"),
        "xformers": AttentionTrial(0.5, None, 0.1),
    }
    absent = AttentionTrial(None, None, 0.1, "attention backend needs a GPU")
    monkeypatch.setattr(machine, "try_attention", lambda name, device, dtype: outcomes.get(name, absent))
    section = machine.attention()
    assert finding(section, "xformers on cpu").level == "problem"
    assert finding(section, "flex on cpu").text == "only samples in float32, bfloat16, float16"
    assert finding(section, "flex on cpu").details == ["no backward here"]
    assert [one.name for one in section.findings if one.level == "problem"] == ["xformers on cpu"]
    outcomes["native"] = absent
    assert "native" in " ".join(one.text for one in machine.attention().findings if one.name == "not on cpu")


def test_the_compiler_is_tried_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_COMPILED", "import sys; assert sys.argv[1] == 'cpu'")
    assert finding(machine.computations(compiler=True), "torch.compile on cpu").text == "works"
    monkeypatch.setattr(machine, "_COMPILED", "raise RuntimeError('no C++ compiler\\nfound')")
    assert (
        finding(machine.computations(compiler=True), "torch.compile on cpu").text
        == "refused: RuntimeError: no C++ compiler; leave it off"
    )

    def hang(*arguments: Any, **options: Any) -> Any:
        raise subprocess.TimeoutExpired("python", options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert "did not end" in finding(machine.computations(compiler=True), "torch.compile on cpu").text


def test_disks_of_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    section = machine.hardware([("results", tmp_path / "a" / "b")])
    assert finding(section, "disk of results").facts["free"] == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.05
    )


# --- the Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception | None]:
    """As if online: repository => what the Hub answers to a question for access."""
    answers: dict[str, Exception | None] = {}

    def auth_check(repo_id: str) -> None:
        if (answer := answers.get(repo_id)) is not None:
            raise answer

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.auth_check", auth_check)
    return answers


def test_offline_nothing_is_asked_and_a_token_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    report = Report([hub.hub([])])
    assert "hf_secret" not in report.text() + json.dumps(report.as_dict())
    assert finding(report.sections[0], "token").text == "there is one (not shown)"
    gated = finding(report.sections[0], "gated facebook/dinov3-vitb16-pretrain-lvd1689m")
    assert (gated.level, gated.text) == ("note", "not asked, HF_HUB_OFFLINE is set")


def test_access_to_gated_encoders(online: dict[str, Exception | None]) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    response = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
    online["facebook/pixio-vitb16"] = GatedRepoError("closed", response=response)
    online["org/encoder"] = OSError("no route")
    section = hub.hub(["org/encoder", "org/open"])
    assert finding(section, "gated facebook/dinov3-vitb16-pretrain-lvd1689m").text == "access granted"
    pixio = finding(section, "gated facebook/pixio-vitb16")
    assert "accept its licence at https://huggingface.co/facebook/pixio-vitb16" in pixio.text
    unreached = finding(section, "encoder org/encoder")
    assert unreached.level == "problem" and "(the Hub is out of reach (no route))" in unreached.text
    assert finding(section, "encoder org/open").text == "not here, and may be fetched: `hf download org/open`"


def test_a_hub_that_refuses_or_stays_silent_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(hub, "FAMILIES", {})
    monkeypatch.setattr(hub, "TEXT_FAMILIES", {})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):
            monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{port}")
            unreached = finding(hub.hub(["org/encoder"]), "encoder org/encoder")
            assert unreached.level == "problem" and "the Hub is out of reach" in unreached.text


def test_an_encoder_in_a_folder_is_here(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    section = hub.hub([str(tmp_path), str(tmp_path / "none")])
    assert finding(section, f"encoder {tmp_path}").text == f"here: 5 B in {tmp_path}"
    assert finding(section, f"encoder {tmp_path / 'none'}").level == "problem"


# --- a dataset -----------------------------------------------------------------------------------------------------


def test_a_sound_dataset(birds: Path) -> None:
    section = check(birds)
    assert not Report([section]).problems
    assert finding(section, "images").text == "8 in 2 classes"
    assert finding(section, "balance").facts == {"crane": 6, "owl": 2}
    assert finding(section, "balance").text == "2 to 6 a class, median 4; largest 'crane', smallest 'owl', 3 : 1"
    assert finding(section, "sizes").facts["shortest"] == 16 and finding(section, "sizes").level == "ok"
    assert finding(section, "duplicates").text == "none"


def test_every_broken_file_is_listed(birds: Path, tmp_path: Path) -> None:
    for number in range(30):
        (birds / "owl" / f"bad{number:02d}.jpg").write_bytes(b"no image")
    (birds / "owl/film.gif").write_bytes(b"GIF89a")
    section = check(birds)
    broken, formats = finding(section, "broken images"), finding(section, "formats")
    assert (broken.level, broken.facts["count"], len(broken.facts["all"])) == ("problem", 30, 30)
    assert broken.details[0] == f"{birds}/owl/bad00.jpg: not a PNG, JPEG, WEBP, BMP image"
    assert broken.details[-1] == "and 10 more; --json FILE lists all"
    assert formats.level == "problem" and formats.details == [f"{birds}/owl/film.gif"]
    assert not Report([check(birds, max_bad_images=30)]).problems


def test_small_and_uneven_and_repeated_images_are_noted(birds: Path) -> None:
    write_picture(birds / "owl/small.png", 7, 15, 15)
    shutil.copy(birds / "crane/0.png", birds / "crane/copy.png")
    for number in range(60):
        write_picture(birds / "crane" / f"more{number}.png", 200 + number)
    section = check(birds)
    assert not Report([section]).problems
    assert finding(section, "sizes").details == ["smaller than data.image_size=16, and enlarged in training: 1"]
    assert finding(section, "balance").level == "note"
    assert finding(section, "duplicates").text == "copies of other images: 1, each within its class"
    with Image.open(birds / "crane/0.png") as image:
        image.save(birds / "owl/other.bmp")  # equal pixels in another format and class
    repeated = finding(check(birds), "duplicates")
    assert repeated.level == "problem" and repeated.text.endswith("pictures in several classes: 1")
    assert f"{birds}/owl/other.bmp" in repeated.details[0]


def test_captions_are_counted_measured_and_missing_ones_listed(birds: Path, tmp_path: Path) -> None:
    for number in range(5):
        (birds / "crane" / f"{number}.txt").write_text("a crane\nanother crane in water" if number else "a bird")
    section = check(birds, captions=CaptionConfig())
    captions = finding(section, "captions")
    assert captions.level == "problem" and captions.facts["count"] == 3
    assert captions.text.startswith(
        "9 for 5 of 8 images, 6 to 22 characters, median 7; images whose caption others have too: 4;"
    )
    assert captions.details[0] == f"{birds}/crane/5.png"
    assert finding(check(birds, captions=CaptionConfig(missing="empty")), "captions").level == "note"
    for number in range(2):
        (birds / "owl" / f"{number}.txt").write_text(f"owl {number}")
    (birds / "crane" / "5.json").write_text('"one crane"')
    assert finding(check(birds, captions=CaptionConfig()), "captions").level == "note"
    buckets = check(birds, buckets=["1:1", "1:2"], bucket_step=8, index_folder=str(tmp_path / "index"))
    assert finding(buckets, "buckets").text == "images per height x width: 16x16: 6, 24x8: 2"


def test_what_cannot_be_opened_is_a_problem(tmp_path: Path, birds: Path) -> None:
    (tmp_path / "empty" / "heron").mkdir(parents=True)
    for name, message in (("none", "does not exist"), ("empty", "holds no images")):
        [problem] = check(tmp_path / name).findings
        assert problem.level == "problem" and message in problem.text


def test_behind_a_wrong_layout_everything_else_is_found(birds: Path) -> None:
    (birds / "heron").mkdir()
    write_picture(birds / "beside.png", 7)
    (birds / "owl" / "half.png").write_bytes((birds / "owl" / "0.png").read_bytes()[:60])
    (birds / "owl" / "scan.tiff").write_bytes(b"")
    section = check(birds)
    layout = [found.text for found in section.findings if found.name == "dataset"]
    assert ["holds images (beside.png ...) beside folders" in layout[0], "without images: heron" in layout[1]] == [
        True,
        True,
    ]
    problems = [found.name for found in Report([section]).problems]
    assert problems == ["dataset", "dataset", "balance", "formats", "broken images"]


def test_other_kinds_of_data(tmp_path: Path) -> None:
    section = check_dataset(DataConfig(kind="digits", subset="validation", image_size=32))
    assert finding(section, "images").text == "355 in 10 classes" and not Report([section]).problems
    write_picture(tmp_path / "flat/a.png", 0)
    assert finding(check(tmp_path / "flat"), "images").text == "1, without classes"


# --- a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    transformer = repagen.SiTTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3
    )
    pipe = repagen.ClassToImagePipeline(
        transformer=transformer,
        vae=repagen.PixelAutoencoder(image_size=4),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        id2label={"0": "crane", "1": "owl"},
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder, pipe


def test_the_parts_of_a_model(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, pipe = saved
    (folder / "training.json").write_text('{"recipe": "a tiny one", "step": 5}')
    section = check_model(str(folder))
    numbers = {
        name: sum(x.numel() for x in getattr(pipe, name).state_dict().values()) for name in ("transformer", "vae")
    }
    assert finding(section, "transformer").facts["numbers"] == numbers["transformer"]
    assert finding(section, "memory of weights").facts["bfloat16"] == 2 * sum(numbers.values())
    assert finding(section, "classes").text == "3: 0 crane, 1 owl"
    assert finding(section, "classes").details == ["1 of them have no name in id2label"]
    assert finding(section, "training").text == "recipe a tiny one, step 5"
    assert finding(section, "loading").text == "works on the CPU, and all weights are finite"


def test_a_model_of_prompts(tmp_path: Path) -> None:
    pipe: Any = tiny_text_pipeline()
    pipe.save_pretrained(tmp_path)
    section = check_model(str(tmp_path))
    numbers = sum(value.numel() for value in pipe.text_encoder.state_dict().values())
    assert finding(section, "text_encoder").facts["numbers"] == numbers
    assert finding(section, "prompts").text == f"t5 reads {TEXT_LENGTH} tokens"
    assert finding(section, "loading").text == "works on the CPU, and all weights are finite"
    assert not [one for one in section.findings if one.name == "classes"]

    change_json(tmp_path / "text_encoder/config.json", encoders_stored=False)
    assert "its weights are not inside" in finding(check_model(str(tmp_path)), "prompts").text
    shutil.rmtree(tmp_path / "text_encoder")
    assert [one.name for one in Report([check_model(str(tmp_path))]).problems] == ["text_encoder"]


def test_a_damaged_model_is_a_problem(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    [problem] = Report([check_model(str(folder))]).problems
    assert "its header claims" in problem.text
    shutil.rmtree(folder / "transformer")
    assert [one.name for one in Report([check_model(str(folder))]).problems] == ["transformer"]
    (folder / "model_index.json").write_text("{")
    assert "it cannot be read as JSON" in Report([check_model(str(folder))]).problems[0].text
    assert "no model_index.json" in Report([check_model(str(tmp_path))]).problems[0].text
    assert "no such folder, and no pipeline of that Hub id in the local cache" in Report([check_model("org/x")]).text()


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_weights(path: Path) -> None:
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, path)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", Path.unlink, "diffusion_pytorch_model"),
        ("vae/config.json", Path.unlink, "config.json"),
        ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json"),
        (
            "model_index.json",
            lambda path: path.write_text("{}"),
            "a ClassToImagePipeline or TextToImagePipeline is needed",
        ),
        ("model_index.json", lambda path: change_json(path, _class_name="DiTPipeline"), "holds a DiTPipeline"),
        ("model_index.json", lambda path: change_json(path, id2label=["crane"]), "id2label is"),
        ("transformer/config.json", lambda path: change_json(path, num_classes="3"), "str"),
        ("training.json", lambda path: path.write_text("[]"), "must hold a JSON object, got list"),
        ("transformer/diffusion_pytorch_model.safetensors", spoil_weights, "1 tensors hold infinite values or NaN"),
    ],
)
def test_a_model_that_cannot_be_used_is_a_problem(
    saved: tuple[Path, Any], tmp_path: Path, name: str, spoil: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    spoil(folder / name)
    [problem] = Report([check_model(str(folder))]).problems
    assert message in problem.text


def test_a_check_that_breaks_off_is_a_problem_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*arguments: Any, **options: Any) -> Section:
        raise ZeroDivisionError("by zero")

    for name in ("hardware", "computations", "attention", "hub"):
        monkeypatch.setattr(command, name, break_off)
    with pytest.raises(ProblemsFound) as caught:
        command.run(parse())
    assert str(caught.value).count("! check  ZeroDivisionError: by zero") == 4 and "Software" in str(caught.value)
