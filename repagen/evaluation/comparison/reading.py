"""Results from where they lie: JSON files of `repagen evaluate`, and the folders of training runs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from repagen.config import flatten
from repagen.errors import UserError, refusing
from repagen.evaluation.comparison.likeness import ComparedResult, protocol_facts
from repagen.evaluation.result import SCHEMA

KINDS = ("generation", "reconstruction", "text_to_image", "representation")
LOG_PREFIX = "evaluation/"
RUN_RESULTS = "evaluation/step-{:08d}.json"

_FIXED_OF_SAMPLES = ("label_mode", "rounding", "dtype", "size")
_TRAINING = ("images", "step", "dataset_images")


def read_results(words: Sequence[str], dataset_images: int | None = None) -> list[ComparedResult]:
    """Read the results that a command line names.

    Args:
        words: `FILE.json`, a run's folder, or `NAME=` before either; results of one name are one model's. Without a
            name, the folder's counts.
        dataset_images: images in the training data, for results that do not say it.

    Raises:
        UserError: on a file that is missing, damaged, or not a result.
    """
    results = [one for word in words for one in _read(word)]
    if dataset_images is not None:
        known = {"dataset_images": dataset_images}
        results = [replace(one, training={**known, **one.training}) for one in results]
    repeated = Counter(one.label for one in results)
    return [
        replace(one, label=f"{one.label} ({Path(one.origin).stem})") if repeated[one.label] > 1 else one
        for one in results
    ]


def _read(word: str) -> list[ComparedResult]:
    name, equals, rest = word.partition("=")
    named = bool(equals) and not Path(word).exists()
    if named and not (name and rest):
        raise UserError(f"{word!r}: give NAME=FILE, or a file or folder alone")
    path = Path(rest if named else word)
    if path.is_dir():
        return _read_run(path, name if named else path.resolve().name)
    if not path.is_file():
        raise UserError(f"no such result: {path}; give a JSON of `repagen evaluate ... --output`, or a run's folder")
    return [_read_result(path, name if named else None)]


def _read_result(path: Path, name: str | None) -> ComparedResult:
    with refusing(f"{path}: cannot be read as the JSON of a result"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "schema" not in content or content.get("kind") not in KINDS:
        raise UserError(
            f"{path}: not a result of `repagen evaluate` (kind {', '.join(KINDS)}); give what its --output wrote"
        )
    if content["schema"] != SCHEMA:
        raise UserError(
            f"{path}: schema {content['schema']}, and this version of repagen reads schema {SCHEMA}; evaluate again, "
            "or use the version that wrote it"
        )
    samples = _section(path, content, "samples")
    return ComparedResult(
        label=name or str(path.with_suffix("")),
        group=name or path.resolve().parent.name,
        origin=str(path),
        kind=content["kind"],
        metrics=_metrics(path, content),
        fixed=_fixed_facts(path, content, samples),
        shown=_shown_facts(path, content, samples),
        training=_training(path, _section(path, content, "training")),
        remarks=_texts(path, content, "deviations") + _texts(path, content, "remarks"),
    )


def _section(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{path}:{key}: damaged, expected an object, got {value!r:.60}; evaluate again")
    return value


def _leaves(section: Mapping[str, Any]) -> dict[str, Any]:
    return flatten(section) if section else {}  # an empty tree is a value to `flatten`


def _texts(path: Path, content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{path}:{key}: damaged, expected a list of texts, got {value!r:.60}; evaluate again")
    return tuple(value)


def _metrics(path: Path, content: Mapping[str, Any]) -> dict[str, float]:
    metrics = _leaves(_section(path, content, "metrics"))
    for name, value in metrics.items():
        if not _is_number(value):
            raise UserError(
                f"{path}:metrics.{name}: damaged, expected a finite number, got {value!r:.60}; evaluate again"
            )
    if not metrics:
        raise UserError(f"{path}: holds no metrics; evaluate again")
    return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fixed_facts(path: Path, content: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal, the most telling first."""
    facts: dict[str, Any] = {"kind": content["kind"], "protocol": content.get("protocol")}
    facts |= {f"settings.{key}": value for key, value in protocol_facts(_settings(path, content)).items()}
    for section in ("definitions", "normalisers"):
        facts |= {f"{section}.{key}": value for key, value in _leaves(_section(path, content, section)).items()}
    facts["deviations"] = sorted(_texts(path, content, "deviations"))
    for space, identity in _section(path, content, "spaces").items():
        if not isinstance(identity, dict) or not {"weights_sha256", "settings"} <= identity.keys():
            raise UserError(f"{path}:spaces.{space}: damaged, it needs weights_sha256 and settings; evaluate again")
        facts |= {f"space {space}.{key}": identity[key] for key in ("weights_sha256", "settings")}
    reference = _section(path, content, "reference")
    facts["reference"] = reference.get("sha256") or reference.get("pixels_sha256") or str(reference)
    facts["num_samples"] = _num_samples(path, content)
    # Prompts come with images of any size, and the size of reconstructions is that of their originals.
    return facts | {f"samples.{key}": samples.get(key) for key in _FIXED_OF_SAMPLES}


