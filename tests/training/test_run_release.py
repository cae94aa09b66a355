"""Runs end with a card and a grid beside the weights, and on the Hub where asked; a failed push loses nothing."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_parts import settings as decoder_settings
from decoder_parts import words
from decoder_parts import write_parts as write_decoder_parts
from finetune_parts import finetune, finetune_settings, write_images, write_pipeline
from folders import folder_bytes
from generator_parts import settings, train_settings, write_parts
from hub_uploads import UPLOAD_WARNING, UploadHub, serve_uploads
from huggingface_hub import ModelCard
from PIL import Image

from repagen import ClassToImagePipeline, RepresentationAutoencoder, UserError
from repagen.config import load_config
from repagen.hub import push_command
from repagen.hub.publishing import publish_folder
from repagen.training import decoder, end_to_end
from repagen.training.decoder_config import DecoderConfig
from repagen.training.end_to_end_config import EndToEndConfig
from repagen.training.finetune_config import load_finetune_config

pytestmark = UPLOAD_WARNING


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with serve_uploads(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def generator_settings(parts: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    values = {**settings(parts, folder), "max_steps": 2, "recipe": {"title": "Tiny", "paper": "None, 2026"}, **changes}
    values["sample"] = {"num_images": 4}
    return values


def assert_pushed(uploads: UploadHub, repo_id: str, folder: Path, branch: str = "main") -> ModelCard:
    """The repository holds the folder, with its name in the card; => the card."""
    pushed = uploads.files(repo_id, branch)
    for name, content in folder_bytes(folder).items():
        if not name.endswith((".json", "README.md")):
            assert pushed[name] == content, name
    readme = folder_bytes(folder)["README.md"].decode()
    where = f'"{repo_id}"' + ("" if branch == "main" else f', revision="{branch}"')
    assert pushed["README.md"].decode() == readme.replace('"ORG/NAME"', where).replace("ORG/NAME", repo_id)
    assert uploads.commits == [(repo_id, branch, uploads.commits[0][2])]
    return ModelCard.load(uploads.branch(repo_id, branch) / "README.md")


def test_a_generator_run_pushes_pipeline_card_and_grid(uploads: UploadHub, parts: Path, tmp_path: Path) -> None:
    evaluation = {
        "every_images": 16,
        "num_samples": 20,
        "extractor": str(parts / "encoder"),
        "reference": ["data.kind=digits", "data.image_size=32", "data.subset=validation"],
    }
    values = generator_settings(
        parts, tmp_path, evaluation=evaluation, push_to_hub="org/digits", hub_private=True, hub_revision="v1"
    )
    run = train_settings(values, tmp_path / "work")
    assert uploads.private["org/digits"]
    card = assert_pushed(uploads, "org/digits", run / "pipeline", "v1")
    assert card.data.library_name == "repagen" and "Tiny" in card.text and "None, 2026" in card.text
    figures = {result.metric_type: result for result in card.data.eval_results}
    assert figures["fd_encoder"].metric_args["num_samples"] == 20
    assert figures["fd_encoder"].metric_args["step"] == 2
    assert "| images seen | 16 |" in card.text and "10 classes" in card.text
    assert str(tmp_path) not in card.content and str(parts) not in card.content
    with Image.open(uploads.branch("org/digits", "v1") / "samples.png") as grid:
        assert grid.size == (2 * 32 + 2, 2 * 32 + 2)
    loaded, own = (
        ClassToImagePipeline.from_pretrained(f) for f in (uploads.branch("org/digits", "v1"), run / "pipeline")
    )
    draws = []
    for pipe in (loaded, own):
        pipe.set_progress_bar_config(disable=True)
        draws.append(pipe(class_labels=["3"], generator=torch.Generator().manual_seed(0), output_type="pt").images)
    assert torch.equal(*draws)


def test_a_decoder_run_pushes_autoencoder_card_and_reconstructions(
    uploads: UploadHub, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    values = {
        **decoder_settings(write_decoder_parts(tmp_path_factory.mktemp("decoder"))),
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "global_batch_size": 4,
        "sample.num_images": 3,
        "lpips.weight": 0,
        "adversarial.weight": 0,
        "push_to_hub": "org/rae",
    }
    folder = decoder.train(load_config(DecoderConfig, "rae_decoder_vitxl_dinov2b", words(values)))
    card = assert_pushed(uploads, "org/rae", folder)
    assert "repagen.RepresentationAutoencoder.from_pretrained" in card.text and "dinov2_with_registers" in card.text
    with Image.open(folder / "samples.png") as grid:
        assert grid.size == (2 * 32, 2 * 64)
    loaded, own = (RepresentationAutoencoder.from_pretrained(f).eval() for f in (uploads.branch("org/rae"), folder))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        latents = own.encode(images).latent
        assert torch.equal(loaded.encode(images).latent, latents)
        assert torch.equal(loaded.decode(latents).sample, own.decode(latents).sample)


def test_an_end_to_end_run_pushes_its_pipeline(uploads: UploadHub, parts: Path, tmp_path: Path) -> None:
    values = {
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "global_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "progress_bar": "false",
        "data.kind": "digits",
        "data.path": "null",
        "data.image_size": 32,
        "autoencoder.path": parts / "kl",
        "alignment.targets.0.encoder": parts / "encoder",
        "alignment.targets.0.block": 1,
        "alignment.targets.0.projector_dim": 16,
        "transformer.overrides": "{hidden_size: 16, depth: 2, num_heads: 2}",
        "autoencoder_training.lpips.weight": 0,
        "autoencoder_training.adversarial.weight": 0,
        "sampler.num_inference_steps": 2,
        "sample.every_steps": 0,
        "sample.num_images": 2,
        "push_to_hub": "org/joint",
    }
    folder = end_to_end.train(load_config(EndToEndConfig, "repa_e", words(values)))
    card = assert_pushed(uploads, "org/joint", folder)
    assert "AutoencoderKL" in card.text and (folder / "samples.png").is_file()


def test_a_failed_push_leaves_the_release_and_says_how_to_push_it(
    uploads: UploadHub, parts: Path, tmp_path: Path
) -> None:
    uploads.faults["POST .*/commit/"] = 500
    with pytest.raises(UserError, match=r"push_to_hub: org/x: the Hub answered 500; try again later") as raised:
        train_settings(generator_settings(parts, tmp_path, push_to_hub="org/x", hub_private=True), tmp_path / "work")
    release = tmp_path / "work" / "run" / "pipeline"
    ClassToImagePipeline.from_pretrained(release)
    [command] = re.findall(r"`repagen push (.*)`", str(raised.value))
    assert command == f"{release} --to org/x --private"
    uploads.faults.clear()
    parser = argparse.ArgumentParser()
    push_command.add_arguments(parser)
    push_command.run(parser.parse_args(command.split()))
    assert_pushed(uploads, "org/x", release)


def test_what_keeps_a_result_from_the_hub_is_found_before_the_training(
    uploads: UploadHub, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads.faults["auth-check/write"] = 403
    with pytest.raises(UserError, match=r"^push_to_hub: org/x: the Hub answered 403; the token may not write there"):
        train_settings(generator_settings(parts, tmp_path, push_to_hub="org/x"), tmp_path / "work")
    assert not list(tmp_path.glob("work/run/**/*.safetensors"))


@pytest.mark.parametrize(("mode", "pipeline"), [("full", True), ("lora", False), ("labels", False), ("decoder", True)])
def test_fine_tuning_knows_whether_it_releases_a_pipeline(mode: str, pipeline: bool) -> None:
    words = ["pipeline=org/x", "data.path=photos", "output_dir=out"]
    assert load_finetune_config(f"finetune_{mode}", words).releases_pipeline == pipeline


def test_a_repository_of_another_kind_is_found_before_the_training(
    uploads: UploadHub, parts: Path, tmp_path: Path
) -> None:
    uploads.open("org/x")
    uploads.write("org/x", "main", "config.json", b"{}")
    with pytest.raises(
        UserError, match=r"^push_to_hub: org/x: holds a model or adapter already, but a pipeline shall"
    ):
        train_settings(generator_settings(parts, tmp_path, push_to_hub="org/x"), tmp_path / "work")
    assert not list(tmp_path.glob("work/run/**/*.safetensors"))


def test_a_run_that_cannot_begin_leaves_nothing_on_the_hub(uploads: UploadHub, parts: Path, tmp_path: Path) -> None:
    values = generator_settings(parts, tmp_path, push_to_hub="org/x", hub_revision="v1")
    values["autoencoder"] = {"path": str(tmp_path / "absent")}
    with pytest.raises(UserError, match="absent"):
        train_settings(values, tmp_path / "work")
    assert uploads.requests and not uploads.private


def test_a_run_without_push_has_card_and_grid_and_may_be_pushed_when_it_goes_on(
    uploads: UploadHub, parts: Path, tmp_path: Path
) -> None:
    values = generator_settings(parts, tmp_path)
    run = train_settings(values, tmp_path / "work")
    assert not uploads.requests
    first = folder_bytes(run / "pipeline")
    assert b'from_pretrained("ORG/NAME")' in first["README.md"] and first["samples.png"].startswith(b"\x89PNG")
    train_settings({**values, "push_to_hub": "org/x"}, tmp_path / "work")
    assert folder_bytes(run / "pipeline") == first
    assert_pushed(uploads, "org/x", run / "pipeline")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push_to_hub": "name"}, "push_to_hub: must be a repository of the Hub as org/name"),
        ({"hub_revision": "v1"}, "hub_revision: must be left out without push_to_hub"),
        ({"hub_private": True}, "hub_private: must be left out without push_to_hub"),
    ],
)
def test_settings_without_effect_are_refused(
    parts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_settings(generator_settings(parts, tmp_path, **changes), tmp_path / "work")


# --- fine-tuning ---------------------------------------------------------------------------------------------------


def tuned(uploads: UploadHub, images: Path, folder: Path, mode: str, *words: str) -> tuple[str, str]:
    """Tune the pipeline of `org/base` for two steps and push: => the card's text, and its lines."""
    values = {**finetune_settings(Path("org/base"), images, mode), "max_steps": 2, "sample": {"num_images": 2}}
    finetune(values, folder / mode, f"push_to_hub=org/{mode}", *words)
    card = ModelCard.load(uploads.branch(f"org/{mode}") / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.base_model_relation == ("adapter" if mode in ("lora", "labels") else "finetune")
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return card.text, code


@pytest.mark.slow
def test_the_cards_of_fine_tuning_are_right_and_their_lines_run(uploads: UploadHub, tmp_path: Path) -> None:
    publish_folder(write_pipeline(tmp_path / "parts"), "org/base")
    known = write_images(tmp_path / "known", ["dog", "cat"], count=2)
    mixed = write_images(tmp_path / "mixed", ["bird", "cat"], count=3)
    text, of_lora = tuned(uploads, known, tmp_path, "lora", "prior.images_per_class=2")
    assert "| images | 6, of them 2 drawn from the pipeline before the training |" in text
    assert "| classes | 2 |" in text and "LoRA layers of its generator." in text and "class_labels=['dog']" in of_lora
    assert f'"org/base", revision="{uploads.commit_of("org/base", "main")}"' in of_lora and "ORG/BASE" not in text
    text, of_labels = tuned(uploads, mixed, tmp_path, "labels")
    assert "| images | 6 |" in text and "label rows of 1 new class; the generator" in text and "['bird']" in of_labels
    text, of_full = tuned(uploads, mixed, tmp_path, "full")
    assert "| classes | 2 |" in text and "['bird']" in of_full and "Images of this model:" in text
    text, of_decoder = tuned(uploads, mixed, tmp_path, "decoder")
    assert "| classes | 2 |" in text and "['tabby']" in of_decoder and "Images above their reconstructions:" in text
    environment = {
        **os.environ, "HF_ENDPOINT": uploads.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*",
    }  # fmt: skip
    code = "".join(f"{code}print(image.size)\n" for code in (of_lora, of_labels, of_full, of_decoder))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["(32,", "32)"] * 4
