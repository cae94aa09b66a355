"""The exports, read back as the evaluators of GenEval and DPG-Bench read them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import folder_bytes
from PIL import Image

from repagen.errors import UserError
from repagen.evaluation.text_to_image.export import export_dpg, export_geneval
from repagen.evaluation.text_to_image.prompts import PromptSet
from repagen.randomness import generator_for


class Provider:
    """Images that are functions of prompt and index; counts what it was asked for."""

    def __init__(self, size: tuple[int, int] = (8, 8), fails_at: int | None = None) -> None:
        self.size, self.fails_at = size, fails_at
        self.asked: list[list[tuple[str, int]]] = []

    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> list[torch.Tensor]:
        self.asked.append(list(zip(prompts, indices, strict=True)))
        if self.fails_at in indices:
            raise KeyboardInterrupt
        return [self.image(prompt, index) for prompt, index in zip(prompts, indices, strict=True)]

    def image(self, prompt: str, index: int) -> torch.Tensor:
        generator = generator_for(0, prompt, index)
        return torch.randint(0, 256, (3, *self.size), dtype=torch.uint8, generator=generator)

    def pixels(self, prompt: str, index: int) -> np.ndarray:
        return self.image(prompt, index).permute(1, 2, 0).numpy()


def read_as_geneval(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    found = {}
    for name in os.listdir(folder):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        with open(folder / name / "metadata.jsonl") as file:
            metadata = json.load(file)
        samples = {}
        for sample in os.listdir(folder / name / "samples"):
            assert re.match(r"\d+\.png", sample)
            samples[sample] = np.array(Image.open(folder / name / "samples" / sample))
        found[name] = metadata, samples
    return found


def test_geneval_reads_every_prompt_with_its_metadata_and_images(tmp_path: Path, geneval_prompts: PromptSet) -> None:
    provider = Provider()
    assert export_geneval(tmp_path / "out", geneval_prompts, provider) == 2
    found = read_as_geneval(tmp_path / "out")
    assert sorted(found) == ["00000", "00001"] == sorted(os.listdir(tmp_path / "out"))
    for number, prompt in enumerate(geneval_prompts.prompts):
        metadata, samples = found[f"{number:05d}"]
        assert metadata == prompt.metadata
        assert sorted(samples) == ["00000.png", "00001.png", "00002.png", "00003.png"]
        for image in range(4):
            expected = provider.pixels(prompt.text, 4 * number + image)
            np.testing.assert_array_equal(samples[f"{image:05d}.png"], expected)
        assert np.array(Image.open(tmp_path / "out" / f"{number:05d}" / "grid.png")).shape == (16, 16, 3)


def test_dpg_cuts_the_images_out_of_the_grid(tmp_path: Path, dpg_prompts: PromptSet) -> None:
    provider, side = Provider(), 8
    assert export_dpg(tmp_path / "out", dpg_prompts, provider) == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["1.png", "COCOval42.png", "midjourney3.png"]
    corners = [(0, 0), (side, 0), (0, side), (side, side)]
    for name in os.listdir(tmp_path / "out"):
        number = [prompt.id for prompt in dpg_prompts.prompts].index(name.split(".")[0])
        grid = Image.open(tmp_path / "out" / name)
        assert grid.size == (2 * side, 2 * side)
        for image, (left, top) in enumerate(corners):
            cut = np.array(grid.crop((left, top, left + side, top + side)))
            np.testing.assert_array_equal(cut, provider.pixels(dpg_prompts.prompts[number].text, 4 * number + image))


def test_one_image_a_prompt_is_the_picture_itself(tmp_path: Path, dpg_prompts: PromptSet) -> None:
    provider = Provider()
    export_dpg(tmp_path / "out", dpg_prompts, provider, images_per_prompt=1, any_count=True)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out/1.png")), provider.pixels("two dogs", 0))


@pytest.mark.parametrize(("batch_size", "calls"), [(1, [4, 4, 4]), (9, [8, 4]), (50, [12])])
def test_batches_hold_whole_prompts(tmp_path: Path, dpg_prompts: PromptSet, batch_size: int, calls: list[int]) -> None:
    provider = Provider()
    export_dpg(tmp_path / "out", dpg_prompts, provider, batch_size=batch_size)
    assert [len(asked) for asked in provider.asked] == calls
    assert [index for asked in provider.asked for _, index in asked] == list(range(12))


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_an_interrupted_export_is_completed_only_when_asked(
    tmp_path: Path, geneval_prompts: PromptSet, dpg_prompts: PromptSet, layout: str
) -> None:
    export, prompts = {"geneval": (export_geneval, geneval_prompts), "dpg": (export_dpg, dpg_prompts)}[layout]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    export(whole, prompts, Provider())
    with pytest.raises(KeyboardInterrupt):
        export(broken, prompts, Provider(fails_at=5))
    assert len(os.listdir(broken)) == 1
    with pytest.raises(UserError, match=r"is not empty \(it has .*--resume"):
        export(broken, prompts, Provider())
    provider = Provider()
    assert export(broken, prompts, provider, resume=True) == len(prompts) - 1
    assert provider.asked[0][0][1] == 4
    assert folder_bytes(broken) == folder_bytes(whole)


def test_what_a_killed_or_damaged_export_left_is_written_anew(tmp_path: Path, geneval_prompts: PromptSet) -> None:
    out = tmp_path / "out"
    export_geneval(out, geneval_prompts, Provider())
    whole = folder_bytes(out)
    (out / "00001/samples/00003.png").write_bytes(whole["00001/samples/00003.png"][:60])
    (out / ".tmp-00000/samples").mkdir(parents=True)
    assert export_geneval(out, geneval_prompts, Provider(), resume=True) == 1
    assert folder_bytes(out) == whole and sorted(os.listdir(out)) == ["00000", "00001"]
    (out / "00000/samples/00002.png").unlink()
    assert export_geneval(out, geneval_prompts, Provider(), resume=True) == 1
    assert folder_bytes(out) == whole


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:60])])
def test_a_prompt_without_its_grid_is_completed(tmp_path: Path, geneval_prompts: PromptSet, damage: Any) -> None:
    out = tmp_path / "out"
    export_geneval(out, geneval_prompts, Provider())
    whole = folder_bytes(out)
    damage(out / "00001/grid.png")
    assert export_geneval(out, geneval_prompts, Provider(), resume=True) == 1
    assert folder_bytes(out) == whole


def test_a_damaged_grid_is_written_anew(tmp_path: Path, dpg_prompts: PromptSet) -> None:
    out = tmp_path / "out"
    export_dpg(out, dpg_prompts, Provider())
    whole = folder_bytes(out)
    (out / "1.png").write_bytes(whole["1.png"][:60])
    (out / ".tmp-1.png").write_bytes(b"half")
    assert export_dpg(out, dpg_prompts, Provider(), resume=True) == 1
    assert folder_bytes(out) == whole


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, geneval_prompts: PromptSet, dpg_prompts: PromptSet, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(images: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr("repagen.evaluation.text_to_image.export.save_image_grid", fill_the_disk)
    export, prompts = {"geneval": (export_geneval, geneval_prompts), "dpg": (export_dpg, dpg_prompts)}[layout]
    with pytest.raises(OSError, match="no space left"):
        export(tmp_path / "out", prompts, Provider())
    assert os.listdir(tmp_path / "out") == []


def test_an_export_of_something_else_is_not_resumed(
    tmp_path: Path, geneval_prompts: PromptSet, dpg_prompts: PromptSet
) -> None:
    export_geneval(tmp_path / "geneval", geneval_prompts, Provider())
    turned = dataclasses.replace(geneval_prompts, prompts=geneval_prompts.prompts[::-1])
    with pytest.raises(UserError, match="is of another prompt than 'a photo of two clocks'"):
        export_geneval(tmp_path / "geneval", turned, Provider(), resume=True)
    export_dpg(tmp_path / "dpg_out", dpg_prompts, Provider())
    fewer = dataclasses.replace(dpg_prompts, prompts=dpg_prompts.prompts[:2])
    with pytest.raises(UserError, match=r"has midjourney3\.png, which is not of this export"):
        export_dpg(tmp_path / "dpg_out", fewer, Provider(), resume=True)
    (tmp_path / "dpg_out/1.png").unlink()
    with pytest.raises(UserError, match="others have 8 px"):
        export_dpg(tmp_path / "dpg_out", dpg_prompts, Provider(size=(4, 4)), resume=True)
    Image.new("RGB", (15, 16)).save(tmp_path / "dpg_out/1.png")
    with pytest.raises(UserError, match="is 15x16, no grid of 4 images"):
        export_dpg(tmp_path / "dpg_out", dpg_prompts, Provider(), resume=True)


def test_dpg_refuses_what_its_evaluator_would_cut_wrongly(tmp_path: Path, dpg_prompts: PromptSet) -> None:
    with pytest.raises(UserError, match="images of prompt 1 are 12x8: it is not square"):
        export_dpg(tmp_path / "out", dpg_prompts, Provider(size=(8, 12)))

    def growing(prompts: Sequence[str], indices: Sequence[int]) -> list[torch.Tensor]:
        return [torch.zeros(3, 8 + index // 4, 8 + index // 4, dtype=torch.uint8) for index in indices]

    with pytest.raises(UserError, match="images of prompt COCOval42 are 9x9: others have 8 px"):
        export_dpg(tmp_path / "other", dpg_prompts, growing)
    dotted = dataclasses.replace(dpg_prompts.prompts[0], id="a.b")
    with pytest.raises(UserError, match=r"id 'a\.b' has a dot"):
        export_dpg(tmp_path / "x", dataclasses.replace(dpg_prompts, prompts=(dotted,)), Provider())


def test_the_wrong_kind_of_prompts_is_refused(
    tmp_path: Path, geneval_prompts: PromptSet, dpg_prompts: PromptSet
) -> None:
    with pytest.raises(UserError, match="prompt 0 has no tag"):
        export_geneval(tmp_path / "out", dpg_prompts, Provider())
    with pytest.raises(UserError, match="its prompts have no ids"):
        export_dpg(tmp_path / "out", geneval_prompts, Provider())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_another_count_than_four_must_be_asked_for(
    tmp_path: Path, geneval_prompts: PromptSet, dpg_prompts: PromptSet, count: int
) -> None:
    for export, prompts in ((export_geneval, geneval_prompts), (export_dpg, dpg_prompts)):
        with pytest.raises(UserError, match=f"got {count}"):
            export(tmp_path / "out", prompts, Provider(), images_per_prompt=count)
    if count:
        export_geneval(tmp_path / "out", geneval_prompts, Provider(), images_per_prompt=count, any_count=True)
        assert len(os.listdir(tmp_path / "out/00001/samples")) == count
    if count == 5:
        with pytest.raises(UserError, match="at most 4, got 5"):
            export_dpg(tmp_path / "dpg_out", dpg_prompts, Provider(), images_per_prompt=count, any_count=True)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "4 prompts gave 3 images"),
        (torch.zeros(4, 3, 8, 8), r"images must be uint8 \(3, H, W\) each, got float32"),
    ],
)
def test_a_provider_that_returns_something_else_is_named(
    tmp_path: Path, geneval_prompts: PromptSet, returned: torch.Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export_geneval(tmp_path / "out", geneval_prompts, lambda prompts, indices: returned)
    assert os.listdir(tmp_path / "out") == []
