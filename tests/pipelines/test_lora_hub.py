"""Adapters from a Hub on loopback: the named file alone, at one commit, each failure one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hub import conftest
from hub_stand_in import COMMIT, StandInHub
from lora_parts import FILE, add_adapter, latents, make_adapter, rows, state_of
from tiny_pipelines import ID2LABEL, PipelineMaker

from repagen import SiTTransformer2DModel, UserError

cache, waits, hub = conftest.cache, conftest.waits, conftest.hub  # its fixtures
SIT = PipelineMaker(SiTTransformer2DModel)
BIN = "pytorch_lora_weights.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with an adapter, another in a folder, and one as a `.bin`."""
    make_adapter(SIT, tmp_path / "repo", rows("okapi"))
    make_adapter(SIT, tmp_path / "repo" / "sub", rows("axolotl"), seed=2)
    pipe = SIT()
    add_adapter(pipe)
    pipe.save_lora_weights(tmp_path / "repo", state_of(pipe), safe_serialization=False)
    return tmp_path / "repo"


def refusal(source: str, **options: object) -> str:
    pipe = SIT()
    before = latents(pipe)
    with pytest.raises(UserError) as error:
        pipe.load_lora_weights(source, **options)
    assert torch.equal(latents(pipe), before) and not pipe.get_list_adapters()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_the_adapter_is_fetched_and_once(hub: StandInHub, folder: Path) -> None:
    hub.add("org/zoo", folder, COMMIT)
    local, pipe = SIT(id2label=ID2LABEL), SIT(id2label=ID2LABEL)
    local.load_lora_weights(folder / "sub")
    pipe.load_lora_weights("org/zoo", subfolder="sub", revision=COMMIT, token=False)
    assert pipe.config["id2label"]["4"] == "axolotl"
    assert torch.equal(latents(pipe, class_labels=4), latents(local, class_labels=4))
    assert {request.path for request in hub.asked("*.*")} == {f"sub/{FILE}"}
    requests = len(hub.asked("*.*"))
    again = SIT(id2label=ID2LABEL)
    again.load_lora_weights("org/zoo", subfolder="sub", revision=COMMIT, local_files_only=True)
    assert torch.equal(latents(again, class_labels=4), latents(local, class_labels=4))
    assert len(hub.asked("*.*")) == requests


def test_a_bin_is_fetched_where_it_is_named(hub: StandInHub, folder: Path) -> None:
    hub.add("org/zoo", folder, COMMIT)
    pipe, local = SIT(), SIT()
    pipe.load_lora_weights("org/zoo", weight_name=BIN)
    local.load_lora_weights(folder / BIN)
    assert torch.equal(latents(pipe), latents(local))
    (folder / FILE).unlink()
    hub.add("org/lone", folder, "1" * 40)
    assert FILE in refusal("org/lone")
    assert {request.repo_id for request in hub.asked(BIN)} == {"org/zoo"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 401, "code": "GatedRepo"}, "access is gated"),
        ({"status": 500}, "the Hub answered 500"),
        ({"hang": True}, r"no answer within 0\.3 s"),
    ],
    ids=["gated", "500", "hangs"],
)
def test_a_hub_that_fails(hub: StandInHub, folder: Path, fault: dict[str, object], reason: str) -> None:
    hub.add("org/zoo", folder, COMMIT)
    hub.fault("org/zoo", **fault)
    message = refusal("org/zoo")
    assert message.startswith("adapter 'org/zoo': ")
    assert re.search(reason, message)


def test_what_is_not_there(hub: StandInHub, folder: Path) -> None:
    hub.add("org/zoo", folder, COMMIT)
    assert "no adapter file no.safetensors" in refusal("org/zoo", weight_name="no.safetensors")
    assert "no such model on the Hub" in refusal("org/nowhere")
    assert "no such revision" in refusal("org/zoo", revision="v9")
