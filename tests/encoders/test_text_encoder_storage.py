"""Saved text encoders: whole or by reference, as a component of a pipeline, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from encoders.tiny_text_encoders import PROMPTS, save_tiny

import repagen
from repagen.encoders.text import TextEncoder
from repagen.errors import UserError


class PromptPipeline(diffusers.DiffusionPipeline):
    """A pipeline of a text encoder alone."""

    def __init__(self, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("text") / "qwen3", "qwen3")


@pytest.fixture
def encoder(source: Path) -> TextEncoder:
    return TextEncoder.from_encoder(source, hidden_layer=-2, max_length=40)


def same(one: TextEncoder, other: TextEncoder) -> bool:
    read, again = one.encode(PROMPTS), other.encode(PROMPTS)
    return torch.equal(read.embeddings, again.embeddings) and torch.equal(read.mask, again.mask)


def without_names(encoder: TextEncoder) -> list[dict[str, Any]]:
    return [{**one, "name": ""} for one in encoder.describe()]


def test_a_pipeline_keeps_it_whole(encoder: TextEncoder, source: Path, tmp_path: Path) -> None:
    PromptPipeline(encoder).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["repagen", "TextEncoder"]
    folder = tmp_path / "text_encoder"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {
        "config.json", "diffusion_pytorch_model.safetensors",
        "tokenizer.0/tokenizer.json", "tokenizer.0/tokenizer_config.json",
    }  # fmt: skip
    assert str(source) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    loaded = PromptPipeline.from_pretrained(tmp_path).text_encoder
    assert isinstance(loaded, repagen.TextEncoder) and same(loaded, encoder)
    assert without_names(loaded) == without_names(encoder)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.embed_dim, loaded.max_length) == (32, 40)
    for found in (
        TextEncoder.from_pretrained(tmp_path, subfolder="text_encoder"),
        diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="text_encoder"),
    ):
        assert same(found, encoder)
    loaded.save_pretrained(tmp_path / "again")
    for name in written:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_several_in_shards_and_a_variant(source: Path, tmp_path: Path) -> None:
    clip = save_tiny(tmp_path / "clip", "clip")
    both = TextEncoder.from_encoder([source, clip], max_length=[16, 20])
    both.save_pretrained(tmp_path / "both", max_shard_size="60KB", variant="ema")
    assert len(list(tmp_path.glob("both/*ema*.safetensors"))) > 1
    loaded = TextEncoder.from_pretrained(tmp_path / "both", variant="ema", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert same(loaded, TextEncoder.from_encoder([source, clip], max_length=[16, 20], dtype=torch.bfloat16))


def test_a_reference_waits_for_the_first_prompt(
    encoder: TextEncoder, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = Path(shutil.copytree(source, tmp_path / "source"))
    named = TextEncoder.from_encoder(moved, hidden_layer=-2, max_length=40)
    with caplog.at_level(logging.WARNING):
        named.save_pretrained(tmp_path / "saved", include_encoder=False)
    assert "saved as a reference to a local folder" in caplog.text
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["config.json"]
    pipe = PromptPipeline(TextEncoder.from_pretrained(tmp_path / "saved"))
    pipe.save_pretrained(tmp_path / "pipe")  # not loaded, so it stays a reference
    loaded = PromptPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.bfloat16).text_encoder
    assert not list(loaded.parameters()) and loaded.dtype == torch.bfloat16
    assert (loaded.embed_dim, loaded.max_length) == (32, 40)
    assert without_names(loaded) == without_names(encoder)
    assert same(loaded, TextEncoder.from_encoder(source, hidden_layer=-2, max_length=40, dtype=torch.bfloat16))
    save_tiny(moved, "qwen3", seed=1)
    with pytest.raises(UserError, match="has another fingerprint of its weights"):
        TextEncoder.from_pretrained(tmp_path / "saved").encode("a cube")
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="no such folder"):
        TextEncoder.from_pretrained(tmp_path / "saved").encode("a cube")


def test_licences_decide_what_is_saved_along(source: Path, tmp_path: Path) -> None:
    gemma = TextEncoder.from_encoder(save_tiny(tmp_path / "gemma", "gemma3"))
    for encoder, whole in ((TextEncoder.from_encoder(source), True), (gemma, False)):
        encoder.save_pretrained(tmp_path / str(whole))
        assert (tmp_path / str(whole) / "diffusion_pytorch_model.safetensors").is_file() == whole
    (fact,) = gemma.part_licences()
    assert fact.part == "text encoder" and "Gemma Terms of Use" in fact.licence
    assert fact.consequence == "its weights are handed out by its authors alone, who ask for an agreement"
    gemma.save_pretrained(tmp_path / "asked for", include_encoder=True)
    assert "may not let them be passed on" in gemma.part_licences()[0].consequence
    unnamed = TextEncoder.from_pretrained(tmp_path / "asked for")
    with pytest.raises(UserError, match="include_encoder=False: text encoder 'gemma3' comes from nowhere"):
        unnamed.save_pretrained(tmp_path / "nothing", include_encoder=False)


def test_descriptions_tell_readings_apart(encoder: TextEncoder, source: Path, tmp_path: Path) -> None:
    assert json.loads(json.dumps(encoder.describe())) == encoder.describe()
    others = [
        TextEncoder.from_encoder(source, hidden_layer=-1, max_length=40),
        TextEncoder.from_encoder(source, hidden_layer=-2, max_length=39),
        TextEncoder.from_encoder(save_tiny(tmp_path / "other", "qwen3", seed=1), hidden_layer=-2, max_length=40),
    ]
    described = [json.dumps(without_names(one)) for one in (encoder, *others)]
    assert len(set(described)) == 4
    rounded = TextEncoder.from_encoder(source, hidden_layer=-2, max_length=40, dtype=torch.bfloat16)
    assert rounded.describe() == encoder.describe()


def test_damaged_and_unsafe_folders_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    encoder.save_pretrained(tmp_path / "whole")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / name))

    folder = copy("missing tensor")
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("towers.0.model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors of the TextEncoder are missing, the first is towers\.0\.mod"):
        TextEncoder.from_pretrained(folder)
    folder = copy("code")
    path = folder / "tokenizer.0" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(UserError, match="'auto_map' asks for code from elsewhere"):
        TextEncoder.from_pretrained(folder)
    folder = copy("no tokenizer")
    shutil.rmtree(folder / "tokenizer.0")
    with pytest.raises(UserError, match="no tokenizer"):
        TextEncoder.from_pretrained(folder)
    folder = copy("unknown key")
    content = json.loads((folder / "config.json").read_text())
    content["encoders"][0]["code"] = "x"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="text encoder: unknown key 'code'"):
        TextEncoder.from_pretrained(folder)
    content["encoders"] = "x"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="encoders must be a list of descriptions, got 'x'"):
        TextEncoder.from_pretrained(folder)
