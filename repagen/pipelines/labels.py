"""Classes as users name them: ids, names, synonyms, in any nesting."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from repagen.errors import UserError

ClassLabels: TypeAlias = int | str | torch.Tensor | np.ndarray | Sequence[Any]


def resolve_class_labels(
    class_labels: ClassLabels, num_classes: int, id2label: Mapping[str, str] | None = None
) -> list[int]:
    """Return the class ids that `class_labels` stands for, in order.

    Args:
        class_labels: an id in [0, num_classes), a class name, an integer tensor or array, or lists of these.
        num_classes: of the model.
        id2label: id (as a string) => name; commas separate synonyms, as in ImageNet's labels. Case does not matter.

    Raises:
        UserError: an id out of range, an unknown or ambiguous name, or something that is neither.
    """
    ids_of_name = _ids_of_name(id2label or {})
    return [_resolve(label, num_classes, ids_of_name) for label in _flatten(class_labels)]


def classes_named(name: str, id2label: Mapping[str, str] | None) -> list[int]:
    """Return the ids of all classes that bear a name, in full or, where none does, as a synonym; case is ignored."""
    return _ids_of_name(id2label or {}).get(name.strip().lower(), [])


def _flatten(labels: ClassLabels) -> list[int | str]:
    if isinstance(labels, torch.Tensor):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise UserError(f"class_labels is a tensor of {labels.dtype}; give integer class ids")
        return labels.reshape(-1).tolist()
    if isinstance(labels, str):
        return [labels]
    if isinstance(labels, np.ndarray):
        labels = labels.reshape(-1).tolist()
    if isinstance(labels, Sequence):
        return [single for label in labels for single in _flatten(label)]
    try:
        return [operator.index(labels)]  # also numpy's integers
    except TypeError:
        raise UserError(
            f"class_labels has {labels!r} of type {type(labels).__name__}; give class ids, names, or lists of them"
        ) from None


def _ids_of_name(id2label: Mapping[str, str]) -> dict[str, list[int]]:
    """Full labels and their synonyms in lower case, each with its classes; a full label outranks synonyms."""
    full: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for class_id, label in id2label.items():
        full.setdefault(label.strip().lower(), []).append(int(class_id))
        for synonym in label.split(","):
            synonyms.setdefault(synonym.strip().lower(), []).append(int(class_id))
    return {**synonyms, **full}


def _resolve(label: int | str, num_classes: int, ids_of_name: dict[str, list[int]]) -> int:
    if isinstance(label, str):
        label = _id_of(label, ids_of_name)
    if not 0 <= label < num_classes:
        raise UserError(f"class_labels has class {label}; this model's classes are 0 to {num_classes - 1}")
    return label


def _id_of(name: str, ids_of_name: dict[str, list[int]]) -> int:
    if not ids_of_name:
        raise UserError(f"class_labels has the name {name!r}, but this pipeline has no id2label; give class ids")
    ids = ids_of_name.get(name.strip().lower(), [])
    if len(ids) > 1:
        raise UserError(f"class_labels has {name!r}, which names the classes {ids}; give one of these ids")
    if not ids:
        near = difflib.get_close_matches(name.strip().lower(), ids_of_name, n=3) or sorted(ids_of_name)[:3]
        raise UserError(
            f"class_labels has {name!r}, which is no class of this pipeline; near names: {', '.join(near)}"
        )
    return ids[0]
