from __future__ import annotations

import html
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio
import pytest
from drawing_parts import ORIGIN, REQUEST
from PIL import Image

from repagen.app.drawing import DrawingRequest
from repagen.app.page import Page, Side, _request_of, _settings, _warn
from repagen.cli import _parse, _run
from repagen.errors import UserError
from repagen.pipelines.png import read_png_facts
from repagen.pipelines.sample_command import PIPELINE_KINDS, open_pipeline


@pytest.fixture
def page(pipe: Any, tmp_path: Path) -> Page:
    from tiny_pipelines import tiny_pipeline

    return Page([Side("one", pipe, ORIGIN), Side("other", tiny_pipeline(id2label={"0": "tabby"}), ORIGIN)], tmp_path)


def files(content: str) -> list[Path]:
    return [Path(html.unescape(name)) for name in re.findall(r'src="gradio_api/file=([^"]+)"', content)]


def test_both_sides_draw_and_every_file_is_written_once(page: Page) -> None:
    updates = list(page.draw("visitor", REQUEST))
    words = [update.words for update in updates]
    assert words[0] == "one: step 1 of 5" and words[-2:] == ["other: step 5 of 5", "done"]
    images = {number: files(content) for update in updates for number, content in update.images.items()}
    states = {number: files(content) for update in updates for number, content in update.trajectories.items()}
    assert [len(images[number]) for number in (0, 1)] == [2, 2] and [len(states[number]) for number in (0, 1)] == [
        3,
        3,
    ]
    shown = [path for side in (*images.values(), *states.values()) for path in side]
    assert sorted(shown) == sorted(page.folder.iterdir())
    assert sum(bool(update.trajectories) for update in updates) == 6  # only when there is a new one


def test_pictures_carry_their_facts(page: Page) -> None:
    *_, update = (update for update in page.draw("visitor", REQUEST) if update.images)
    facts = [read_png_facts(path) for path in files(update.images[1])]
    assert [(fact["kind"], fact["index"], fact["seed"], fact["class_name"]) for fact in facts] == [
        ("sample", 0, 3, "tabby"),
        ("sample", 1, 3, "tabby"),
    ]


def test_the_command_of_a_picture_draws_its_file(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    words = ["app", "--model", str(tmp_path / "model"), "--device", "cpu"]
    side = Side("one", *open_pipeline(_parse(words), PIPELINE_KINDS))
    *_, done = Page([side], tmp_path).draw("visitor", REQUEST)
    program, *words = shlex.split(read_png_facts(done.files[1])["command"])
    assert program == "repagen"
    _run([*words, "--output", str(tmp_path / "out")])
    again = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.read_bytes() for path in done.files] == [path.read_bytes() for path in again]


def test_stop_concerns_one_visitor(page: Page) -> None:
    words = []
    for update in page.draw("a", DrawingRequest("tabby", 1, 300, 1.0, (0.0, 1.0), 0, 0)):
        page.stop("b")
        if len(words) == 3:
            page.stop("a")
        words.append(update.words)
    assert words[-1] == "stopped" and 5 <= len(words) < 250 and not any("other" in word for word in words)


def test_a_class_that_one_model_lacks_is_drawn_by_the_other(page: Page) -> None:
    updates = list(page.draw("visitor", DrawingRequest("forklift", 1, 5, 1.0, (0.0, 1.0), 0, 0)))
    images = {number: files(content) for update in updates for number, content in update.images.items()}
    assert len(images[0]) == 1 and images[1] == [] and updates[0].trajectories == {1: ""}
    first, note = updates[-1].words.split("\n")
    assert first == "done" and note.startswith("other: class_labels has 'forklift'") and note.endswith(", not drawn")


def test_a_class_that_no_model_has_is_refused(page: Page) -> None:
    with pytest.raises(UserError, match="'zebra', which is no class"):
        next(page.draw("visitor", DrawingRequest("zebra", 1, 5, 1.0, (0.0, 1.0), 0, 0)))


