"""Text encoders on a Hub: by id and commit, fetched when a prompt comes, and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from encoders.test_text_encoder_storage import PromptPipeline, same
from encoders.tiny_text_encoders import PROMPTS, save_tiny
from hub_stand_in import StandInHub
from huggingface_hub import constants

import repagen
from repagen.encoders.text import TextEncoder
from repagen.encoders.text_tower import load_tokenizer
from repagen.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "qwen3", "qwen3")
    (folder / "README.md").write_text("a card")
    (folder / "pytorch_model.bin").write_bytes(b"the same in an older format")
    return folder


def test_it_is_saved_by_id_and_commit(
    hub: StandInHub, cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub.add("org/text", source)
    encoder = TextEncoder.from_encoder("org/text")
    fetched = {request.path for request in hub.asked("*.*")}
    assert fetched == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    PromptPipeline(encoder).save_pretrained(tmp_path / "whole")
    encoder.save_pretrained(tmp_path / "named", include_encoder=False)
    repository.commit(save_tiny(tmp_path / "other", "qwen3", seed=1))  # main moves on
    hub.requests.clear()
    for folder in (tmp_path / "named", tmp_path / "whole" / "text_encoder"):
        content = (folder / "config.json").read_text()
        assert "org/text" in content and next(iter(repository.commits)) in content
        assert same(TextEncoder.from_pretrained(folder), encoder)
    assert not hub.asked("*.safetensors")
    assert not same(TextEncoder.from_encoder("org/text"), encoder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    named = TextEncoder.from_pretrained(tmp_path / "named")
    assert same(named, encoder)
    hub.repositories["org/text"].gated = True
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty too"))
    with pytest.raises(UserError, match=r"'org/text'.*: access is gated; accept its licence at .*org/text and log in"):
        TextEncoder.from_pretrained(tmp_path / "named").encode(PROMPTS)


def test_offline_the_command_is_named(
    hub: StandInHub, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/text", source)
    TextEncoder.from_encoder("org/text")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert TextEncoder.from_encoder("org/text").encode(PROMPTS).mask.any()
    for name in ("tokenizer.json", "model.safetensors"):
        next(cache.rglob(f"snapshots/*/{name}")).unlink()
        with pytest.raises(UserError, match=f"in the local cache without {name}; fetch it once with `hf d"):
            TextEncoder.from_encoder("org/text")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        TextEncoder.from_encoder("org/text")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="fetch it once with `hf download org/absent` on a machine that is online"):
        TextEncoder.from_encoder("org/absent")
    with pytest.raises(UserError, match=r"no tokenizer .* of text encoder 'org/text'; fetch it with `hf downl"):
        load_tokenizer(cache, "org/text", "org/text")


def test_a_published_pipeline_comes_with_its_tokenizers(
    hub: StandInHub, cache: Path, source: Path, tmp_path: Path
) -> None:
    """diffusers takes weights and configs of a component, and leaves its tokenizers behind."""
    encoder = TextEncoder.from_encoder(source)
    PromptPipeline(encoder).save_pretrained(tmp_path / "pipe")
    hub.add("org/pipe", tmp_path / "pipe")
    assert repagen.TextEncoder is TextEncoder  # imported, it lets diffusers download its components
    assert same(PromptPipeline.from_pretrained("org/pipe").text_encoder, encoder)
    assert same(TextEncoder.from_pretrained("org/pipe", subfolder="text_encoder"), encoder)


def test_one_that_is_named_by_id_needs_no_weights_of_its_own(
    hub: StandInHub, cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/text", source)
    encoder = TextEncoder.from_encoder("org/text")
    encoder.save_pretrained(tmp_path / "named", include_encoder=False)
    hub.add("org/named", tmp_path / "named")
    assert same(TextEncoder.from_pretrained("org/named"), encoder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(TextEncoder.from_pretrained("org/named"), encoder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"revision": "main"},
            "as a Hub id it needs a commit, 40 hex digits, as its revision in config.json, got 'main'",
        ),
        ({"revision": None}, "as a Hub id it needs a commit"),
        ({"weights": None}, "config.json lacks its weights"),
        (
            {"name_or_path": "FOLDER", "revision": None, "weights": None, "tokenizer": None},
            "lacks its weights and tok",
        ),
    ],
)
def test_a_file_has_nothing_fetched_that_may_change(
    hub: StandInHub, cache: Path, source: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    hub.add("org/text", source)
    TextEncoder.from_encoder("org/text").save_pretrained(tmp_path / "named", include_encoder=False)
    path = tmp_path / "named" / "config.json"
    config = json.loads(path.read_text())
    changes = {key: str(source) if value == "FOLDER" else value for key, value in changes.items()}
    path.write_text(json.dumps({**config, "encoders": [{**config["encoders"][0], **changes}]}))
    hub.requests.clear()
    with pytest.raises(UserError, match=reason):
        TextEncoder.from_pretrained(tmp_path / "named").encode(PROMPTS)
    assert not hub.requests
