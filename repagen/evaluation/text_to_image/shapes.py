"""How much of its prompts a text-to-image model draws, on scenes of shapes, whose pictures are read without a network.

A small GenEval (2310.11513) whose truth is known: `repagen.data.shapes` writes the prompts and reads the pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repagen.data.shapes import ScenePrompt, SceneVerdict, check_picture, sample_scene
from repagen.data.shapes.scenes import MAX_OBJECTS, Combinations
from repagen.errors import UserError
from repagen.evaluation.extraction import ImageSink, pixels_sha256
from repagen.evaluation.reporting import aligned, described, software_versions
from repagen.evaluation.text_to_image.export import ImageProvider
from repagen.evaluation.text_to_image.prompted import PipelinePromptImages
from repagen.evaluation.text_to_image.prompts import PromptSet, prompt_set
from repagen.evaluation.text_to_image.scores import require_uint8_rgb
from repagen.evaluation.text_to_image.scoring import judge_images
from repagen.randomness import derived_seed

ATTRIBUTES = ("object", "colour", "position", "count", "size", "background", "kind", "all four", "right")
"""What is counted: the parts of a `SceneVerdict`; its `kind` (shapes, colours and count at once) and `right`
(everything at once); and `all four`: shapes, colours, positions and count at once."""
_Z_95 = 1.959963984540054


@dataclass(frozen=True, order=True)
class SceneGroup:
    """A sort of scenes that is scored by itself.

    Attributes:
        combinations: `seen` in training, or `unseen`: at least one combination of seen words that training held out.
        num_objects: 1 to 3.
    """

    combinations: Combinations
    num_objects: int

    def __str__(self) -> str:
        return f"{self.combinations}, {self.num_objects} object" + "s" * (self.num_objects > 1)


GROUPS: tuple[SceneGroup, ...] = tuple(
    SceneGroup(combinations, count) for combinations in ("seen", "unseen") for count in range(1, MAX_OBJECTS + 1)
)
"""All sorts."""


@dataclass(frozen=True)
class Share:
    """A share of pictures: `hits` of `total`."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of Wilson (1927), which holds for shares near 0 and 1 and for few pictures."""
        n, z2 = self.total, _Z_95**2
        middle = (self.value + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z_95 / (1 + z2 / n) * math.sqrt(self.value * (1 - self.value) / n + z2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class ShapesPrompts:
    """Prompts of fresh scenes, each of which says everything about its scene.

    Scenes are a function of (seed, their group, number); those of training data are drawn from other seeds.

    Attributes:
        num_prompts: of each group.
        seed: of the scenes.
        groups: sorts of scenes, in order.

    Raises:
        UserError: no prompt, or no group.
    """

    num_prompts: int = 100
    seed: int = 0
    groups: Sequence[SceneGroup] = GROUPS

    def __post_init__(self) -> None:
        """See the class."""
        if self.num_prompts < 1 or not self.groups:
            raise UserError(f"num_prompts is {self.num_prompts} of {len(self.groups)} groups; give at least 1 of each")

    def __len__(self) -> int:
        return self.num_prompts * len(self.groups)

    def __iter__(self) -> Iterator[tuple[SceneGroup, ScenePrompt]]:
        for group in self.groups:
            seed = derived_seed(self.seed, f"shapes score/{group}")
            for index in range(self.num_prompts):
                scene = sample_scene(seed, index, num_objects=group.num_objects, combinations=group.combinations)
                yield group, scene.prompts()[0]

    def prompt_set(self) -> PromptSet:
        """Return the texts as `evaluate_text_to_image` and the exports take them."""
        return prompt_set("fresh scenes of shapes", [prompt.text for _, prompt in self])


@dataclass(frozen=True)
class ShapesScore:
    """Shares of pictures in which what was asked for holds.

    Attributes:
        shares: sort of scenes => attribute of `ATTRIBUTES` => share.
    """

    shares: Mapping[SceneGroup, Mapping[str, Share]]

    @classmethod
    def of(cls, groups: Sequence[SceneGroup], verdicts: Sequence[SceneVerdict]) -> ShapesScore:
        """Count the verdicts of pictures, whose sorts are `groups`."""
        held: dict[SceneGroup, list[list[bool]]] = {}
        for group, verdict in zip(groups, verdicts, strict=True):
            held.setdefault(group, []).append(_attributes(verdict))
        return cls(
            {
                group: {
                    name: Share(sum(column), len(rows))
                    for name, column in zip(ATTRIBUTES, zip(*rows, strict=True), strict=True)
                }
                for group, rows in held.items()
            }
        )

    def share(self, attribute: str, num_objects: int, combinations: Combinations = "seen") -> Share:
        """Return one share."""
        return self.shares[SceneGroup(combinations, num_objects)][attribute]

    def metrics(self) -> dict[str, float]:
        """Every share by name, such as `seen, 1 object: kind`."""
        return {
            f"{group}: {name}": share.value for group, shares in self.shares.items() for name, share in shares.items()
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A table: a row for each attribute, a column for each sort of scenes, each share with its interval."""
        rows = [tuple(str(shares[name]) for shares in self.shares.values()) for name in ATTRIBUTES]
        return [("", *map(str, self.shares)), *((name, *row) for name, row in zip(ATTRIBUTES, rows, strict=True))]


def _attributes(verdict: SceneVerdict) -> list[bool]:
    parts = {name: getattr(verdict, name) for name in ATTRIBUTES if name != "all four"}
    return [{**parts, "all four": verdict.kind and verdict.position}[name] for name in ATTRIBUTES]


def score_shapes(
    draw: ImageProvider,
    num_prompts: int = 100,
    seed: int = 0,
    *,
    groups: Sequence[SceneGroup] = GROUPS,
    batch_size: int = 32,
) -> ShapesScore:
    """Ask for pictures of fresh scenes, and read them.

    Args:
        draw: called as (texts, numbers of the pictures); returns uint8 (3, H, W) each. All randomness it needs follows
            from the numbers, which begin at 0 with the first group.
        num_prompts: of each group.
        seed: of the scenes.
        groups: sorts of scenes.
        batch_size: pictures asked for at once.

    Raises:
        UserError: no prompt, another number of pictures than asked for, or what is no picture.
    """
    asked = list(ShapesPrompts(num_prompts, seed, groups))
    verdicts: list[SceneVerdict] = []
    for start in range(0, len(asked), batch_size):
        prompts = [prompt for _, prompt in asked[start : start + batch_size]]
        images = draw([prompt.text for prompt in prompts], range(start, start + len(prompts)))
        if len(images) != len(prompts):
            raise UserError(f"{len(prompts)} prompts gave {len(images)} images; an image provider gives one for each")
        verdicts += _verdicts(images, prompts)
    return ShapesScore.of([group for group, _ in asked], verdicts)


def _verdicts(images: Sequence[torch.Tensor], prompts: Sequence[ScenePrompt]) -> list[SceneVerdict]:
    require_uint8_rgb(images)
    return [
        check_picture(image.permute(1, 2, 0).cpu().numpy(), prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]


@dataclass(frozen=True)
class ShapesResult:
    """A score and all that it depends on.

    Attributes:
        score: the shares.
        prompts: number of prompts of each sort, and their seed.
        samples: protocol and pixel hash of the pictures.
        training: what the pipeline says about its training.
        versions: of the packages involved, and the device.
        wall_time_s: seconds, the model not loaded within.
        per_prompt: sort, text, and which attributes hold.
    """

    score: ShapesScore
    prompts: dict[str, Any]
    samples: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    wall_time_s: float
    per_prompt: list[dict[str, Any]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "score"}
        intervals = {
            f"{group}: {name}": list(share.interval)
            for group, shares in self.score.shares.items()
            for name, share in shares.items()
        }
        metrics = {"metrics": self.score.metrics(), "confidence_95": intervals}
        return {"schema": 1, "kind": "shapes", "num_samples": len(self.per_prompt), **metrics, **shown}

    def table(self) -> str:
        """The shares, and below them all that they depend on."""
        facts = [
            ("N", f"{len(self.per_prompt)} pictures, one of each prompt"),
            ("prompts", described(self.prompts)),
            ("samples", described(self.samples)),
            ("versions", described(self.versions)),
            ("wall time", f"{self.wall_time_s:.1f} s"),
        ]
        return f"{aligned(self.score.rows())}\n\n{aligned(facts)}"


def evaluate_shapes(
    pipeline: Any,
    prompts: ShapesPrompts,
    *,
    folder: Path | None = None,
    batch_size: int = 50,
    sink: ImageSink | None = None,
    **options: Any,
) -> ShapesResult:
    """Let a pipeline draw fresh scenes, and read its pictures.

    Args:
        pipeline: a `TextToImagePipeline`.
        prompts: what it is asked for.
        folder, batch_size, sink: as of `judge_images`; with a folder an interrupted call continues.
        options: of `PipelinePromptImages`: seed of the noise, sampling options.

    Raises:
        UserError: an option that does not fit the pipeline.
    """
    start = time.perf_counter()
    asked = list(prompts)
    drawn = PipelinePromptImages(pipeline, prompts.prompt_set(), **options)

    def judge(images: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        found = _verdicts(images, [asked[index][1] for index in indices])
        return torch.tensor([[getattr(verdict, name) for name in _PARTS] for verdict in found]).float()

    said, digests = judge_images(
        drawn, {"shapes": judge}, {"shapes": list(_PARTS)}, folder=folder, batch_size=batch_size, sink=sink
    )
    verdicts = [SceneVerdict(*map(bool, row.tolist())) for row in said["shapes"]]
    groups = [group for group, _ in asked]
    return ShapesResult(
        score=ShapesScore.of(groups, verdicts),
        prompts={"of_each": prompts.num_prompts, "seed": prompts.seed, "sha256": drawn.prompts.sha256},
        samples={**drawn.protocol, "pixels_sha256": pixels_sha256(digests)},
        training=drawn.training,
        versions=software_versions(),
        wall_time_s=time.perf_counter() - start,
        per_prompt=[
            {"of": str(group), "prompt": prompt.text, **dict(zip(ATTRIBUTES, _attributes(verdict), strict=True))}
            for (group, prompt), verdict in zip(asked, verdicts, strict=True)
        ],
    )


_PARTS = tuple(SceneVerdict.__dataclass_fields__)
