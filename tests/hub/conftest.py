"""A Hub on loopback that huggingface_hub in this process is turned to, with an empty cache and no waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_stand_in import StandInHub, write_model
from huggingface_hub import constants


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that huggingface_hub would have slept before its next tries; it does not sleep."""
    slept: list[float] = []
    quick = SimpleNamespace(**{**vars(time), "sleep": slept.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
    monkeypatch.setattr("huggingface_hub.file_download.time", quick)
    return slept


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path, waits: list[float]) -> Iterator[StandInHub]:
    with StandInHub() as stand_in:
        point_to(stand_in.endpoint, monkeypatch)
        yield stand_in
        huggingface_hub.close_session()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.close_session()
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    values = {
        "ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True, "HF_HUB_DOWNLOAD_TIMEOUT": 0.3,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def offline(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked: what the cache has is what there is."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of a model: a small one, and one of some size below a folder."""
    return write_model(tmp_path / "model", "first")
