"""The score of shapes: perfect pictures, wrong ones in known ways, and that each share counts what it says."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from repagen.data.shapes import Scene, draw_scene, sample_scene
from repagen.errors import UserError
from repagen.evaluation.text_to_image.shapes import (
    ATTRIBUTES,
    GROUPS,
    SceneGroup,
    ShapesPrompts,
    Share,
    evaluate_shapes,
    score_shapes,
)
from repagen.randomness import derived_seed


def scenes(num_prompts: int, seed: int, groups: Sequence[SceneGroup] = GROUPS) -> list[Scene]:
    """The scenes that are asked for, found by their own rule."""
    return [
        sample_scene(
            derived_seed(seed, f"shapes score/{group}"),
            index,
            num_objects=group.num_objects,
            combinations=group.combinations,
        )
        for group in groups
        for index in range(num_prompts)
    ]


def pictures(some: Sequence[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([draw_scene(scene) for scene in some])).permute(0, 3, 1, 2)


def test_pictures_of_the_scenes_are_all_right() -> None:
    drawn = pictures(scenes(3, seed=4))
    seen: list[str] = []

    def draw(prompts: Sequence[str], indices: Sequence[int]) -> torch.Tensor:
        seen.extend(prompts)
        return drawn[list(indices)]

    score = score_shapes(draw, 3, seed=4, batch_size=5)
    assert seen == [scene.prompts()[0].text for scene in scenes(3, seed=4)]
    assert list(score.shares) == list(GROUPS)
    assert set(score.metrics().values()) == {1.0} and len(score.metrics()) == 6 * len(ATTRIBUTES)
    assert score.rows()[1][1] == "100.0 % (43.9 to 100.0)"


def test_what_is_wrong_is_counted_where_it_is_wrong() -> None:
    """A mirrored picture keeps everything but positions; one whose red and blue are exchanged loses colours."""
    groups = [SceneGroup("seen", 2)]
    asked = scenes(40, seed=0, groups=groups)
    drawn = pictures(asked)
    drawn[:10] = drawn[:10].flip(-1)
    drawn[10:30] = drawn[10:30][:, [2, 1, 0]]
    score = score_shapes(lambda prompts, indices: drawn[list(indices)], 40, seed=0, groups=groups)
    counts = {name: round(40 * score.share(name, 2).value) for name in ATTRIBUTES}
    assert counts["position"] == 30 and counts["count"] == counts["size"] == counts["object"] == 40
    recoloured = sum(any(item.colour not in ("green", "purple") for item in scene.objects) for scene in asked[10:30])
    assert counts["colour"] == counts["kind"] == 40 - recoloured
    assert counts["all four"] == counts["right"] == 30 - recoloured


def test_an_interval_is_wilsons() -> None:
    for hits, total in ((0, 12), (7, 12), (480, 500), (500, 500)):
        expected = binomtest(hits, total).proportion_ci(0.95, "wilson")
        assert Share(hits, total).interval == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_prompts_are_a_function_of_the_seed_and_say_their_sort() -> None:
    five, nine = list(ShapesPrompts(5, 1)), list(ShapesPrompts(9, 1))
    assert five[:5] == nine[:5] and five[5:10] == nine[9:14]
    assert five != list(ShapesPrompts(5, 2))
    assert [len(prompt.objects) for _, prompt in five] == [1] * 5 + [2] * 5 + [3] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert all(scene.is_unseen for scene in scenes(5, 1)[15:]) and not any(s.is_unseen for s in scenes(5, 1)[:15])
    for wrong in ({"num_prompts": 0}, {"groups": ()}):
        with pytest.raises(UserError, match="num_prompts"):
            ShapesPrompts(**wrong)


def test_another_number_of_pictures_is_refused() -> None:
    with pytest.raises(UserError, match="18 prompts gave 17 images"):
        score_shapes(lambda prompts, indices: torch.zeros(17, 3, 32, 32, dtype=torch.uint8), 3)


class Draughtsman:
    """Stands in for a pipeline: draws the scene of each prompt, mirrored where the noise says so."""

    config: ClassVar[dict[str, str]] = {"_name_or_path": "draughtsman", "null_prompt": "learned"}
    scheduler = SimpleNamespace(config={})
    transformer = SimpleNamespace(dtype=torch.float32, config={}, state_dict=dict)
    vae = SimpleNamespace(config={}, state_dict=dict)

    def __init__(self, num_prompts: int) -> None:
        self.known = {scene.prompts()[0].text: scene for scene in scenes(num_prompts, seed=0)}

    def set_progress_bar_config(self, **options: bool) -> None: ...

    def check_options(self, options: Any) -> None: ...

    def latent_grid(self, height: Any, width: Any) -> None: ...

    def __call__(self, prompt: list[str], generator: list[torch.Generator], output_type: str) -> Any:
        drawn = pictures([self.known[text] for text in prompt]) / 255
        coins = torch.stack([torch.rand((), generator=one) for one in generator])
        return SimpleNamespace(images=torch.where(coins[:, None, None, None] < 0.5, drawn.flip(-1), drawn))


def test_a_pipelines_score_and_all_that_it_depends_on() -> None:
    result = evaluate_shapes(Draughtsman(8), ShapesPrompts(8, 0), forward_batch_size=16)
    score = result.score
    assert score.share("kind", 3).value == score.share("kind", 1, "unseen").value == 1
    hits = sum(shares["position"].hits for shares in score.shares.values())
    assert 12 <= hits <= 36 and hits == sum(row["position"] for row in result.per_prompt)
    content = result.as_dict()
    assert content["metrics"] == score.metrics() and content["num_samples"] == 48
    assert content["confidence_95"]["seen, 2 objects: right"] == list(score.share("right", 2).interval)
    assert content["samples"]["seed"] == 0 and len(content["samples"]["pixels_sha256"]) == 64
    lines = result.table().splitlines()
    assert lines[0].split("  ")[1:] and "unseen, 3 objects" in lines[0] and "100.0 %" in lines[1]
