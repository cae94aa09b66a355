"""What a scene is: its vocabulary, and how scene `index` of a seed is drawn by lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from repagen.errors import UserError
from repagen.randomness import derived_seed

if TYPE_CHECKING:
    from repagen.data.shapes.prompts import ScenePrompt

Shape = Literal["circle", "square", "triangle", "cross", "ring"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan"]
Background = Literal["grey", "white", "black"]
Size = Literal["small", "large"]
Quadrant = Literal["top left", "top right", "bottom left", "bottom right"]
Combinations = Literal["all", "seen", "unseen"]
Kind = tuple[Shape, Colour]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "cross")
NEW_SHAPES: tuple[Shape, ...] = ("ring",)
"""Drawn and read, but in scenes only when asked for: something new to teach a trained generator."""
COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (20, 160, 40),
    "blue": (25, 50, 230),
    "yellow": (245, 225, 30),
    "purple": (160, 20, 200),
    "cyan": (30, 210, 230),
}
"""Names and their 8-bit RGB."""
BACKGROUNDS: dict[Background, tuple[int, int, int]] = {
    "grey": (128, 128, 128),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
SIZES: dict[Size, float] = {"small": 8.0, "large": 12.0}
"""Diameter of the circle around an object, in units: one unit is a 32nd of the picture's shorter side."""
QUADRANTS: tuple[Quadrant, ...] = ("top left", "top right", "bottom left", "bottom right")
UNITS = 32
"""Units along the shorter side of a picture."""
MAX_OBJECTS = 3

UNSEEN_KINDS: frozenset[Kind] = frozenset(
    [("circle", "purple"), ("square", "yellow"), ("triangle", "cyan"), ("cross", "red")]
)
"""Shapes in a colour that the training split never shows, though it shows the shape and the colour."""
_UNSEEN_PAIRS_PER_CENT = 10
_JITTER: dict[Size, float] = {"small": 1.5, "large": 1.0}
_REPEATED_SHARE = 0.15


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape, colour, size, quadrant: as words.
        offset: (right, down) of the quadrant's centre, in units.
    """

    shape: Shape
    colour: Colour
    size: Size
    quadrant: Quadrant
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        """Refuse unknown words.

        Raises:
            UserError: a word that is not of the vocabulary.
        """
        words = {"shape": (*SHAPES, *NEW_SHAPES), "colour": COLOURS, "size": SIZES, "quadrant": QUADRANTS}
        for name, allowed in words.items():
            _check_names(f"SceneObject.{name}", [getattr(self, name)], list(allowed))

    @property
    def kind(self) -> Kind:
        """Shape and colour."""
        return self.shape, self.colour

    @property
    def row(self) -> int:
        """0 in the upper half, 1 in the lower."""
        return QUADRANTS.index(self.quadrant) // 2

    @property
    def column(self) -> int:
        """0 in the left half, 1 in the right."""
        return QUADRANTS.index(self.quadrant) % 2


@dataclass(frozen=True)
class Scene:
    """One to three objects, each in its own quadrant, on a plain background."""

    objects: tuple[SceneObject, ...]
    background: Background = "grey"

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn apart.

        Raises:
            UserError: no object, too many, two in one quadrant, or an unknown background.
        """
        _check_names("Scene.background", [self.background], list(BACKGROUNDS))
        quadrants = [item.quadrant for item in self.objects]
        if not 1 <= len(quadrants) <= MAX_OBJECTS or len(set(quadrants)) != len(quadrants):
            raise UserError(
                f"Scene.objects: {len(quadrants)} objects at {', '.join(quadrants) or 'nowhere'} given; allowed: 1 to "
                f"{MAX_OBJECTS}, each in another quadrant"
            )

    @property
    def repeated(self) -> bool:
        """Whether it shows several objects of one kind."""
        return len(self.objects) > 1 and len({item.kind for item in self.objects}) == 1

    @property
    def is_unseen(self) -> bool:
        """Whether it shows a kind, or two kinds together, that the training split holds out."""
        kinds = sorted({item.kind for item in self.objects})
        return any(kind in UNSEEN_KINDS for kind in kinds) or any(
            _is_unseen_pair(first, second) for i, first in enumerate(kinds) for second in kinds[i + 1 :]
        )

    def prompts(self) -> list[ScenePrompt]:
        """Return prompts that are true of this scene; the first says everything."""
        from repagen.data.shapes.prompts import prompts_of

        return prompts_of(self)


