"""The configuration of evaluation during a generator's training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from repagen.config import require
from repagen.errors import UserError
from repagen.evaluation.measures import require_enough_samples
from repagen.evaluation.protocol import (
    EvaluationProtocol,
    MetricName,
    encoder_protocol,
    load_protocol,
    protocol_name,
)

_NOT_OF_ENCODERS: tuple[MetricName, ...] = ("sfid", "inception_score")


@dataclass
class EvaluationConfig:
    """Figures of the EMA weights during training; training is not touched by them.

    Attributes:
        every_images: evaluate whenever so many further training images are seen, after the step that reaches them, and
            at the end; 0: never.
        num_samples: images to draw each time.
        metrics: of the protocol, or in the extractor's space; None: all of the protocol, or `fd` and
            `precision_recall` of the extractor.
        protocol: name or YAML file; None: that of the extractor, or `torch-fidelity`.
        extractor: an encoder's id or folder, or `digits` (bundled): measure in its space, without a protocol.
        extractor_weights: file with Inception's weights, where not in torch's cache.
        reference: path or `data.KEY=VALUE` words, as of `repagen evaluate generation`; None: the training images.
        seed: of the noise, the same at each evaluation, and of random labels.
        guidance_scale: 1 is unguided; above it the sampler's guidance acts with this scale.
        num_inference_steps: None: the sampler's.
        forward_batch_size: images in one pass of the pipeline; another number changes last bits.
    """

    every_images: int = 0
    num_samples: int = 10_000
    metrics: list[MetricName] | None = None
    protocol: str | None = None
    extractor: str | None = None
    extractor_weights: str | None = None
    reference: str | list[str] | None = None
    seed: int = 0
    guidance_scale: float = 1.0
    num_inference_steps: int | None = None
    forward_batch_size: int = 32

    def validate(self) -> None:
        """Check the ranges, and that the samples suffice for the metrics."""
        for key, least in {"every_images": 0, "num_samples": 2, "guidance_scale": 1, "forward_batch_size": 1}.items():
            require(getattr(self, key) >= least, key, getattr(self, key), f"at least {least}")
        steps = self.num_inference_steps
        require(steps is None or steps >= 2, "num_inference_steps", steps, "at least 2")
        require(bool(self.reference_words) or self.reference is None, "reference", self.reference, "a path or words")
        require(self.metrics is None or bool(self.metrics), "metrics", self.metrics, "at least one metric")
        if self.extractor is not None:
            require(self.protocol is None, "protocol", self.protocol, "left out beside evaluation.extractor")
            weights = self.extractor_weights
            require(weights is None, "extractor_weights", weights, "left out: they are Inception's")
        if self.every_images:
            try:
                require_enough_samples(self.named_protocol()[1], self.num_samples)
            except UserError as error:
                key = "" if str(error).startswith(("metrics:", "protocol:")) else "num_samples: "
                raise UserError(f"{key}{error}") from None

    @property
    def reference_words(self) -> list[str]:
        """The reference as on a command line; empty for the training images."""
        words = [self.reference] if isinstance(self.reference, str) else self.reference or []
        return [word for word in words if word.strip()]

    @property
    def options(self) -> dict[str, Any]:
        """Sampling options of the pipeline's call."""
        steps = {} if self.num_inference_steps is None else {"num_inference_steps": self.num_inference_steps}
        return {"guidance_scale": self.guidance_scale, **steps}

    def due(self, step: int, global_batch_size: int, max_steps: int) -> bool:
        """Whether `step` optimiser steps are the first to reach a multiple of `every_images`, or the last."""
        if self.every_images == 0:
            return False
        reached, before = (count * global_batch_size // self.every_images for count in (step, step - 1))
        return reached > before or step == max_steps

    def named_protocol(self) -> tuple[str, EvaluationProtocol]:
        """The protocol and its name, with the metrics asked for alone.

        Raises:
            UserError: that starts with the key, for an unknown protocol, or a metric that it has not.
        """
        if self.extractor is not None:
            metrics: list[MetricName] = self.metrics or ["fd", "precision_recall"]
            wrong = [name for name in metrics if name in _NOT_OF_ENCODERS]
            require(not wrong, "metrics", wrong, f"without {', '.join(_NOT_OF_ENCODERS)}, which are Inception's")
            name, protocol = "custom", encoder_protocol(self.extractor, metrics=metrics)
        else:
            given = self.protocol or "torch-fidelity"
            try:
                name, protocol = protocol_name(given), self._chosen(load_protocol(given))
            except UserError as error:
                key = "" if str(error).startswith("metrics:") else "protocol: "
                raise UserError(f"{key}{error}") from None
        if any("fdr" in space.metrics for space in protocol.spaces):
            raise UserError(
                "metrics: fdr needs a table of normalisers, as `repagen evaluate generation` takes it; list metrics "
                "without it"
            )
        return name, protocol

    def _chosen(self, protocol: EvaluationProtocol) -> EvaluationProtocol:
        if self.metrics is None:
            return protocol
        known = {metric for space in protocol.spaces for metric in space.metrics}
        wrong = [metric for metric in self.metrics if metric not in known]
        require(not wrong, "metrics", wrong, f"among those of the protocol, {', '.join(sorted(known))}")
        chosen = [
            replace(space, metrics=[metric for metric in space.metrics if metric in self.metrics])
            for space in protocol.spaces
        ]
        return replace(protocol, spaces=[space for space in chosen if space.metrics])
