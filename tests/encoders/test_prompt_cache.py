"""The prompt cache: it gives what the encoder gives, whoever fills it, and only of the encoder that filled it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders.tiny_text_encoders import PROMPTS, save_tiny
from safetensors.torch import save

from repagen.encoders.prompt_cache import CachedTextEncoder, PromptCache
from repagen.encoders.text import TextEmbeddings, TextEncoder
from repagen.errors import UserError
from repagen.files import TEMPORARY_PREFIX


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    root = tmp_path_factory.mktemp("text")
    folders = [save_tiny(root / family, family) for family in ("clip", "qwen3")]
    return TextEncoder.from_encoder(folders, max_length=[20, 40])  # whose tokens do not lie side by side


def same(one: TextEmbeddings, other: TextEmbeddings) -> bool:
    return torch.equal(one.embeddings, other.embeddings) and torch.equal(one.mask, other.mask)


def count_reads(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    read: list[list[str]] = []
    true = encoder.encode

    def counting(prompts: Sequence[str], **options: Any) -> TextEmbeddings:
        read.append(list(prompts))
        return true(prompts, **options)

    monkeypatch.setattr(encoder, "encode", counting)
    return read


def test_each_prompt_is_read_once_and_given_unchanged(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {prompt: encoder.encode([prompt]) for prompt in PROMPTS}
    read = count_reads(encoder, monkeypatch)
    cached = CachedTextEncoder(tmp_path, encoder)
    assert (cached.embed_dim, cached.max_length) == (32, 60)
    for prompt in PROMPTS:
        assert same(cached.encode([prompt]), expected[prompt])
    assert read == [[prompt] for prompt in PROMPTS]
    twice = [PROMPTS[2], PROMPTS[0], PROMPTS[2]]
    rows = cached.encode(twice)
    assert same(rows, TextEmbeddings(*(torch.cat(part) for part in zip(*map(expected.get, twice), strict=True))))
    assert len(read) == len(PROMPTS)
    alone = CachedTextEncoder(tmp_path)  # without the encoder
    assert same(alone.encode(PROMPTS[3]), expected[PROMPTS[3]]) and same(alone.null, expected[""])
    assert alone.describe() == encoder.describe()
    assert alone.encode([]).embeddings.shape == (0, 60, 32)


def test_filling_reads_what_is_missing_and_the_empty_prompt(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = count_reads(encoder, monkeypatch)
    cached = CachedTextEncoder(tmp_path, encoder)
    assert cached.fill(["a", "b", "a", "c"], batch_size=3) == 4
    assert read == [["", "a", "b"], ["c"]]
    assert cached.fill(["c", "d"]) == 1 and read[2:] == [["d"]]
    files = list(tmp_path.rglob("*.safetensors"))
    assert all(path.parent.name == path.name[:2] for path in files)
    assert cached.cache.size() == (5, sum(path.stat().st_size for path in files))
    with pytest.raises(UserError, match=r"2 prompts are not in this cache, the first is 'e'; fill it with the"):
        CachedTextEncoder(tmp_path).encode(["a", "e", "f"])


def test_only_real_tokens_take_room(encoder: TextEncoder, tmp_path: Path) -> None:
    cached = CachedTextEncoder(tmp_path, encoder)
    cached.encode([PROMPTS[0]])
    tokens = int(encoder.encode([PROMPTS[0]]).mask.sum())
    assert 0 < cached.cache.size()[1] - (4 * 32 * tokens + 60) < 250


def test_a_cache_of_another_encoder_is_refused_by_names(encoder: TextEncoder, tmp_path: Path) -> None:
    one = TextEncoder.from_encoder(save_tiny(tmp_path / "one", "qwen3"), max_length=16)
    CachedTextEncoder(tmp_path / "cache", one).encode(PROMPTS)
    deeper = TextEncoder.from_encoder(tmp_path / "one", max_length=16, hidden_layer=-2)
    with pytest.raises(UserError, match=r"of text encoder '.*/one', not of '.*/one' \(hidden_layer -1 there, -2"):
        PromptCache(tmp_path / "cache", deeper)
    other = TextEncoder.from_encoder(save_tiny(tmp_path / "two", "qwen3", seed=1), max_length=16)
    with pytest.raises(UserError, match=r"'.*/one', not of '.*/two' \(weights \w{12} there, \w{12} here\); give a"):
        CachedTextEncoder(tmp_path / "cache", other)
    with pytest.raises(UserError, match=r"1 encoders there, 2 here|max_length 16 there, 20 here|weights"):
        CachedTextEncoder(tmp_path / "cache", encoder)
    moved = TextEncoder.from_encoder(save_tiny(tmp_path / "elsewhere", "qwen3"), max_length=16)
    assert CachedTextEncoder(tmp_path / "cache", moved).encode(PROMPTS).mask.any()


def test_damaged_files_are_read_again(encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = CachedTextEncoder(tmp_path, encoder)
    expected = cached.encode(["a"])
    (path,) = tmp_path.rglob("*.safetensors")
    read = count_reads(encoder, monkeypatch)
    other = save({"mask": torch.ones(3, dtype=torch.bool), "embeddings": torch.zeros(3, 32)})
    for damage in (path.read_bytes()[:-10], b"", path.read_bytes()[:4], other):
        path.write_bytes(damage)
        assert same(cached.encode(["a"]), expected)
    (path.parent / ".tmp-1-half.safetensors").write_bytes(b"of a killed process")
    assert cached.cache.size() == (1, path.stat().st_size)
    assert len(read) == 4 and same(CachedTextEncoder(tmp_path).encode(["a"]), expected)


def test_what_is_no_cache_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt_cache\.json: not there, so this is no prompt cache; give"):
        CachedTextEncoder(tmp_path)
    PromptCache(tmp_path, encoder)
    path = tmp_path / "prompt_cache.json"
    content = json.loads(path.read_text())
    for text, message in (
        (json.dumps({**content, "format": 9}), "of format 9, this version reads 1"),
        ("{", "cannot be read; delete the folder"),
        (json.dumps({"format": 1}), "cannot be read; delete the folder"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            PromptCache(tmp_path)


def test_a_folder_of_other_things_and_a_file_do_not_become_a_cache(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"not empty and no prompt cache \(photo\.png is in it\); name a new folder"):
        PromptCache(tmp_path, encoder)
    with pytest.raises(UserError, match=r"photo\.png: cannot be made a prompt cache; name a new folder \(.*exists"):
        PromptCache(tmp_path / "photo.png", encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / f"{TEMPORARY_PREFIX}1-facts").write_bytes(b"")  # of another process that begins it
    PromptCache(tmp_path / "empty", encoder)


def _fill(folder: Path, source: Path, start: Any) -> None:
    torch.set_num_threads(1)
    encoder = TextEncoder.from_encoder(source, max_length=16)
    start.wait()
    CachedTextEncoder(folder, encoder).fill([f"cube {index}" for index in range(20)], batch_size=2)


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "text", "clip")
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [context.Process(target=_fill, args=(tmp_path / "cache", source, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    cached = CachedTextEncoder(tmp_path / "cache")
    assert cached.cache.size()[0] == 21
    prompts = ["", *(f"cube {index}" for index in range(20))]
    expected = TextEncoder.from_encoder(source, max_length=16).encode(prompts)
    read = cached.encode(prompts)
    torch.testing.assert_close(read.embeddings, expected.embeddings, atol=1e-5, rtol=1e-5)
    assert torch.equal(read.mask, expected.mask)
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
