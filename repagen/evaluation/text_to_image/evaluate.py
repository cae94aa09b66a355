"""How well generated images fit their prompts: the figures, and beside them everything they depend on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from repagen.errors import UserError
from repagen.evaluation.extraction import ImageSink, pixels_sha256
from repagen.evaluation.extractor import ExtractorIdentity
from repagen.evaluation.pipeline_images import DrawnImages
from repagen.evaluation.reporting import aligned, described, software_versions
from repagen.evaluation.samples import ImageSource
from repagen.evaluation.text_to_image.prompted import PromptedImages
from repagen.evaluation.text_to_image.scores import (
    CLIP_CONVENTIONS,
    ScoringModel,
    clip_score,
    pick_preferences,
    pick_score,
    text_limit,
    truncated_prompts,
)
from repagen.evaluation.text_to_image.scoring import Judge, judge_images

ScoreName = Literal["clip_score", "pick_score"]

_SCORES = {"clip_score": clip_score, "pick_score": pick_score}


@dataclass(frozen=True)
class TextToImageResult:
    """Figures and protocol of one evaluation.

    Attributes:
        metrics: `clip_score` (mean cosine), `clip_score 100*max(cos,0)`, `clip_score 2.5*max(cos,0)`, `pick_score`
            (mean); see `CLIP_CONVENTIONS`.
        num_samples: number of images.
        spaces: score => the model that gave it.
        samples: protocol and pixel hash of the images.
        reference: the prompts, and how many of them each model saw cut off.
        training: what the pipeline that drew the images says about its training; empty where that is not known.
        remarks: what to know before the figures stand beside others.
        versions: of the packages involved, and the device.
        wall_time_s: seconds, models not loaded within.
        per_prompt: id and scores of each prompt's images; with several images a prompt, PickScore's preferences.
    """

    metrics: dict[str, float]
    num_samples: int
    spaces: dict[str, ExtractorIdentity]
    samples: dict[str, Any]
    reference: dict[str, Any]
    training: dict[str, Any]
    remarks: tuple[str, ...]
    versions: dict[str, str]
    wall_time_s: float
    per_prompt: list[dict[str, Any]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__}
        spaces = {name: identity.as_dict() for name, identity in self.spaces.items()}
        return {"schema": 1, "kind": "text_to_image", **shown, "spaces": spaces}

    def table(self) -> str:
        """The result as aligned lines of text."""
        reference = dict(self.reference)
        truncated = reference.pop("truncated_prompts")
        return aligned(
            [
                *((_title(name), f"{value:.6g}") for name, value in self.metrics.items()),
                ("N", f"{self.num_samples} images of {reference['count']} prompts"),
                *((f"model of {name}", str(identity)) for name, identity in self.spaces.items()),
                ("truncated prompts", described(truncated)),
                ("samples", described(self.samples)),
                ("prompts", described(reference)),
                ("versions", described(self.versions)),
                ("wall time", f"{self.wall_time_s:.1f} s"),
                *(("note", remark) for remark in self.remarks),
            ]
        )


def _title(name: str) -> str:
    score, _, convention = name.partition(" ")
    return "PickScore" if score == "pick_score" else f"CLIPScore ({convention or 'cosine'})"


def evaluate_text_to_image(
    samples: PromptedImages,
    models: Mapping[ScoreName, ScoringModel],
    *,
    folder: Path | None = None,
    batch_size: int = 50,
    sink: ImageSink | None = None,
) -> TextToImageResult:
    """Score images against their prompts.

    Under `accelerate launch` every process takes a share of the images, and all return the same result.

    Args:
        samples: images and their prompts; the images may differ in size.
        models: `clip_score` and `pick_score`, or one of them => its model.
        folder, batch_size, sink: as of `judge_images`.

    Raises:
        UserError: on images that cannot be read, all of which are listed, and on scores that are not finite.
    """
    start = time.perf_counter()
    judged, digests = judge_images(
        samples,
        {name: _clip_judge(name, model, samples) for name, model in models.items()},
        {name: model.identity.as_dict() for name, model in models.items()},
        folder=folder, batch_size=batch_size, sink=sink,
    )  # fmt: skip
    scores = {name: judged[name][:, 0].double() for name in models}
    _require_finite(scores, samples)
    texts = [prompt.text for prompt in samples.prompts.prompts]
    truncated = {name: len(truncated_prompts(one.model, one.processor, texts)) for name, one in models.items()}
    return TextToImageResult(
        metrics=_figures(scores),
        num_samples=len(samples),
        spaces={name: one.identity for name, one in models.items()},
        samples={**samples.protocol, "pixels_sha256": pixels_sha256(digests)},
        reference={**samples.prompts.protocol, "truncated_prompts": truncated},
        training=samples.training if isinstance(samples, DrawnImages) else {},
        remarks=tuple(
            f"{truncated[name]} of {len(texts)} prompts are longer than the {text_limit(one.model, one.processor)} "
            f"tokens that the model of {name} reads; their ends are not scored"
            for name, one in models.items()
            if truncated[name]
        ),
        versions=software_versions(),
        wall_time_s=time.perf_counter() - start,
        per_prompt=_per_prompt(samples, scores),
    )


def _clip_judge(name: ScoreName, model: ScoringModel, samples: PromptedImages) -> Judge:
    def judge(images: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        prompts = [samples.prompt_of(index).text for index in indices]
        return _SCORES[name](model.model, model.processor, images, prompts)[:, None]

    return judge


def _require_finite(scores: Mapping[ScoreName, torch.Tensor], samples: ImageSource) -> None:
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            first = int((~torch.isfinite(values)).nonzero()[0])
            raise UserError(f"{name} of {samples.describe(first)} is not finite; look at that image and the model")


def _figures(scores: Mapping[ScoreName, torch.Tensor]) -> dict[str, float]:
    figures: dict[str, float] = {}
    if "clip_score" in scores:
        for convention, reduce in CLIP_CONVENTIONS.items():
            name = "clip_score" if convention == "cosine" else f"clip_score {convention}"
            figures[name] = float(reduce(scores["clip_score"]))
    if "pick_score" in scores:
        figures["pick_score"] = float(scores["pick_score"].mean())
    return figures


def _per_prompt(samples: PromptedImages, scores: Mapping[ScoreName, torch.Tensor]) -> list[dict[str, Any]]:
    shaped: dict[str, torch.Tensor] = {
        name: values.reshape(len(samples.prompts), -1) for name, values in scores.items()
    }
    if "pick_score" in shaped and samples.images_per_prompt > 1:
        shaped["pick_preferences"] = pick_preferences(shaped["pick_score"])
    return [
        {"id": prompt.id, **{name: values[number].tolist() for name, values in shaped.items()}}
        for number, prompt in enumerate(samples.prompts.prompts)
    ]
