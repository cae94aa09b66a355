"""Filling a folder from a Hub on loopback, going on after a break, and finding what is wrong with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from encoders.tiny_text_encoders import save_tiny
from hub_stand_in import COMMIT, StandInHub
from recipe_parts import DINO, ENCODER, GATED, PIPELINE, RAE, generator_recipe, run_command

from repagen.encoders.text import TextEncoder
from repagen.errors import UserError
from repagen.offline import published

SNAPSHOT = f"snapshots/{COMMIT}"


def files_of(bundle: Path, repo_id: str) -> set[str]:
    storage = bundle / "hub" / f"models--{repo_id.replace('/', '--')}"
    return {path.relative_to(storage).as_posix() for path in storage.rglob("*") if path.is_file()}


def listed(bundle: Path) -> dict[str, dict]:
    return {thing["need"]["why"]: thing for thing in json.loads((bundle / "bundle.json").read_text())["things"]}


def problems(bundle: Path, caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    caplog.clear()
    with pytest.raises(UserError, match="not complete"):
        run_command(*words, "--check", str(bundle))
    return [record.getMessage() for record in caplog.records]


def test_only_the_files_that_are_read_are_fetched(filled: Path) -> None:
    assert files_of(filled / "bundle", ENCODER) == {
        "refs/main",
        *(f"{SNAPSHOT}/{name}" for name in ("config.json", "preprocessor_config.json", "model.safetensors")),
    }
    assert files_of(filled / "bundle", PIPELINE) == {
        "refs/main",
        f"{SNAPSHOT}/README.md",
        f"{SNAPSHOT}/model_index.json",
        f"{SNAPSHOT}/scheduler/scheduler_config.json",
        *(f"{SNAPSHOT}/{part}/config.json" for part in ("transformer", "vae")),
        *(f"{SNAPSHOT}/{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")),
    }


def test_the_list_holds_every_file_with_its_hash(filled: Path, repositories: dict[str, Path]) -> None:
    things = listed(filled / "bundle")
    assert things["autoencoder.path:config.json:encoder"]["need"]["revision"] == COMMIT
    encoder = things["alignment.targets.0.encoder"]
    assert (encoder["commit"], encoder["licence"]) == (COMMIT, "Apache-2.0")
    weights = encoder["files"][f"hub/models--org--encoder/{SNAPSHOT}/model.safetensors"]
    content = (repositories[ENCODER] / "model.safetensors").read_bytes()
    assert weights == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    content = json.loads((filled / "bundle" / "bundle.json").read_text())
    everything = {path for thing in content["things"] for path in thing["files"]}
    there = {p.relative_to(filled / "bundle").as_posix() for p in (filled / "bundle").rglob("*") if p.is_file()}
    assert there == everything | {"bundle.json", "hub/CACHEDIR.TAG"}


def test_there_are_no_links_to_lose_in_copying(filled: Path) -> None:
    assert not [path for path in (filled / "bundle").rglob("*") if path.is_symlink()]


def test_licences_are_shown_before_anything_is_downloaded(
    hub: StandInHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fault(ENCODER, "*.safetensors", status=404, code="EntryNotFound")
    with pytest.raises(UserError, match="not complete"):
        run_command(ENCODER, "--to", str(tmp_path / "bundle"))
    assert any("3 files" in message and "licence Apache-2.0" in message for message in caplog.messages)


def test_a_whole_bundle_is_verified_without_a_request(bundle: Path, filled: Path, hub: StandInHub) -> None:
    recipe = str(filled / "recipe.yaml")
    assert "needs of" in run_command(recipe, "--to", str(bundle))
    assert "everything is there" in run_command("--check", str(bundle))
    assert "everything is there" in run_command(recipe, "--check", str(bundle))
    assert hub.requests == []


def test_a_moved_read_only_bundle_is_whole(bundle: Path, filled: Path) -> None:
    moved = bundle.rename(bundle.with_name("über all"))
    for path in [moved, *moved.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert f"HF_HUB_CACHE='{moved}/hub'" in run_command("--check", str(moved))
        run_command(PIPELINE, "--to", str(moved))
    finally:
        for path in [moved, *moved.rglob("*")]:
            path.chmod(0o755)


def test_a_bundle_keeps_its_commits(bundle: Path, hub: StandInHub, repositories: dict[str, Path]) -> None:
    hub.repositories[DINO].commit(repositories[ENCODER])
    (bundle / f"hub/models--org--dino/{SNAPSHOT}/model.safetensors").unlink()
    run_command(DINO, "--to", str(bundle))
    content = (repositories[DINO] / "model.safetensors").read_bytes()
    assert (bundle / f"hub/models--org--dino/{SNAPSHOT}/model.safetensors").read_bytes() == content
    assert (bundle / "hub/models--org--dino/refs/main").read_text() == COMMIT


@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_damage_is_found_named_and_repaired(
    damage: str, bundle: Path, hub: StandInHub, repositories: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    weights = bundle / f"hub/models--org--dino/{SNAPSHOT}/model.safetensors"
    content = weights.read_bytes()
    if damage == "removed":
        weights.unlink()
    else:
        weights.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    (line,) = problems(bundle, caplog)
    assert str(weights) in line
    assert f"`repagen download {DINO} --to {bundle}`" in line
    assert hub.requests == []
    run_command(DINO, "--to", str(bundle))
    assert weights.read_bytes() == content
    assert [request.path for request in hub.asked("*.safetensors")] == ["model.safetensors"]
    run_command("--check", str(bundle))


def test_a_missing_revision_is_damage(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    (bundle / "hub/models--org--rae/refs/main").unlink()
    (line,) = problems(bundle, caplog)
    assert line.startswith("autoencoder.path: model org/rae: ")
    assert "refs/main is missing" in line


def test_needs_that_are_not_in_the_bundle_are_named(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = generator_recipe(tmp_path)
    lines = problems(bundle, caplog, str(recipe), "transformer.pretrained=org/other", "transformer.overrides={}")
    assert [line.partition(";")[0] for line in lines] == ["transformer.pretrained: model org/other: missing"]
    words = f"{recipe} transformer.pretrained=org/other 'transformer.overrides={{}}' --to {bundle}"
    assert f"repagen download {words}" in lines[0]


def test_an_empty_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bundle\.json: not there; fill the folder with `repagen download NAME --to"):
        run_command("--check", str(tmp_path))


def test_what_is_closed_is_named_and_the_rest_fetched(
    hub: StandInHub, repositories: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(GATED, repositories[ENCODER], COMMIT, gated=True)
    words = [f"alignment.targets.0.encoder={GATED}", "evaluation.extractor=digits"]
    with pytest.raises(UserError, match="not complete, 1 missing"):
        run_command(str(generator_recipe(tmp_path)), *words, "--to", str(tmp_path / "bundle"))
    assert "alignment.targets.0.encoder: encoder 'org/gated'" in caplog.messages[-1]
    assert "access is gated; accept its licence at https://huggingface.co/org/gated" in caplog.messages[-1]
    assert f"{SNAPSHOT}/diffusion_pytorch_model.safetensors" in files_of(tmp_path / "bundle", RAE)
    (line,) = problems(tmp_path / "bundle", caplog)
    assert line.startswith("alignment.targets.0.encoder: encoder org/gated: missing; get it with `repagen download ")


def test_what_a_recipe_leaves_open_is_named(
    hub: StandInHub, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = "autoencoder.path: the recipe leaves it to you; give autoencoder.path=PATH_OR_HUB_ID"
    with pytest.raises(UserError, match="not complete, 1 missing"):
        run_command("digits_generator", "--to", str(bundle))
    assert caplog.messages == [line]
    assert problems(bundle, caplog, "digits_generator") == [line]
    run_command("--check", str(bundle))


@pytest.mark.parametrize(
    "words",
    [
        ["org/nope"],
        [PIPELINE, "--revision", "nope"],
        ["digits_generator", "autoencoder.path=./nope"],
        ["digits_generator", "autoencoder.path=org/nope"],
    ],
)
def test_what_does_not_exist_is_not_listed(hub: StandInHub, bundle: Path, words: list[str]) -> None:
    before = (bundle / "bundle.json").read_bytes()
    with pytest.raises(UserError, match="not complete, 1 missing"):
        run_command(*words, "--to", str(bundle))
    assert (bundle / "bundle.json").read_bytes() == before


def test_what_was_here_stays_listed_when_it_goes_from_the_hub(
    hub: StandInHub, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (bundle / f"hub/models--org--dino/{SNAPSHOT}/model.safetensors").unlink()
    del hub.repositories[DINO]
    with pytest.raises(UserError, match="not complete, 1 missing"):
        run_command(DINO, "--to", str(bundle))
    assert len(problems(bundle, caplog)) == 1


def test_a_recipe_replaces_what_it_asked_for_in_vain(
    hub: StandInHub, repositories: dict[str, Path], bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(GATED, repositories[RAE], COMMIT, gated=True)
    for words in (["digits_generator", f"autoencoder.path={GATED}"], [GATED, "--revision", COMMIT]):
        with pytest.raises(UserError, match="not complete, 1 missing"):
            run_command(*words, "--to", str(bundle))
    assert len(problems(bundle, caplog)) == 2
    run_command("digits_generator", f"autoencoder.path={RAE}", "--to", str(bundle))
    (line,) = problems(bundle, caplog)
    assert line.startswith("command line: model org/gated: missing")


def test_words_may_stand_behind_the_folder(filled: Path, bundle: Path) -> None:
    words = [str(filled / "recipe.yaml"), "--check", str(bundle), f"alignment.targets.0.encoder={ENCODER}"]
    assert "everything is there" in run_command(*words)
    with pytest.raises(UserError, match="NAME: nothing given"):
        run_command("--to", str(bundle))


def test_a_local_autoencoder_brings_its_encoder(
    hub: StandInHub, repositories: dict[str, Path], tmp_path: Path
) -> None:
    words = [f"autoencoder.path={repositories[RAE]}"]
    run_command("digits_generator", *words, "--to", str(tmp_path / "bundle"))
    assert f"{SNAPSHOT}/model.safetensors" in files_of(tmp_path / "bundle", ENCODER)


def test_a_text_encoder_comes_with_its_tokenizer(
    hub: StandInHub, repositories: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "text", "t5")
    (folder / "flax_model.msgpack").write_bytes(b"of another framework")
    hub.add("org/text", folder, COMMIT)
    saved = Path(shutil.copytree(repositories[PIPELINE], tmp_path / "saved"))
    TextEncoder.from_encoder("org/text").save_pretrained(saved / "text_encoder", include_encoder=False)
    hub.add("org/saved", saved, COMMIT)
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    for request in ("org/text", "org/saved"):  # by its own id, and as what a saved one refers to
        bundle = tmp_path / request
        run_command(request, "--to", str(bundle))
        files = files_of(bundle, "org/text") - {"refs/main"}
        assert files == {f"{SNAPSHOT}/{name}" for name in names}
    (referred,) = (thing for why, thing in listed(bundle).items() if why.endswith("config.json:encoders.0"))
    assert (referred["need"]["kind"], referred["need"]["revision"]) == ("text_encoder", COMMIT)
    assert referred["licence"] == "Apache-2.0"


def test_a_repository_of_both_towers_is_fetched_for_both(hub: StandInHub, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "text", "siglip")
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    (folder / "preprocessor_config.json").write_text("{}")
    hub.add("org/both", folder, COMMIT)
    run_command("org/both", "--to", str(tmp_path / "bundle"))
    found = {Path(name).name for name in files_of(tmp_path / "bundle", "org/both")}
    assert {"tokenizer.json", "preprocessor_config.json", "config.json", "model.safetensors"} <= found


def test_another_revision(hub: StandInHub, repositories: dict[str, Path], tmp_path: Path) -> None:
    hub.repositories[DINO].refs["v1"] = COMMIT
    run_command(DINO, "--revision", "v1", "--to", str(tmp_path / "bundle"))
    assert {"refs/v1"} == {name for name in files_of(tmp_path / "bundle", DINO) if name.startswith("refs/")}
    with pytest.raises(UserError, match="not complete"):
        run_command(DINO, "--revision", "v2", "--to", str(tmp_path / "bundle"))


def test_a_killed_download_goes_on(hub: StandInHub, repositories: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    hub.fault(PIPELINE, "vae/*.safetensors", cut=1000, stall=True, times=1, method="GET")
    process = multiprocessing.get_context("fork").Process(
        target=run_command, args=(PIPELINE, "--to", str(bundle)), daemon=True
    )
    process.start()
    transformer = bundle / "hub/models--org--pipeline/snapshots" / COMMIT / "transformer"
    while not (hub.asked("vae/*.safetensors") and (transformer / "diffusion_pytorch_model.safetensors").exists()):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (bundle / "bundle.json").exists()
    assert not (bundle / "hub/models--org--pipeline/refs/main").exists()
    hub.requests.clear()
    run_command(PIPELINE, "--to", str(bundle))
    assert [request.path for request in hub.asked("*.safetensors")] == ["vae/diffusion_pytorch_model.safetensors"]
    run_command("--check", str(bundle))
    for path in repositories[PIPELINE].rglob("*.safetensors"):
        name = path.relative_to(repositories[PIPELINE])
        if "fp16" not in path.name:
            assert (transformer.parent / name).read_bytes() == path.read_bytes()


def test_a_file_with_another_hash_than_the_hub_has_is_refused(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repagen.offline import bundle as module

    true = module.look_up

    def claiming(need, cache):
        listing = true(need, cache)
        return dataclasses.replace(listing, files=dict.fromkeys(listing.files, (None, "0" * 64)))

    monkeypatch.setattr(module, "look_up", claiming)
    with pytest.raises(UserError, match="not complete"):
        run_command(DINO, "--to", str(tmp_path / "bundle"))
    assert "refs/main" not in files_of(tmp_path / "bundle", DINO)


def test_offline_nothing_is_asked_for(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="not complete"):
        run_command("org/absent", "--to", str(bundle))
    assert "HF_HUB_OFFLINE is set; unset it" in caplog.messages[-1]


def test_an_adapter_brings_its_base(hub: StandInHub, repositories: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\nbase_model: {PIPELINE}\n---\n")
    shutil.copy(repositories[DINO] / "model.safetensors", folder / "pytorch_lora_weights.safetensors")
    hub.add("org/adapter", folder, COMMIT)
    run_command("org/adapter", "--to", str(tmp_path / "bundle"))
    assert files_of(tmp_path / "bundle", "org/adapter") == {
        "refs/main", f"{SNAPSHOT}/README.md", f"{SNAPSHOT}/pytorch_lora_weights.safetensors",
    }  # fmt: skip
    assert f"{SNAPSHOT}/model_index.json" in files_of(tmp_path / "bundle", PIPELINE)


@pytest.fixture
def published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file under an address on loopback, in the place of Inception's."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "weights.pth").write_bytes(b"weights" * 1000)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given) -> None:
            super().__init__(*given, directory=str(folder))

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    one = published.PublishedFile("weights.pth", digest[:8], "MIT", lambda: url)
    monkeypatch.setitem(published.PUBLISHED_FILES, "inception", one)
    monkeypatch.setenv("NO_PROXY", "*")
    yield folder / "weights.pth"
    server.shutdown()
    server.server_close()


def test_a_published_file_goes_where_torch_looks(
    published_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repagen.hub.places import torch_checkpoint

    run_command("inception", "--to", str(tmp_path / "bundle"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "bundle" / "torch"))
    assert torch_checkpoint("weights.pth").read_bytes() == published_file.read_bytes()
    published_file.unlink()
    run_command("inception", "--to", str(tmp_path / "bundle"))


def test_a_published_file_of_other_content_is_not_kept(
    published_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published_file.write_bytes(b"other")
    with pytest.raises(UserError, match="not complete"):
        run_command("inception", "--to", str(tmp_path / "bundle"))
    assert "came with sha256" in caplog.messages[-1]
    assert not list((tmp_path / "bundle" / "torch").rglob("*.pth"))
    published_file.unlink()
    with pytest.raises(UserError, match="not complete"):
        run_command("inception", "--to", str(tmp_path / "bundle"))
    assert "cannot be reached" in caplog.messages[-1]


def test_statistics_are_for_the_user_to_get(
    published_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = tmp_path / "bundle"
    place = bundle / "reference" / "VIRTUAL_imagenet256_labeled.npz"
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="not complete, 1 missing"):
        run_command("adm256", "--to", str(bundle))
    assert f"get it by hand, put it at {place}" in caplog.messages[-1]
    place.parent.mkdir()
    place.write_bytes(b"statistics")
    run_command("adm256", "--to", str(bundle))
    place.write_bytes(b"damaged...")
    (line,) = problems(bundle, caplog, "adm256")
    assert str(place) in line


def test_a_dataset_opens_without_a_network(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import hub_stand_in
    from huggingface_hub import constants
    from PIL import Image

    from repagen.data import DataConfig, open_dataset

    parse = hub_stand_in._Handler.parse

    def parse_datasets(self, path: str):
        return parse(self, path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets"))

    monkeypatch.setattr(hub_stand_in._Handler, "parse", parse_datasets)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "tables"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "bundle" / "hub"))
    for name in ("black", "white"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), name).save(tmp_path / "photos" / "train" / name / "0.png")
    hub.add("org/photos", tmp_path / "photos", COMMIT)
    config = DataConfig(kind="datasets", path="org/photos", image_size=8)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="get it with `hf download org/photos --repo-type dataset`"):
        open_dataset(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    run_command("org/photos", "--with-data", "--to", str(tmp_path / "bundle"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    dataset = open_dataset(config)
    assert dataset.class_names == ["black", "white"]
    assert [float(dataset[index]["image"].mean()) for index in range(2)] == [0.0, 1.0]
