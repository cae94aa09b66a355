"""Drawn scenes: what they hold, that the checker reads them, and that it can say no."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from repagen.data import DataConfig, load_batches, open_dataset
from repagen.data.config import Subset
from repagen.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    NEW_SHAPES,
    QUADRANTS,
    SHAPES,
    SIZES,
    UNSEEN_KINDS,
    Scene,
    SceneObject,
    ScenePrompt,
    check_picture,
    check_scene,
    draw_scene,
    judge,
    read_picture,
    sample_scene,
)
from repagen.data.shapes.scenes import Background, Size
from repagen.errors import UserError

SCENES = [sample_scene(11, index, combinations="all") for index in range(150)]
RED_AND_BLUE = Scene(
    (SceneObject("circle", "red", "small", "top left"), SceneObject("square", "blue", "large", "bottom left"))
)


def prompt_of(scene: Scene, text: str) -> ScenePrompt:
    return next(prompt for prompt in scene.prompts() if prompt.text == text)


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert sample_scene(3, 7) == sample_scene(3, 7)
    assert (
        len({sample_scene(3, index) for index in range(50)} | {sample_scene(4, index) for index in range(50)}) == 100
    )
    assert all(len(sample_scene(0, index, num_objects=2).objects) == 2 for index in range(20))
    with pytest.raises(UserError, match="num_objects: 4"):
        sample_scene(0, 0, num_objects=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combinations": "unseen", "shapes": ("ring",)}, "shapes: ring given, of which no scene is surely unseen"),
        ({"combinations": "unsen"}, "combinations: 'unsen' given; allowed: all, seen, unseen"),
        ({"shapes": "ring"}, "shapes: 'ring' given; allowed: a sequence of circle"),
        ({"shapes": ()}, r"shapes: \(\) given"),
        ({"shapes": ("circle", "rnig")}, "shapes: 'rnig' given; allowed: circle, .*, ring"),
    ],
)
def test_scenes_that_cannot_be_drawn_by_lot_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_scene(0, 0, num_objects=1, **options)


def test_other_words_pictures_and_sizes_are_refused() -> None:
    scene = SCENES[0]
    with pytest.raises(UserError, match=r"SceneObject.colour: 'pink' given; allowed: red"):
        replace(scene.objects[0], colour="pink")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"SceneObject.quadrant: 'middle' given; allowed: top left"):
        replace(scene.objects[0], quadrant="middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Scene.background: 'pink' given; allowed: grey"):
        replace(scene, background="pink")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"image_size: 24.5 given; the shapes allow a whole number"):
        draw_scene(scene, 24.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"picture: a Image given; allowed: an array"):
        read_picture(Image.fromarray(draw_scene(scene)))  # type: ignore[arg-type]


def test_a_pixel_is_the_mean_of_what_it_covers() -> None:
    """A large square is 10.8 units wide about the middle of its quadrant: from 2.6 to 13.4."""
    picture = draw_scene(Scene((SceneObject("square", "red", "large", "top left"),), "black")).astype(float)
    red, black = np.array(COLOURS["red"]), np.array(BACKGROUNDS["black"])
    assert np.array_equal(picture[8, 3], red) and np.array_equal(picture[8, 1], black)
    assert np.abs(picture[8, 2] - (black + 0.375 * (red - black))).max() <= 1  # 3 of 8 points lie beyond 2.6
    assert np.array_equal(picture[8, 2:14], picture[8, 2:14][::-1])


@pytest.mark.parametrize("size", [32, 64, (24, 40), (48, 32)])
def test_every_drawn_picture_is_read_as_it_is(size: int | tuple[int, int]) -> None:
    for scene in SCENES[: 150 if size == 32 else 20]:
        found = read_picture(draw_scene(scene, size))
        for prompt in scene.prompts():
            assert judge(found, prompt).right, (scene, prompt, found)


@pytest.mark.slow
def test_thousands_of_drawn_pictures_are_read_as_they_are() -> None:
    wrong = [
        scene
        for seed in range(5)
        for scene in (sample_scene(seed, index, combinations="all") for index in range(1000))
        if not check_scene(draw_scene(scene), scene).right
    ]
    assert not wrong


def test_blur_and_noise_are_forgiven() -> None:
    random = np.random.default_rng(0)
    for scene in SCENES[:30]:
        drawn = draw_scene(scene)
        assert check_scene(blurred(drawn, 0.8), scene).right
        noisy = (drawn + random.normal(0, 20, drawn.shape)).clip(0, 255)
        assert check_scene(torch.from_numpy(noisy).permute(2, 0, 1).float().div(255), scene).right
    rings: list[tuple[Size, float]] = [("large", 0.8), ("small", 0.7)]
    for size, radius in rings:
        ring = Scene((SceneObject("ring", "red", size, "top left"),))
        assert check_scene(blurred(draw_scene(ring), radius), ring).right


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


@pytest.mark.parametrize(
    ("background", "colour"),
    [
        ("grey", (255, 160, 180)),
        ("grey", (200, 200, 200)),
        ("white", (255, 200, 160)),
        ("white", (200, 200, 200)),
        ("black", (120, 60, 20)),
        ("black", (60, 60, 60)),
    ],
)
def test_an_object_of_no_colour_counts(background: Background, colour: tuple[int, int, int]) -> None:
    scene = Scene((SceneObject("circle", "red", "large", "top left"),), background)
    picture = draw_scene(scene)
    y, x = np.mgrid[:32, :32] + 0.5
    picture[(x - 24) ** 2 + (y - 24) ** 2 <= 36] = colour
    verdict = check_scene(picture, scene)
    assert verdict.object and verdict.colour and not verdict.count and not verdict.kind and not verdict.right
    alone = read_picture(np.where(x[..., None] > 16, picture, picture[0, 0]))
    assert [item.colour for item in alone.objects] == [None]
    assert not judge(alone, prompt_of(scene, "a circle")).right


def test_on_a_ground_of_a_palette_s_colour_other_colours_are_read() -> None:
    picture = np.full((32, 32, 3), COLOURS["red"], np.uint8)
    assert read_picture(picture).objects == ()
    picture[4:14, 4:14] = COLOURS["blue"]
    found = read_picture(picture)
    assert [(item.shape, item.colour) for item in found.objects] == [("square", "blue")] and found.background is None


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"colour": "green"}, {"colour"}),
        ({"shape": "triangle"}, {"object"}),
        ({"size": "large"}, {"size"}),
        ({"quadrant": "top right"}, {"position"}),
    ],
)
def test_each_attribute_can_be_wrong(change: dict[str, str], wrong: set[str]) -> None:
    first, second = RED_AND_BLUE.objects
    other = Scene((replace(first, **change), second))  # type: ignore[arg-type]
    verdict = check_scene(draw_scene(other), RED_AND_BLUE)
    assert {name for name, holds in vars(verdict).items() if not holds} == wrong
    assert not verdict.right and verdict.kind == (wrong.isdisjoint({"object", "colour"}))


def test_swapped_colours_missing_and_added_objects_are_wrong() -> None:
    first, second = RED_AND_BLUE.objects
    swapped = Scene((replace(first, colour="blue"), replace(second, colour="red")))
    assert check_scene(draw_scene(swapped), RED_AND_BLUE) == replace(
        check_scene(draw_scene(RED_AND_BLUE), RED_AND_BLUE), colour=False
    )
    missing = check_scene(draw_scene(Scene((first,))), RED_AND_BLUE)
    assert not missing.count and not missing.object
    added = check_scene(draw_scene(RED_AND_BLUE), Scene((first,)))
    assert added.object and added.colour and added.position and not added.count and not added.right
    assert not check_scene(draw_scene(replace(RED_AND_BLUE, background="white")), RED_AND_BLUE).background


def test_relations_and_attributes_left_out() -> None:
    picture = draw_scene(RED_AND_BLUE)
    assert check_picture(picture, prompt_of(RED_AND_BLUE, "a red circle above a blue square")).right
    first, second = RED_AND_BLUE.objects
    upside_down = draw_scene(Scene((replace(first, quadrant="bottom left"), replace(second, quadrant="top left"))))
    assert not check_picture(upside_down, prompt_of(RED_AND_BLUE, "a red circle above a blue square")).position
    assert check_picture(upside_down, prompt_of(RED_AND_BLUE, "a red circle and a blue square")).right


def test_blank_noise_and_half_drawn_pictures_are_wrong() -> None:
    blank = np.full((32, 32, 3), 128, np.uint8)
    assert read_picture(blank).objects == () and not check_scene(blank, RED_AND_BLUE).right
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    faint = (0.7 * blank + 0.3 * draw_scene(RED_AND_BLUE)).astype(np.uint8)
    bar = blank.copy()
    bar[4:7, 2:30] = COLOURS["red"]
    brown = blank.copy()
    brown[4:12, 4:12] = (110, 70, 20)
    for picture in (noise, faint, bar, brown):
        found = read_picture(picture)
        assert not any(judge(found, prompt).right for prompt in RED_AND_BLUE.prompts())
    assert [item.shape for item in read_picture(bar).objects] == [None]
    assert [item.colour for item in read_picture(brown).objects] == [None]


def test_new_shapes_are_drawn_and_read_but_sampled_only_when_asked_for() -> None:
    for shape, size in itertools.product(NEW_SHAPES, SIZES):
        scene = Scene((SceneObject(shape, "red", size, "top left"), SceneObject("circle", "red", size, "top right")))
        assert check_scene(draw_scene(scene), scene).right
        alone = replace(scene, objects=scene.objects[:1])
        circle = replace(alone, objects=(replace(alone.objects[0], shape="circle"),))
        assert not check_picture(draw_scene(alone), prompt_of(circle, "a red circle")).object
    assert not any(item.shape in NEW_SHAPES for scene in SCENES for item in scene.objects)
    asked = [sample_scene(0, index, shapes=(*SHAPES, *NEW_SHAPES)) for index in range(60)]
    assert {item.shape for scene in asked for item in scene.objects} == {*SHAPES, *NEW_SHAPES}
    assert not any(scene.is_unseen for scene in asked)


def test_counted_prompts_ask_for_as_many() -> None:
    three = Scene(tuple(SceneObject("cross", "cyan", "small", quadrant) for quadrant in QUADRANTS[:3]), "black")
    prompt = prompt_of(three, "three cyan crosses")
    assert check_picture(draw_scene(three), prompt).right
    two = check_picture(draw_scene(Scene(three.objects[:2], "black")), prompt)
    assert not two.count and not two.right


def test_the_training_split_holds_combinations_out_but_no_word() -> None:
    seen = [sample_scene(0, index) for index in range(300)]
    kinds = {item.kind for scene in seen for item in scene.objects}
    assert kinds.isdisjoint(UNSEEN_KINDS) and len(kinds) == len(SHAPES) * len(COLOURS) - len(UNSEEN_KINDS)
    assert {kind[0] for kind in kinds} == set(SHAPES) and {kind[1] for kind in kinds} == set(COLOURS)
    unseen = [sample_scene(0, index, combinations="unseen") for index in range(200)]
    assert all(scene.is_unseen for scene in unseen) and not any(scene.is_unseen for scene in seen)
    held_out_pairs = [s for s in unseen if UNSEEN_KINDS.isdisjoint(item.kind for item in s.objects)]
    assert held_out_pairs and all(len(scene.objects) > 1 for scene in held_out_pairs)
    assert all(scene.is_unseen and len(scene.objects) == 1 for scene in (
        sample_scene(0, index, num_objects=1, combinations="unseen") for index in range(20)
    ))  # fmt: skip


def test_the_dataset_gives_scenes_with_captions() -> None:
    dataset = open_dataset(DataConfig(kind="shapes", image_size=32, subset="train", num_images=40))
    assert len(dataset) == 40 and dataset.num_classes == 0
    scene = sample_scene(0, 5)
    sample = dataset[5]
    assert sample["caption"] == scene.prompts()[0].text and sample["label"] == 0
    assert torch.equal((sample["image"] * 255).round().byte(), torch.from_numpy(draw_scene(scene)).permute(2, 0, 1))
    keyed = [[(5, position) for position in range(12)]]
    (batch,) = load_batches(dataset, keyed, seed=0)
    (again,) = load_batches(dataset, keyed, seed=0)
    assert batch["caption"] == again["caption"]
    assert len(set(batch["caption"])) > 2 and set(batch["caption"]) <= {prompt.text for prompt in scene.prompts()}


def test_the_subsets_differ_and_are_fingerprinted() -> None:
    names: tuple[Subset, ...] = ("train", "validation", "unseen", "all", "with_new_shapes")
    datasets = [open_dataset(DataConfig(kind="shapes", image_size=32, subset=name, num_images=4)) for name in names]
    assert len({dataset.fingerprint() for dataset in datasets}) == len(names)
    larger = open_dataset(DataConfig(kind="shapes", image_size=32, subset="train", num_images=5))
    assert larger.fingerprint() != datasets[0].fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizontal_flip": True}, "neither mirrored"),
        ({"image_size": 16}, "16x16"),
        ({"num_images": 0}, "data.num_images: 0"),
        ({"kind": "digits", "subset": "unseen"}, "data.subset: unseen"),
        ({"kind": "digits", "subset": "with_new_shapes"}, "data.subset: with_new_shapes"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(DataConfig(**{"kind": "shapes", "image_size": 32, **settings}))  # type: ignore[arg-type]


def test_objects_that_have_changed_places_are_still_there() -> None:
    """Paired by their places both would have the wrong shape."""
    here, there = SceneObject("circle", "red", "small", "top left"), SceneObject("square", "red", "small", "top right")
    swapped = Scene((replace(here, quadrant="top right"), replace(there, quadrant="top left")))
    verdict = check_scene(draw_scene(swapped), Scene((here, there)))
    assert verdict.kind and not verdict.position
