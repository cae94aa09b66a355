"""What released versions saved still loads, with the same weights and the same pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved.write import EXPECTED, given_by

import repagen

SAVED = Path(__file__).parents[1] / "saved"
FOLDERS = sorted(path.parent for path in SAVED.glob("*/*/model_index.json"))


def named(folder: Path) -> str:
    return folder.relative_to(SAVED).as_posix()


@pytest.fixture(params=FOLDERS, ids=named)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def assert_as_saved(model: Any, folder: Path) -> None:
    """The weights are those in the file, to the bit."""
    state, saved = model.state_dict(), load_file(folder / "diffusion_pytorch_model.safetensors")
    assert state.keys() == saved.keys()
    for name, tensor in saved.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def test_every_kind_is_there() -> None:
    assert {named(folder) for folder in FOLDERS} >= {
        "0.1.0/ditdh_rae", "0.1.0/sit_svg", "0.1.0/sit_pixels", "0.1.0/dit_kl",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in (SAVED / "0.1.0").rglob("*") if path.is_file()) < 1_000_000


def test_it_gives_what_it_gave(folder: Path) -> None:
    pipe = repagen.ClassToImagePipeline.from_pretrained(folder)
    for part in ("transformer", "vae"):
        assert_as_saved(getattr(pipe, part), folder / part)
    found, expected = given_by(pipe), load_file(folder / EXPECTED)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # processors round differently
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_saved_anew_it_keeps_what_it_said(folder: Path, tmp_path: Path) -> None:
    """Later versions may add keys; none that was there changes or goes."""
    repagen.ClassToImagePipeline.from_pretrained(folder).save_pretrained(tmp_path)
    for path in folder.rglob("*.json"):
        before = json.loads(path.read_text())
        after = json.loads((tmp_path / path.relative_to(folder)).read_text())
        versions = {"_diffusers_version", "transformers_version"}
        assert {key: after.get(key) for key in before if key not in versions} == {
            key: value for key, value in before.items() if key not in versions
        }, path.name
    for path in folder.rglob("*.safetensors"):
        if path.name != EXPECTED:
            assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes()
