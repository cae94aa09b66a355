"""Where encoders come from, and what is said when they do not come."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from repagen.encoders import VisionEncoder, files
from repagen.errors import UserError


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A copy of an encoder's folder, free to be damaged."""
    copy = tmp_path / "encoder"
    shutil.copytree(golden / "rae_dinov2" / "encoder", copy)
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Any) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(source: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        VisionEncoder.from_pretrained(source, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_misshapen_and_damaged_weights_are_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    edit_weights(folder, lambda state: state.pop("layernorm.weight"))
    assert "1 tensors are missing, the first is layernorm.weight" in refusal(folder)
    (folder / "model.safetensors").write_bytes(whole)
    edit_weights(folder, lambda state: state.update({"layernorm.weight": torch.ones(3)}))
    assert "layernorm.weight: shape (3,) does not fit" in refusal(folder)
    (folder / "model.safetensors").write_bytes(whole)
    edit_weights(folder, lambda state: state["layernorm.weight"].fill_(float("nan")))
    assert "layernorm.weight: not finite" in refusal(folder)
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "cut short" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder)


def test_broken_folders_are_named(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, model_type="resnet")
    assert "model_type 'resnet' is no supported vision encoder" in refusal(folder)
    edit_config(folder, model_type="siglip2")
    assert "NaFlex" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: it cannot be read as JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal("./encoder")
    assert "timm" in refusal("timm:nothing_like_it")


def test_configs_cannot_name_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(
        folder,
        auto_map={"AutoModel": "evil.Model"},
        trust_remote_code=True,
        _attn_implementation_internal="org/kernel",
        attn_implementation="org/kernel",
    )
    encoder = VisionEncoder.from_pretrained(folder, image_size=56)
    config = encoder.backbone.model.config
    assert config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(config, "auto_map")
    assert not {"auto_map", "trust_remote_code"} & set(encoder.backbone.architecture)


def _answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            errors.GatedRepoError("403", response=_answer(403)),
            "accept its licence at https://huggingface.co/org/gated",
        ),
        (errors.RepositoryNotFoundError("401", response=_answer(401)), "no such model on the Hub"),
        (errors.RevisionNotFoundError("404", response=_answer(404)), "no such revision"),
        (errors.HfHubHTTPError("403", response=_answer(403)), "the Hub answered 403"),
        (errors.HfHubHTTPError("503", response=_answer(503)), "the Hub answered 503"),
        (errors.LocalEntryNotFoundError("offline"), "fetch it once with `hf download org/gated`"),
        (errors.OfflineModeIsEnabled("offline"), "fetch it once with `hf download org/gated`"),
    ],
)
def test_the_hubs_refusals_become_one_line(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = refusal("org/gated")
    assert expected in message
    assert "org/gated" in message
    if "403" in str(error) or "401" in str(error):
        assert "hf auth login" in message


def test_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "not in the local cache" in refusal("org/never-seen")
    assert "not in the local cache" in refusal("timm:vit_pe_core_base_patch16_224.fb")


class StandInHub:
    """Serves folders as Hub repositories through the layout of the Hub's cache."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, cache: Path) -> None:
        self.cache, self.repositories, self.asked = cache, {}, []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        from fnmatch import fnmatch

        self.asked.append((repo_id, tuple(allow_patterns)))
        snapshot = self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / self.commit
        source = self.repositories[repo_id]
        for path in source.rglob("*"):
            relative = path.relative_to(source)
            if path.is_file() and any(fnmatch(relative.as_posix(), pattern) for pattern in allow_patterns):
                (snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / relative)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    import huggingface_hub

    stand_in = StandInHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(files, "_noted", set())
    return stand_in


def test_from_the_hub_at_a_commit(golden: Path, hub: StandInHub, caplog: pytest.LogCaptureFixture) -> None:
    hub.repositories["org/mae"] = golden / "rae_mae" / "encoder"
    with caplog.at_level(logging.WARNING, logger="repagen"):
        encoder = VisionEncoder.from_pretrained("org/mae", image_size=64)
        VisionEncoder.from_pretrained("org/mae", image_size=64)
    assert (encoder.name_or_path, encoder.revision) == ("org/mae", hub.commit)
    notes = [record.message for record in caplog.records if "licence" in record.message]
    assert notes == ["encoder org/mae: licence CC-BY-NC-4.0 (non-commercial)"]
    local = VisionEncoder.from_pretrained(golden / "rae_mae" / "encoder", image_size=64)
    assert encoder.fingerprint() == local.fingerprint()


def test_a_full_checkpoint_gives_its_vision_tower(golden: Path) -> None:
    encoder = VisionEncoder.from_pretrained(golden / "rae_siglip2" / "encoder")
    assert encoder.family == "siglip"
    assert not any("text" in key for key in encoder.state_dict())
    assert encoder.image_size == 96


def test_a_local_folder_says_nothing(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="repagen"):
        VisionEncoder.from_pretrained(golden / "rae_mae" / "encoder")
    assert not caplog.records
