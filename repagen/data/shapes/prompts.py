"""Prompts of a scene: English words, and beside them what they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from repagen.data.shapes.scenes import Background, Colour, Quadrant, Scene, SceneObject, Shape, Size

Relation = Literal["left of", "right of", "above", "below"]
_NUMBERS = {2: "two", 3: "three"}
_RELATIONS: dict[Relation, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}


@dataclass(frozen=True)
class ObjectRequest:
    """An object that a prompt asks for; what is None is left to the picture."""

    shape: Shape
    colour: Colour | None = None
    size: Size | None = None
    quadrant: Quadrant | None = None


@dataclass(frozen=True)
class ScenePrompt:
    """A prompt.

    Attributes:
        text: the words.
        objects: all objects asked for; their number is asked for too.
        background: None where the prompt does not say.
        relation: where the first of two objects is, seen from the second; None where the prompt does not say.
    """

    text: str
    objects: tuple[ObjectRequest, ...]
    background: Background | None = None
    relation: Relation | None = None


def prompts_of(scene: Scene) -> list[ScenePrompt]:
    """Return prompts that are true of a scene; the first says everything, each leaves out something else."""
    items = scene.objects
    plain = [_counted(scene)] if scene.repeated else [_phrase(item) for item in items]
    placed = [f"{_phrase(item, size=True)} at the {item.quadrant}" for item in items]
    ground = f"on a {scene.background} background"
    kinds = tuple(ObjectRequest(item.shape, item.colour) for item in items)
    everything = tuple(ObjectRequest(item.shape, item.colour, item.size, item.quadrant) for item in items)
    with_size = tuple(ObjectRequest(item.shape, item.colour, item.size) for item in items)
    with_place = tuple(ObjectRequest(item.shape, item.colour, None, item.quadrant) for item in items)
    in_corners = [f"{_phrase(item)} in the {item.quadrant} corner" for item in items]
    prompts = [
        ScenePrompt(f"{_listed(placed)} {ground}", everything, scene.background),
        ScenePrompt(_listed(plain), kinds),
        ScenePrompt(f"{_listed([_phrase(item, size=True) for item in items])} {ground}", with_size, scene.background),
        ScenePrompt(", ".join(f"at the {item.quadrant} {_phrase(item)}" for item in items), with_place),
        ScenePrompt(f"{ground}, {_listed(plain)}", kinds, scene.background),
        ScenePrompt(f"a picture of {_listed(in_corners)}", with_place),
    ]
    if len(items) == 1:
        prompts.append(ScenePrompt(f"a {items[0].shape}", (ObjectRequest(items[0].shape),)))
    relation = _relation(items)
    if relation is not None:
        words = f" {_RELATIONS[relation]} "
        prompts.append(ScenePrompt(words.join(plain), kinds, None, relation))
        prompts.append(ScenePrompt(f"{words.join(plain)} {ground}", kinds, scene.background, relation))
    return prompts


def _phrase(item: SceneObject, *, size: bool = False) -> str:
    return f"a {item.size} {item.colour} {item.shape}" if size else f"a {item.colour} {item.shape}"


def _listed(phrases: list[str]) -> str:
    return " and ".join(phrases)


def _counted(scene: Scene) -> str:
    first = scene.objects[0]
    plural = f"{first.shape}es" if first.shape == "cross" else f"{first.shape}s"
    return f"{_NUMBERS[len(scene.objects)]} {first.colour} {plural}"


def _relation(items: tuple[SceneObject, ...]) -> Relation | None:
    """Where the first of two objects of different kinds is, in a row or in a column with the second."""
    if len(items) != 2 or items[0].kind == items[1].kind:
        return None
    first, second = items
    if first.row == second.row:
        return "left of" if first.column < second.column else "right of"
    if first.column == second.column:
        return "above" if first.row < second.row else "below"
    return None
