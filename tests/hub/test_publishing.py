"""Publishing folders and objects: one commit, our card, flags that arrive, failures that break nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from folders import folder_bytes
from hub_uploads import UPLOAD_WARNING, UploadHub, reach, serve_uploads
from huggingface_hub import ModelCard
from pipelines.tiny_pipelines import (
    ID2LABEL,
    inputs,
    text_inputs,
    tiny_pipeline,
    tiny_text_encoder,
    tiny_text_pipeline,
    tiny_transformer,
)
from safetensors.torch import save_file

from repagen import (
    ClassToImagePipeline,
    FlowMatchHeunScheduler,
    RepresentationAutoencoder,
    SiTTransformer2DModel,
    TextToImagePipeline,
    UserError,
    VisionEncoder,
)
from repagen.export.remote_code import export_remote_code
from repagen.hub import push_command
from repagen.hub.publishing import check_repository, open_repository, publish_folder

pytestmark = UPLOAD_WARNING


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with serve_uploads(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline(id2label=ID2LABEL).save_pretrained(folder)
    return folder


def card(uploads: UploadHub, repo_id: str = "org/model", branch: str = "main") -> ModelCard:
    return ModelCard.load(uploads.branch(repo_id, branch) / "README.md")


def autoencoder_with_encoder() -> RepresentationAutoencoder:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    encoder = VisionEncoder.from_config(
        {"family": "vit_mae", "config": {"model_type": "vit_mae", "intermediate_size": 32, **sizes}}
    )
    return RepresentationAutoencoder.from_encoder(
        encoder, decoder={**decoder, "decoder_intermediate_size": 32}, image_size=32
    ).eval()


# --- what arrives --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_pushed_pipeline_is_there_whole_in_one_commit_and_draws_the_same(uploads: UploadHub) -> None:
    pipe = tiny_pipeline(id2label=ID2LABEL)
    address = pipe.push_to_hub("org/model", commit_message="First", private=True)
    assert uploads.commits == [("org/model", "main", "First")] and uploads.private["org/model"]
    assert address == f"{uploads.endpoint}/org/model/commit/{uploads.commit_of('org/model', 'main')}"
    loaded = ClassToImagePipeline.from_pretrained(uploads.branch("org/model"))
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(**inputs()).images, pipe(**inputs()).images)
    assert {"sample.py", "README.md"} <= uploads.files("org/model").keys()


def test_the_card_of_a_pipeline_is_ours(uploads: UploadHub, saved: Path) -> None:
    publish_folder(saved, "org/model")
    found = card(uploads)
    assert found.data.library_name == "repagen" and found.data.pipeline_tag == "unconditional-image-generation"
    assert found.data.license == "unknown" and "diffusers" in found.data.tags
    assert 'repagen.ClassToImagePipeline.from_pretrained("org/model")' in found.text
    assert "class_labels=['tabby']" in found.text and "Golden Retriever" in found.text
    assert "ORG/NAME" not in found.content
    assert not (saved / "README.md").exists()


@torch.no_grad()
def test_a_pipeline_of_prompts_is_published_with_its_text_encoder(uploads: UploadHub, tmp_path: Path) -> None:
    pipe = tiny_text_pipeline()
    pipe.save_pretrained(tmp_path / "saved")
    publish_folder(tmp_path / "saved", "org/text")
    loaded = TextToImagePipeline.from_pretrained(uploads.branch("org/text"))
    saved = TextToImagePipeline.from_pretrained(tmp_path / "saved")
    for one in (loaded, saved):
        one.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(**text_inputs()).images, saved(**text_inputs()).images)
    found = card(uploads, "org/text")
    assert found.data.pipeline_tag == "text-to-image" and "text_encoder" in found.text
    assert 'repagen.TextToImagePipeline.from_pretrained("org/text")' in found.text
    assert "| text encoder | t5 | unknown here | see the encoder's own card |" in found.text
    assert "--prompt" in uploads.branch("org/text").joinpath("sample.py").read_text()

    publish_folder(export_remote_code(tmp_path / "saved", tmp_path / "code"), "org/text", revision="remote-code")
    there = uploads.files("org/text", "remote-code")
    assert "text_encoder/tokenizer.0/tokenizer.json" in there
    assert "trust_remote_code=True" in card(uploads, "org/text", "remote-code").text


@torch.no_grad()
def test_a_saved_and_pushed_autoencoder_has_its_encoder_and_statistics(uploads: UploadHub, tmp_path: Path) -> None:
    model = autoencoder_with_encoder()
    model.set_statistics(torch.randn(model.latent_shape), 1 + torch.rand(model.latent_shape))
    model.save_pretrained(tmp_path / "rae", push_to_hub=True, repo_id="org/rae", private=True)
    assert uploads.private["org/rae"] and len(uploads.commits) == 1
    loaded = RepresentationAutoencoder.from_pretrained(uploads.branch("org/rae"))
    images = torch.rand(1, 3, 32, 32)
    latents = model.encode(images).latent
    assert torch.equal(loaded.encode(images).latent, latents)
    assert torch.equal(loaded.decode(latents).sample, model.decode(latents).sample)
    text = card(uploads, "org/rae").text
    assert "vit_mae" in text and "non-commercial" in text and "no commercial use" in text
    assert "repagen.RepresentationAutoencoder.from_pretrained" in text


def test_a_pushed_transformer_loads_and_names_its_repository_by_its_folder(uploads: UploadHub, tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "sit", push_to_hub=True)
    loaded = SiTTransformer2DModel.from_pretrained(uploads.branch("me/sit"))
    assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in model.state_dict().items())
    assert 'repagen.SiTTransformer2DModel.from_pretrained("me/sit")' in card(uploads, "me/sit").text


def test_a_revision_is_a_branch_and_the_card_names_it(uploads: UploadHub, saved: Path) -> None:
    publish_folder(saved, "org/model", revision="v1")
    assert list(uploads.files("org/model")) == [".gitattributes"]
    assert 'from_pretrained("org/model", revision="v1")' in card(uploads, branch="v1").text
    publish_folder(saved, "org/model", revision="v1")
    assert [branch for _, branch, _ in uploads.commits] == ["v1"] * 2


def test_a_folder_with_its_own_code_replaces_that_of_an_earlier_push(
    uploads: UploadHub, saved: Path, tmp_path: Path
) -> None:
    folder = export_remote_code(saved, tmp_path / "code")
    publish_folder(saved, "org/model")
    main = set(uploads.files("org/model"))
    publish_folder(folder, "org/model", revision="remote-code")
    uploads.write("org/model", "remote-code", "repagen_00000000/errors.py", b"old")
    publish_folder(folder, "org/model", revision="remote-code")
    there = set(uploads.files("org/model", "remote-code"))
    code = {name for name in folder_bytes(folder) if name.endswith(".py")}
    assert {name for name in there - main if name.endswith(".py")} == code
    assert set(uploads.files("org/model")) == main
    text = card(uploads, branch="remote-code").text
    assert 'from_pretrained("org/model", revision="remote-code", trust_remote_code=True)' in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "README.md", "exec")


def test_weights_of_an_earlier_push_go_and_other_files_stay(uploads: UploadHub, tmp_path: Path) -> None:
    uploads.open("org/sit")
    stale = ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-00001-of-00002.safetensors"]
    for name in (*stale, "notes.md", "pytorch_lora_weights.safetensors"):
        uploads.write("org/sit", "main", name, b"old")
    tiny_transformer().push_to_hub("org/sit")
    names = uploads.files("org/sit").keys()
    assert not names & set(stale)
    assert {"notes.md", "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors"} <= names


@pytest.mark.parametrize("subfolder", [None, "small"])
def test_only_weights_of_the_same_component_and_variant_go(uploads: UploadHub, subfolder: str | None) -> None:
    uploads.open("org/sit")
    stem = "diffusion_pytorch_model"
    place = f"{subfolder}/" if subfolder else ""
    stale = {
        f"{place}{stem}.safetensors.index.ema.json",
        f"{place}{stem}.ema-00001-of-00002.safetensors",
        f"{place}{stem}-00002-of-00002.ema.safetensors",
    }
    others = {
        f"{place}{stem}.safetensors",
        f"{place}{stem}.safetensors.index.json",
        f"{place}{stem}-00001-of-00002.safetensors",
        f"{place}{stem}.fp16.safetensors",
        f"old_vae/{stem}.ema.safetensors",
        f"my_{stem}.ema.safetensors",
    }
    for name in stale | others:
        uploads.write("org/sit", "main", name, b"old")
    tiny_transformer().push_to_hub("org/sit", variant="ema", subfolder=subfolder)
    names = uploads.files("org/sit").keys()
    assert others <= names and not stale & names and f"{place}{stem}.ema.safetensors" in names


def test_a_repository_of_another_kind_is_refused_but_for_a_subfolder(
    uploads: UploadHub, saved: Path, tmp_path: Path
) -> None:
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "pytorch_lora_weights.safetensors")
    model = tiny_transformer()
    publish_folder(saved, "org/pipeline")
    publish_folder(tmp_path, "org/adapter")
    model.push_to_hub("org/sit")
    before = uploads.files("org/pipeline")
    with pytest.raises(UserError, match=r"^org/pipeline: holds a pipeline already, but a model or adapter shall"):
        model.push_to_hub("org/pipeline")
    with pytest.raises(UserError, match=r"^org/pipeline: holds a pipeline already"):
        publish_folder(tmp_path, "org/pipeline", revision="v1")
    for repo_id in ("org/adapter", "org/sit"):
        with pytest.raises(UserError, match=f"^{repo_id}: holds a model or adapter already, but a pipeline shall"):
            publish_folder(saved, repo_id)
    assert uploads.files("org/pipeline") == before and len(uploads.commits) == 3
    with pytest.raises(
        UserError, match="holds a ClassToImagePipeline already, but a TextToImagePipeline shall be pub"
    ):
        tiny_text_pipeline().push_to_hub("org/pipeline")
    assert uploads.files("org/pipeline") == before
    model.push_to_hub("org/pipeline", subfolder="small")
    assert before.items() <= uploads.files("org/pipeline").items()


def test_an_object_leaves_a_card_that_is_there_and_a_folder_brings_its_own(uploads: UploadHub, tmp_path: Path) -> None:
    uploads.open("org/sit")
    uploads.write("org/sit", "main", "README.md", b"mine")
    tiny_transformer().push_to_hub("org/sit")
    assert uploads.files("org/sit")["README.md"] == b"mine"
    tiny_transformer().save_pretrained(tmp_path / "sit")
    (tmp_path / "sit" / "README.md").write_text("another, of ORG/NAME")
    publish_folder(tmp_path / "sit", "org/sit")
    assert uploads.files("org/sit")["README.md"] == b"another, of org/sit"


def test_paths_of_this_machine_and_temporary_files_stay_here(uploads: UploadHub, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    ClassToImagePipeline.from_pretrained(saved).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_name_or_path": str(saved)}))  # as diffusers would
    (folder / ".tmp-half.safetensors").write_bytes(b"half")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"")
    publish_folder(folder, "org/model")
    files = uploads.files("org/model")
    assert not [name for name, content in files.items() if str(saved.parent).encode() in content]
    assert not [name for name in files if "tmp" in name or "pyc" in name]
    ClassToImagePipeline.from_pretrained(uploads.branch("org/model"))


def test_hidden_files_stay_here_and_are_named(
    uploads: UploadHub, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "vae" / ".notes").mkdir()
    (folder / "vae" / ".notes" / "x").write_text("x")
    (folder / "samples.md").symlink_to(folder / "model_index.json")
    publish_folder(folder, "org/model")
    names = uploads.files("org/model").keys()
    assert "samples.md" in names and [name for name in names if "/." in f"/{name}"] == [".gitattributes"]
    assert ".env" in caplog.text and "vae/.notes/x" in caplog.text


@pytest.mark.parametrize(
    ("name", "link", "reason"),
    [
        ("notes.txt", True, "it is a link to .*, outside the folder"),
        ("vae/optimizer.pt", False, "its format can hold code"),
        ("transformer/diffusion_pytorch_model.bin", False, "its format can hold code"),
    ],
)
def test_links_out_of_the_folder_and_other_formats_are_refused(
    uploads: UploadHub, saved: Path, tmp_path: Path, name: str, link: bool, reason: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (tmp_path / "outside.txt").write_text("secret")
    if link:
        (folder / name).symlink_to(tmp_path / "outside.txt")
    else:
        (folder / name).write_text("x")
    with pytest.raises(UserError, match=rf"^push: refused .*{name}: {reason}"):
        publish_folder(folder, "org/model")
    assert not uploads.requests


def test_a_linked_folder_is_refused(uploads: UploadHub, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (folder / "vae").rename(tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(UserError, match="vae: it is a link to "):
        publish_folder(folder, "org/model")


def test_only_safetensors_of_objects_are_pushed(uploads: UploadHub, tmp_path: Path) -> None:
    for thing in (tiny_pipeline(), tiny_transformer()):
        with pytest.raises(UserError, match=r"^safe_serialization=False: only safetensors are published"):
            thing.push_to_hub("org/model", safe_serialization=False)
        with pytest.raises(UserError, match=r"^safe_serialization=False"):
            thing.save_pretrained(tmp_path / "thing", push_to_hub=True, safe_serialization=False)
    assert not uploads.requests and not (tmp_path / "thing").exists()


def test_an_adapter_is_published_with_the_classes_it_adds(uploads: UploadHub, tmp_path: Path) -> None:
    tensors = {"transformer.label_embedder.rows": torch.zeros(2, 4)}
    metadata = {"class_names": json.dumps(["tapir", "okapi | giraffe"])}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata)
    publish_folder(tmp_path, "org/adapter")
    text = card(uploads, "org/adapter").text
    assert 'pipe.load_lora_weights("org/adapter")' in text and "class_labels=['tapir']" in text
    assert "okapi \\| giraffe" in text and "label rows of 2 new classes; the generator" in text and "LoRA" not in text
    assert card(uploads, "org/adapter").data.tags == ["diffusers", "repagen", "adapter"]


def test_an_adapter_is_saved_and_pushed(uploads: UploadHub, tmp_path: Path) -> None:
    save = tiny_pipeline().save_lora_weights
    rows = {"okapi": torch.zeros(4)}
    save(tmp_path / "zoo", label_rows=rows, push_to_hub=True, repo_id="org/zoo", private=True, revision="v1")
    assert uploads.private["org/zoo"] and [branch for _, branch, _ in uploads.commits] == ["v1"]
    there = uploads.files("org/zoo", "v1")["pytorch_lora_weights.safetensors"]
    assert there == (tmp_path / "zoo" / "pytorch_lora_weights.safetensors").read_bytes()
    assert 'load_lora_weights("org/zoo", revision="v1")' in card(uploads, "org/zoo", "v1").text
    save(tmp_path / "zoo", label_rows=rows, push_to_hub=True)
    assert "pytorch_lora_weights.safetensors" in uploads.files("me/zoo")


def test_an_adapter_that_cannot_be_pushed_is_refused_before_it_is_saved(uploads: UploadHub, tmp_path: Path) -> None:
    layers = {"x.lora_A.weight": torch.zeros(2, 4)}
    save = tiny_pipeline().save_lora_weights
    with pytest.raises(UserError, match=r"^safe_serialization=False: only safetensors are published"):
        save(tmp_path / "zoo", layers, push_to_hub=True, safe_serialization=False)
    with pytest.raises(UserError, match=r"^weight_name='zoo\.safetensors': an adapter is published as"):
        save(tmp_path / "zoo", layers, push_to_hub=True, weight_name="zoo.safetensors")
    for options in ({"repo_id": "org/zoo"}, {"push_to_hub": True, "revisoin": "v1"}):
        with pytest.raises(TypeError, match="unexpected options"):
            save(tmp_path / "zoo", layers, **options)
    assert not uploads.requests and not (tmp_path / "zoo").exists()


def test_an_adapter_without_classes_asks_for_one_of_the_pipeline(uploads: UploadHub, tmp_path: Path) -> None:
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "pytorch_lora_weights.safetensors")
    publish_folder(tmp_path, "org/adapter")
    found = card(uploads, "org/adapter")
    assert "LoRA layers of its generator" in found.text and "lora" in found.data.tags
    assert "class_labels=[0]" in found.text and "the place of `ORG/BASE`; one\nwithout classes takes no" in found.text


def test_cards_of_what_belongs_to_prompts_say_so(uploads: UploadHub, tmp_path: Path) -> None:
    layers = {"blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4)}
    TextToImagePipeline.save_lora_weights(tmp_path / "lora", layers)
    publish_folder(tmp_path / "lora", "org/adapter")
    tiny_text_pipeline().transformer.push_to_hub("org/generator")
    found = {name: card(uploads, name) for name in ("org/adapter", "org/generator")}
    for made in found.values():
        assert "repagen.TextToImagePipeline" in made.text and "ClassToImagePipeline" not in made.text
        assert "class_labels" not in made.text and "without being asked" not in made.text
    assert "pipe('a picture of a cat')" in found["org/adapter"].text
    assert "vae=..., text_encoder=..., scheduler" in found["org/generator"].text
    assert found["org/adapter"].data.pipeline_tag == "text-to-image"


def test_the_command_pushes_a_folder(uploads: UploadHub, saved: Path) -> None:
    parser = argparse.ArgumentParser()
    push_command.add_arguments(parser)
    words = [str(saved), "--to", "org/model", "--private", "--revision", "v2", "--message", "Second"]
    assert "/org/model/commit/" in push_command.run(parser.parse_args(words))
    assert uploads.private["org/model"] and uploads.commits == [("org/model", "v2", "Second")]
    with pytest.raises(UserError, match="no such folder"):
        push_command.run(parser.parse_args([str(saved / "absent"), "--to", "org/model"]))


@pytest.mark.slow
def test_the_lines_of_every_card_run_as_they_are_copied(uploads: UploadHub, saved: Path, tmp_path: Path) -> None:
    kl = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, sample_size=32)
    kl.save_pretrained(tmp_path / "kl")
    publish_folder(saved, "org/pipeline", revision="v1")
    publish_folder(tmp_path / "kl", "org/kl")
    autoencoder_with_encoder().push_to_hub("org/rae")
    tiny_transformer().push_to_hub("org/sit")
    tiny_text_pipeline().push_to_hub("org/text")
    code = ""
    for repo_id, branch in {
        "org/text": "main",
        "org/pipeline": "v1",
        "org/kl": "main",
        "org/rae": "main",
        "org/sit": "main",
    }.items():
        code += "".join(re.findall(r"```python\n(.*?)```", card(uploads, repo_id, branch).text, re.DOTALL))
    code += "print(image.size, images.shape, type(transformer).__name__)\n"
    environment = {
        **os.environ, "HF_ENDPOINT": uploads.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-2] == "(16, 16) torch.Size([1, 3, 32, 32]) SiTTransformer2DModel"
    assert (tmp_path / "image.png").is_file()


# --- what fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "status", "expected"),
    [
        ("GET /api/whoami", 401, "answered 401; the token is not valid; log in with `hf auth login`"),
        ("POST /api/repos/create", 403, "answered 403; the token may not write there"),
        ("GET .*/auth-check/write", 403, "answered 403; the token may not write there"),
        ("POST .*/commit/", 403, "answered 403; the token may not write there"),
        ("POST .*/commit/", 413, "answered 413; it says: as the test asks"),
        ("POST .*/commit/", 503, "answered 503; try again later"),
        ("GET .*/tree/", 404, "answered 404; there is no such repository"),
        ("POST .*/batch", 401, "answered 401; the token is not valid"),
        ("PUT /lfs/", 403, "answered 403"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_nothing_half(
    uploads: UploadHub, saved: Path, pattern: str, status: int, expected: str
) -> None:
    before = folder_bytes(saved)
    uploads.faults[pattern] = status
    with pytest.raises(UserError) as raised:
        publish_folder(saved, "org/model")
    assert str(raised.value).startswith("org/model: ") and expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert folder_bytes(saved) == before and not uploads.commits
    uploads.faults.clear()
    publish_folder(saved, "org/model")
    assert len(uploads.commits) == 1


def test_without_token_or_network_it_says_so(uploads: UploadHub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    reach(uploads, monkeypatch, token=None)
    with pytest.raises(UserError, match=r"^org/model: no token for the Hub; log in with `hf auth login`"):
        publish_folder(saved, "org/model")
    reach(uploads, monkeypatch, token="hf_wrong")
    with pytest.raises(UserError, match=r"^org/model: the Hub answered 401; the token is not valid"):
        publish_folder(saved, "org/model")
    reach(uploads, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^org/model: cannot be published while HF_HUB_OFFLINE is set"):
        publish_folder(saved, "org/model")
    reach(uploads, monkeypatch)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^org/model: the Hub cannot be reached \(ConnectError: "):
        publish_folder(saved, "org/model")


@pytest.mark.parametrize("name", ["a/b/c", "org/--model", "org/mo del", ""])
def test_a_wrong_name_is_refused(uploads: UploadHub, saved: Path, name: str) -> None:
    with pytest.raises(UserError, match="give it as org/name"):
        publish_folder(saved, name)


def test_an_open_repository_is_not_taken_for_a_private_one(uploads: UploadHub, saved: Path) -> None:
    publish_folder(saved, "org/model")
    with pytest.raises(UserError, match="is open to everybody already, but shall be private"):
        publish_folder(saved, "org/model", private=True)
    assert len(uploads.commits) == 1
    assert open_repository("org/model", private=False) == "org/model"


@pytest.mark.parametrize(
    ("repo_id", "role", "message"),
    [
        ("org/new", "write", None),
        ("me/new", "write", None),
        ("other/new", "fineGrained", None),
        ("other/new", "write", r"there is no such repository, and the token may make one only under me, org;"),
        ("org/new", "read", r"the token may only read; log in"),
        ("org/open", "write", r"is open to everybody already"),
        ("org/new name", "write", r"no name for a repository .*; give it as org/name"),
    ],
)
def test_a_check_makes_nothing(uploads: UploadHub, repo_id: str, role: str, message: str | None) -> None:
    uploads.open("org/open")
    uploads.role = role
    if message is None:
        check_repository(repo_id, pipeline=True, private=True)
    else:
        with pytest.raises(UserError, match=f"^{repo_id}: {message}"):
            check_repository(repo_id, pipeline=True, private=True)
    assert list(uploads.private) == ["org/open"]
    assert all(line.startswith("GET ") for line in uploads.requests)


def test_a_check_finds_a_repository_of_another_kind(uploads: UploadHub, saved: Path) -> None:
    publish_folder(saved, "org/pipeline")
    uploads.open("org/branched")
    uploads.write("org/branched", "v1", "config.json", b"{}")
    for repo_id, revision in (("org/pipeline", None), ("org/pipeline", "v2"), ("org/branched", "v1")):
        holds_pipeline = repo_id == "org/pipeline"
        check_repository(repo_id, pipeline=holds_pipeline, revision=revision)
        there, given = ("a pipeline", "a model or adapter") if holds_pipeline else ("a model or adapter", "a pipeline")
        with pytest.raises(UserError, match=f"^{repo_id}: holds {there} already, but {given} shall be published"):
            check_repository(repo_id, pipeline=not holds_pipeline, revision=revision)
    check_repository("org/branched", pipeline=True)


@pytest.mark.parametrize("kind", ["scheduler", "text_encoder"])
# diffusers' own call, wherever it loads a scheduler from the Hub.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")
def test_a_part_alone_has_a_card_and_its_line_loads_it(uploads: UploadHub, kind: str) -> None:
    part = FlowMatchHeunScheduler(shift=3.0) if kind == "scheduler" else tiny_text_encoder()
    part.push_to_hub("org/part")
    made = card(uploads, "org/part")
    assert made.data.library_name == "repagen" and ("| shift | 3.0 |" in made.text) == (kind == "scheduler")
    [code] = re.findall(r"```python\n(.*?)```", made.text, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    settings = [
        {key: value for key, value in one.config.items() if key[0] != "_"} for one in (namespace["part"], part)
    ]
    assert type(namespace["part"]) is type(part) and settings[0] == settings[1]


def test_a_folder_of_something_else_is_refused_before_anything_is_asked(uploads: UploadHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model_index\.json nor config\.json"):
        publish_folder(tmp_path, "org/model")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="holds a FluxPipeline; published are"):
        publish_folder(tmp_path, "org/model")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json: cannot be read as JSON"):
        publish_folder(tmp_path, "org/model")
    assert not uploads.requests