def _is_unseen_pair(first: Kind, second: Kind) -> bool:
    words = "+".join(sorted((" ".join(first), " ".join(second))))
    return derived_seed(0, f"shapes/pair/{words}") % 100 < _UNSEEN_PAIRS_PER_CENT


def sample_scene(
    seed: int,
    index: int,
    *,
    num_objects: int | None = None,
    combinations: Combinations = "seen",
    shapes: Sequence[Shape] = SHAPES,
) -> Scene:
    """Draw scene `index` of a seed by lot; the same arguments give the same scene.

    Args:
        seed: of the set.
        index: of the scene in it; any number.
        num_objects: 1 to 3; by lot when not given.
        combinations: `seen` leaves out the kinds and pairs of kinds that are held out of training, `unseen` has one
            in each scene, `all` does not look.
        shapes: which an object may have.

    Raises:
        UserError: `num_objects` is out of range, another name, or shapes of which no unseen scene can be made.
    """
    if num_objects is not None and not 1 <= num_objects <= MAX_OBJECTS:
        raise UserError(f"num_objects: {num_objects} given; allowed: 1 to {MAX_OBJECTS}, or None for any")
    _check_names("combinations", [combinations], get_args(Combinations))
    if isinstance(shapes, str) or not shapes:
        raise UserError(f"shapes: {shapes!r} given; allowed: a sequence of {', '.join((*SHAPES, *NEW_SHAPES))}")
    _check_names("shapes", shapes, (*SHAPES, *NEW_SHAPES))
    if combinations == "unseen" and {shape for shape, _ in UNSEEN_KINDS}.isdisjoint(shapes):
        raise UserError(
            f"shapes: {', '.join(shapes)} given, of which no scene is surely unseen; allowed with "
            f"combinations='unseen': at least one of {', '.join(SHAPES)}"
        )
    random = np.random.default_rng(derived_seed(seed, "shapes/scene", index))
    count = num_objects or int(random.integers(1, MAX_OBJECTS + 1))
    while True:
        scene = _random_scene(random, count, shapes)
        if combinations == "all" or scene.is_unseen == (combinations == "unseen"):
            return scene


def _check_names(where: str, given: Sequence[Any], allowed: Sequence[str]) -> None:
    """Refuse the first name that is not allowed."""
    for name in given:
        if name not in allowed:
            raise UserError(f"{where}: {name!r} given; allowed: {', '.join(allowed)}")


def _random_scene(random: np.random.Generator, count: int, shapes: Sequence[Shape]) -> Scene:
    repeated = count > 1 and random.random() < _REPEATED_SHARE
    all_kinds: list[Kind] = [(shape, colour) for shape in shapes for colour in COLOURS]
    places = random.permutation(len(QUADRANTS))[:count]
    chosen = random.choice(len(all_kinds), count, replace=False)
    size_names = list(SIZES)
    objects = []
    for place, kind in zip(places, [chosen[0]] * count if repeated else chosen, strict=True):
        size = size_names[int(random.integers(len(size_names)))]
        right, down = random.uniform(-_JITTER[size], _JITTER[size], 2).round(3).tolist()
        objects.append(SceneObject(*all_kinds[int(kind)], size, QUADRANTS[int(place)], (right, down)))
    return Scene(tuple(objects), list(BACKGROUNDS)[int(random.integers(len(BACKGROUNDS)))])