def test_a_warning_shows_names_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    _warn(UserError("<img src=x> is no class"))
    assert warnings == ["&lt;img src=x&gt; is no class"]


def test_classes_of_both_models_are_offered_once(page: Page) -> None:
    assert page.class_names() == [
        "tabby, tabby cat",
        "Golden Retriever",
        "crane",
        "forklift, crane",
        "tabby",
        "1",
        "2",
        "3",
    ]


@pytest.mark.parametrize(("scale", "bounds"), [(0.5, (0.5, 10)), (4.0, (1, 10)), (12.5, (1, 12.5))])
def test_the_range_of_guidance_includes_the_default(tmp_path: Path, scale: float, bounds: tuple[float, float]) -> None:
    from tiny_pipelines import tiny_pipeline

    side = Side("one", tiny_pipeline(sampling_defaults={"guidance_scale": scale}), ORIGIN)
    slider = next(field for field in _settings(Page([side], tmp_path)) if field.label == "guidance")
    assert (slider.minimum, slider.maximum, slider.value) == (*bounds, scale)


def test_empty_fields_are_named() -> None:
    with pytest.raises(UserError, match="seed is empty; give a number"):
        _request_of(False, "3", 4, 50, 1.0, 0.0, 1.0, None, 8)


@pytest.fixture
def prompt_page(tmp_path: Path) -> Page:
    from tiny_pipelines import tiny_text_pipeline

    defaults = {"num_inference_steps": 3, "guidance_scale": 3.0}
    return Page([Side("text", tiny_text_pipeline(sampling_defaults=defaults), ORIGIN)], tmp_path)


def test_a_text_model_has_fields_for_prompts(prompt_page: Page) -> None:
    fields = _settings(prompt_page)
    assert [field.label for field in fields[:4]] == ["prompt", "negative prompt", "images", "steps"]
    assert prompt_page.class_names() == []
    request = _request_of(True, "a red cube", "", 2, 3, 3.0, 0.0, 1.0, 7, 1)
    assert request == DrawingRequest("a red cube", 2, 3, 3.0, (0.0, 1.0), 7, 1)
    assert _request_of(True, None, "dull", 2, 3, 3.0, 0.0, 1.0, 7, 1).negative_prompt == "dull"


def test_prompts_are_drawn_and_the_negative_one_tells(prompt_page: Page) -> None:
    plain = DrawingRequest("a red cube", 2, 3, 3.0, (0.0, 1.0), 7, 1)
    shown = []
    for request in (plain, plain, replace(plain, subject="two dogs"), replace(plain, negative_prompt="dull")):
        *_, update = (update for update in prompt_page.draw("visitor", request) if update.images)
        shown.append([path.read_bytes() for path in files(update.images[0])])
    facts = [read_png_facts(path) for path in files(update.images[0])]
    pixels = [[Image.open(io.BytesIO(content)).tobytes() for content in images] for images in shown]
    assert pixels[0] == pixels[1] and len({pixels[0][0], pixels[0][1], pixels[2][0], pixels[3][0]}) == 4
    assert [(fact["prompt"], fact["negative_prompt"], fact["index"]) for fact in facts] == [
        ("a red cube", "dull", 0),
        ("a red cube", "dull", 1),
    ]


def test_models_of_prompts_and_of_classes_share_no_page(prompt_page: Page, page: Page, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text draws prompts and one does not; open them on a page each"):
        Page([page.sides[0], *prompt_page.sides], tmp_path)


def test_command_line() -> None:
    args = _parse(["app", "--model", "m", "--lora", "a=0.5", "--beside-lora", "b", "--port", "1"])
    assert (args.lora, args.beside, args.beside_lora, args.host, args.port) == (["a=0.5"], None, ["b"], "127.0.0.1", 1)


def test_a_model_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model"):
        _run(["app", "--model", str(tmp_path)])


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(UserError, match=f"--port must be from 0 to 65535, got {port}"):
        _run(["app", "--model", "none", "--port", port])
