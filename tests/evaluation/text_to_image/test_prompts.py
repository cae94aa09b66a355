from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from repagen.errors import UserError
from repagen.evaluation.text_to_image.prompts import Prompt, PromptSet, read_prompts


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\r\nune\u2028île \n犬".encode())
    found = read_prompts(path)
    assert found.prompts == (Prompt("00000", "a cat"), Prompt("00001", "une\u2028île"), Prompt("00002", "犬"))
    assert not found.named
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.protocol == {"kind": "prompts", "path": str(path), "sha256": sha256, "count": 3}


def test_json_lines_keep_their_metadata(geneval_prompts: PromptSet) -> None:
    lines = [json.loads(line) for line in geneval_prompts.path.read_text().splitlines()]
    assert [prompt.metadata for prompt in geneval_prompts.prompts] == lines
    assert [prompt.text for prompt in geneval_prompts.prompts] == ["a photo of a bench", "a photo of two clocks"]
    assert not geneval_prompts.named and geneval_prompts.prompts[1].id == "00001"


def test_json_lines_may_bring_ids(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": 7, "prompt": "a"}\n{"id": "x", "prompt": "b"}\n')
    found = read_prompts(tmp_path / "p.jsonl")
    assert found.named and [prompt.id for prompt in found.prompts] == ["7", "x"]


def test_a_folder_names_its_prompts(dpg_prompts: PromptSet) -> None:
    assert [(prompt.id, prompt.text) for prompt in dpg_prompts.prompts] == [
        ("1", "two dogs"),
        ("COCOval42", "a red bus"),
        ("midjourney3", "a boat"),
    ]
    before = dpg_prompts.sha256
    (dpg_prompts.path / "1.txt").write_text("three dogs")
    assert dpg_prompts.named and read_prompts(dpg_prompts.path).sha256 != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", r"p.txt:1: empty"),
        ("p.txt", "a\n \nb\n", r"p.txt:2: empty"),
        ("p.csv", "a", "prompts come as FILE.txt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p.jsonl:2: not valid JSON \(Expecting value\)"),
        ("p.jsonl", '{"prompt": "a"}\n\n', r"p.jsonl:2: not valid JSON"),
        ("p.jsonl", '["a"]', r"p.jsonl:1: must be a JSON object with a prompt, got list"),
        ("p.jsonl", '{"text": "a"}', r"p.jsonl:1:prompt: must be a text that is not empty, got null"),
        ("p.jsonl", '{"prompt": " "}', r"p.jsonl:1:prompt"),
        ("p.jsonl", '{"prompt": "a", "tag": 3}', r"p.jsonl:1:tag: must be a text, got 3"),
        ("p.jsonl", '{"prompt": "a", "include": {}}', r"p.jsonl:1:include: must be a list of objects, got dict"),
        ("p.jsonl", '{"prompt": "a", "include": [{"class": "cat"}]}', r"p.jsonl:1:include: each entry needs"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', r"p.jsonl:2: id '1' was there before"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b"}', r"p.jsonl:2: either every line has an id or none"),
        ("p.jsonl", '{"prompt": "a", "id": "../b"}', r"p.jsonl:1:id: must be a number or a text that can name a file"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder of prompts"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(UserError, match=r"looked for <id>\.txt"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match=r"a\.txt: cannot be read as UTF-8"):
            read_prompts(path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match=r"a\.txt: empty"):
        read_prompts(tmp_path)