def _settings(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    settings = _section(path, content, "settings")
    spaces = settings.get("spaces", [])
    named = isinstance(spaces, list) and all(isinstance(_name(space), str) for space in spaces)
    if not named:
        raise UserError(
            f"{path}:settings.spaces: damaged, expected a list of objects with a text as name, got {spaces!r:.60}; "
            "evaluate again"
        )
    return settings


def _name(space: Any) -> Any:
    return space.get("name") if isinstance(space, dict) else None


def _num_samples(path: Path, content: Mapping[str, Any]) -> int | None:
    count = content.get("num_samples")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise UserError(f"{path}:num_samples: damaged, expected a whole number, got {count!r:.60}; evaluate again")
    return count


def _shown_facts(path: Path, content: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("kind", "pixels_sha256", *_FIXED_OF_SAMPLES)
    told = {key: value for key, value in samples.items() if key not in left_out}
    sampler = told.pop("scheduler_config", None)  # each of its settings may differ for itself
    settings = {f"scheduler {key}": value for key, value in (sampler if isinstance(sampler, dict) else {}).items()}
    return {**told, **settings, **_section(path, content, "versions")}


def _training(path: Path, facts: Mapping[str, Any]) -> dict[str, int]:
    known = {key: facts[key] for key in _TRAINING if facts.get(key) is not None}
    for key, value in known.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{path}:training.{key}: expected a whole number of at least 0, got {value!r:.60}")
    return known


# --- runs ------------------------------------------------------------------------------------------------------------


def _read_run(folder: Path, name: str) -> list[ComparedResult]:
    """The results of a training run that its log holds to.

    The log has the figures, the result beside it what they depend on. Results of steps that the log does not have are
    left over from before the run went back to a checkpoint.
    """
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise UserError(f"{folder}: not the folder of a training run, which holds metrics.jsonl; name a result's JSON")
    moments = []
    for row in _rows(log):
        figures = {key.removeprefix(LOG_PREFIX): value for key, value in row.items() if key.startswith(LOG_PREFIX)}
        if figures:
            path = folder / RUN_RESULTS.format(row["step"])
            if not path.is_file():
                raise UserError(f"{path}: is missing, and {log} has figures of that step; evaluate its weights again")
            moment = replace(_read_result(path, name), label=f"{name}@{row['step']}")
            if any(moment.metrics.get(key) != value for key, value in figures.items()):
                raise UserError(f"{path}: is not of this run, {log} has other figures of that step; remove the file")
            moments.append(moment)
    if not moments:
        raise UserError(f"{folder}: no row of metrics.jsonl has a column {LOG_PREFIX}...; the run never evaluated")
    return moments


def _rows(path: Path) -> list[dict[str, Any]]:
    """The log's rows; a torn last one, which a run leaves that is at work or was killed, does not count."""
    rows = []
    with refusing(f"{path}: cannot be read"):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        with refusing(f"{path}: line {number} is damaged"):
            row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}: line {number} is damaged, a row holds a step; it is not the log of a run")
        rows.append(row)
    return rows
