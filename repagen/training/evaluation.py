"""Evaluation during a generator's training: figures of its EMA weights, which leave the training as it was."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from repagen.data import SampleDataset
from repagen.errors import UserError
from repagen.evaluation.extractor import FeatureExtractor
from repagen.evaluation.generation import KnownReference, evaluate_generation, look_at_reference, open_extractors
from repagen.evaluation.measures import require_enough_reference
from repagen.evaluation.pipeline_images import PipelineImages
from repagen.evaluation.protocol import EvaluationProtocol
from repagen.evaluation.reference import ReferenceStatistics, open_reference
from repagen.evaluation.samples import ImageSource, captions_of, dataset_images
from repagen.files import replace_file
from repagen.models.latents import decoded_size
from repagen.models.modes import in_eval_mode
from repagen.training.evaluation_config import EvaluationConfig
from repagen.training.frozen import BUNDLED_ENCODERS, encoder_source
from repagen.training.generator_config import GeneratorRunConfig
from repagen.training.release import training_facts
from repagen.training.run import Run

# Options that messages speak of => the keys that do the same here.
KEYS = {
    "--extractor-weights": "evaluation.extractor_weights",
    "--extractor": "evaluation.extractor",
    "--reference": "evaluation.reference",
    "--max-bad": "data.max_bad_images",
}


def open_evaluation(
    config: GeneratorRunConfig, run: Run, pipeline: Any, dataset: SampleDataset, latent_shape: Sequence[int]
) -> TrainingEvaluation | None:
    """Get everything ready that evaluations need; None where the configuration asks for none.

    The reference is looked at here, once; what is found is kept in the run's folder.

    Args:
        config: says what to measure and when.
        run: in whose folder results are kept.
        pipeline: samples from the model that is trained.
        dataset: of the training.
        latent_shape: (C, h, w).

    Raises:
        UserError: that names the key, where an evaluation would fail.
    """
    if config.evaluation.every_images == 0:
        return None
    with _undisturbed(pipeline, run.device):
        name, protocol = config.evaluation.named_protocol()
        extractors = _open_extractors(config.evaluation, protocol)
        folder = run.folder / "evaluation"
        with _naming("evaluation.reference"):
            reference = look_at_reference(
                _open_reference(config), protocol, extractors, folder / "reference",
                name=name, max_bad_images=_bad_images(config), progress_bar=config.progress_bar, keep=True,
            )  # fmt: skip
            run.on_main(lambda: _remove(folder.glob("reference/*.partial")))  # of references that were given before
            require_enough_reference(protocol, reference.side)
            _require_size(reference, decoded_size(pipeline.vae, latent_shape))
    return TrainingEvaluation(config.evaluation, run, pipeline, dataset, (name, protocol), extractors, reference)


class TrainingEvaluation:
    """Evaluates the weights that a pipeline holds; made by `open_evaluation`.

    Args:
        config: says when, and how to sample.
        run: in whose folder results are kept.
        pipeline: around the model that is trained.
        dataset: of the training.
        protocol: its name, and what to measure.
        extractors: by space.
        reference: what to compare with.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        run: Run,
        pipeline: Any,
        dataset: SampleDataset,
        protocol: tuple[str, EvaluationProtocol],
        extractors: Mapping[str, FeatureExtractor],
        reference: KnownReference,
    ) -> None:
        self._config = config
        self._run = run
        self._pipeline = pipeline
        self._dataset = dataset
        self._name, self._protocol = protocol
        self._extractors = extractors
        self._reference = reference
        self.folder = run.folder / "evaluation"
        self.samples = PipelineImages(
            pipeline,
            config.num_samples,
            seed=config.seed,
            label_mode=self._protocol.label_mode or "balanced",
            rounding=self._protocol.rounding,
            prompts=captions_of(dataset, config.num_samples, config.seed) if pipeline.transformer.takes_text else (),
            forward_batch_size=config.forward_batch_size,
            **config.options,
        )

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` optimiser steps."""
        return self._config.due(step, self._run.plan.global_size, self._run.config.max_steps)

    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate the weights as they stand, on all processes, and write `evaluation/step-XXXXXXXX.json`.

        Features of an evaluation that was killed are used again, and a result that exists is not made again, where
        they are of these weights and settings.

        Args:
            step: optimiser steps done.

        Returns:
            `evaluation/METRIC` => value, on every process.

        Raises:
            UserError: naming the step.
        """
        path = self.folder / f"step-{step:08d}.json"
        with self._run.aside(), _undisturbed(self._pipeline, self._run.device):
            key = self._run.on_main(self._key)
            partial = self.folder / f"{key[:16]}.partial"
            record = self._run.on_main(lambda: self._kept(path, key, partial))
            if record is None:
                record = made = self._evaluate(step, key, partial)
                self._run.on_main(lambda: _write(path, made, partial))
        figures = ", ".join(f"{name}={value:.6g}" for name, value in record["metrics"].items())
        images = record["training"]["images"]
        self._run.notice(
            "evaluation after %d steps (%d images): %s, N=%d", step, images, figures, record["num_samples"]
        )
        for name, reason in record["left_out"].items():
            self._run.notice("evaluation after %d steps: %s left out: %s", step, name, reason)
        return {f"evaluation/{name}": value for name, value in record["metrics"].items()}

    def _key(self) -> str:
        """A hash of weights and settings: what the figures are a function of."""
        given, images = self._reference.given, self._reference.images
        key = {
            "samples": [self.samples.protocol, len(self.samples), self.samples.origin()],
            "protocol": [self._name, dataclasses.asdict(self._protocol)],
            "extractors": {space: extractor.identity.as_dict() for space, extractor in self._extractors.items()},
            "reference": [
                given.sha256 if isinstance(given, ReferenceStatistics) else None,
                images.pixels_sha256 if images else None,
            ],
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def _kept(self, path: Path, key: str, partial: Path) -> dict[str, Any] | None:
        """The result of this key, where it exists; features of other evaluations, which were killed, are removed."""
        record: dict[str, Any] = {}
        if path.is_file():
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                self._run.notice("%s: damaged, evaluated again", path)
        kept = record if record.get("training", {}).get("evaluation_sha256") == key else None
        _remove(path for path in self.folder.glob("*.partial") if path != partial or kept is not None)
        return kept

    def _evaluate(self, step: int, key: str, partial: Path) -> dict[str, Any]:
        with _naming(f"evaluation: after {step} steps"):
            result = evaluate_generation(
                self.samples,
                self._reference,
                self._protocol,
                self._extractors,
                name=self._name,
                batch_size=self._config.forward_batch_size,
                folder=partial,
                progress_bar=self._run.config.progress_bar,
            )
        facts = {**training_facts(self._run, step, self._dataset), "evaluation_sha256": key}
        return dataclasses.replace(result, training=facts).as_dict()


def _write(path: Path, record: Mapping[str, Any], partial: Path) -> None:
    text = json.dumps(record, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    _remove([partial])


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _open_extractors(config: EvaluationConfig, protocol: EvaluationProtocol) -> dict[str, FeatureExtractor]:
    kinds = {space.extractor.kind for space in protocol.spaces}
    key = "extractor" if config.extractor else "extractor_weights" if kinds == {"inception"} else "protocol"
    if config.extractor in BUNDLED_ENCODERS:
        [space] = protocol.spaces
        rule = dataclasses.replace(space.extractor, model=encoder_source(config.extractor))
        protocol = dataclasses.replace(protocol, spaces=[dataclasses.replace(space, extractor=rule)])
    with _naming(f"evaluation.{key}"):
        return open_extractors(protocol, config.extractor_weights)


def _open_reference(config: GeneratorRunConfig) -> ImageSource | ReferenceStatistics:
    words = config.evaluation.reference_words
    return open_reference(words) if words else dataset_images(config.data)


def _bad_images(config: GeneratorRunConfig) -> int:
    """How many images of the reference may be unreadable: of the training images as many as in training."""
    return 0 if config.evaluation.reference_words else config.data.max_bad_images


def _require_size(reference: KnownReference, size: tuple[int, int]) -> None:
    if reference.images and reference.images.image_size != size:
        (height, width), (own_height, own_width) = reference.images.image_size, size
        raise UserError(
            f"its images are {width}x{height} px, the generator's {own_width}x{own_height}; give images of that size, "
            f"for example [data.path=FOLDER, data.image_size={own_width}]"
        )


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Name the key in what an evaluation refuses, and keys in place of options of the command line."""
    try:
        yield
    except UserError as error:
        message = str(error).removeprefix("reference: ")  # which the key says
        message = re.sub(r"--[a-z-]+", lambda found: KEYS.get(found[0], found[0]), message)
        raise UserError(f"{place}: {message}") from error


@contextmanager
def _undisturbed(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Evaluate as `repagen evaluate generation` does, in eval mode and float32, and put everything back afterwards.

    Random streams, the scheduler, the modules' modes and the precision of matrix products come out as they went in.
    """
    scheduler, precision = pipeline.scheduler, torch.get_float32_matmul_precision()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), in_eval_mode(pipeline.transformer, pipeline.vae):
        try:
            pipeline.scheduler = copy.deepcopy(scheduler)
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            pipeline.scheduler = scheduler
