"""A real, tiny CLIP with its tokenizer: one token a character, 20 tokens a text, 16 px."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.utils import logging

from repagen import cli
from repagen.evaluation.text_to_image.prompts import PromptSet, read_prompts
from repagen.evaluation.text_to_image.scores import ScoringModel, open_scoring_model

TOKEN_LIMIT = 20


@pytest.fixture(scope="session")
def save_clip() -> Callable[[Path, int], Path]:
    """Save a tiny CLIP of random weights; => its folder."""

    def save(folder: Path, seed: int) -> Path:
        folder.mkdir(parents=True)
        characters = [chr(code) for code in range(33, 127)]
        tokens = [*characters, *(f"{one}</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = CLIPConfig(
            text_config={**tower, **special, "vocab_size": len(tokens), "max_position_embeddings": TOKEN_LIMIT},
            vision_config={**tower, "image_size": 16, "patch_size": 4},
            projection_dim=8,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = CLIPModel(config)
            for parameter in model.parameters():  # the tiny initialisation would give nearly equal embeddings
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
        logging.disable_progress_bar()
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def clip_folder(save_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "model", 1)


@pytest.fixture(scope="session")
def pick_folder(save_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("pick") / "model", 2)


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> ScoringModel:
    return open_scoring_model(str(clip_folder))


@pytest.fixture
def prompts_of(tmp_path: Path) -> Callable[[Sequence[str]], PromptSet]:
    """Prompts of a text file."""

    def write(texts: Sequence[str]) -> PromptSet:
        (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in texts))
        return read_prompts(tmp_path / "prompts.txt")

    return write


@pytest.fixture
def dpg_prompts(tmp_path: Path) -> PromptSet:
    """A folder of <id>.txt."""
    folder = tmp_path / "dpg"
    folder.mkdir()
    for name, text in (("midjourney3", "a boat"), ("1", "two dogs"), ("COCOval42", "a red bus")):
        (folder / f"{name}.txt").write_text(text)
    return read_prompts(folder)


GENEVAL_LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
]


@pytest.fixture
def geneval_prompts(tmp_path: Path) -> PromptSet:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL_LINES))
    return read_prompts(path)


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `repagen evaluate text-to-image`; => what it printed."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["repagen", "evaluate", "text-to-image", *map(str, words)])
        cli.main()
        return capsys.readouterr().out

    return run
