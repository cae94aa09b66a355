"""What samples are compared with: images, or a file of statistics with the extractors that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repagen.errors import UserError
from repagen.evaluation.extractor import ExtractorIdentity
from repagen.evaluation.inception import INCEPTION
from repagen.evaluation.moments import Statistics
from repagen.evaluation.samples import ImageSource, NpzImages, npz_keys, open_images
from repagen.files import file_digest, replace_file

_METADATA_KEY = "repagen"
# Feature => suffix of its arrays in the layout of the ADM suite; other features are called by their names.
_ADM_SUFFIXES = {"inception.pool": "", "inception.spatial": "_s"}


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics read from a file.

    Attributes:
        statistics: feature, as `inception.pool`, => mean and covariance.
        path: the file.
        sha256: of the file.
        extractors: space => what made them; empty in files of other tools, which do not say it.
        protocol: of the images they were made from, as far as the file says it.
        images: images the file carries for precision and recall (ADM: 10,000), not those behind the statistics.
    """

    statistics: dict[str, Statistics]
    path: Path
    sha256: str
    extractors: dict[str, ExtractorIdentity]
    protocol: dict[str, Any]
    images: NpzImages | None

    def require_extractor(self, space: str, identity: ExtractorIdentity) -> None:
        """Refuse to be compared with the features of another extractor.

        Raises:
            UserError: when the file was made with another extractor, or does not say with which, unless it is
                Inception's, whose statistics other tools write without saying it.
        """
        made_with = self.extractors.get(space)
        if made_with is None:
            if identity.name != INCEPTION:
                raise UserError(
                    f"{self.path}: does not say which extractor made it, so it is taken for Inception's and cannot "
                    f"serve {identity.name}; make a reference for it with `repagen reference make`"
                )
        elif not made_with.matches(identity):
            raise UserError(
                f"{self.path}: made with {made_with}, but the extractor is {identity}; use the same extractor, or "
                "make a reference for this one with `repagen reference make`"
            )


def save_statistics(
    path: str | Path,
    statistics: Mapping[str, Statistics],
    extractors: Mapping[str, ExtractorIdentity],
    protocol: Mapping[str, Any],
) -> None:
    """Write statistics as an npz in the layout of the ADM suite, and who made them from what.

    Inception's are `mu`, `sigma` (pool) and `mu_s`, `sigma_s` (spatial), so that other tools read them; those of other
    features are `mu_FEATURE`, `sigma_FEATURE`. The file appears whole or not at all.

    Args:
        path: of the file.
        statistics: feature => mean and covariance.
        extractors: space => what made its features.
        protocol: of the images.
    """
    metadata = {
        "extractors": {space: identity.as_dict() for space, identity in extractors.items()},
        "counts": {feature: one.count for feature, one in statistics.items()},
        "protocol": dict(protocol),
    }
    arrays = {_METADATA_KEY: np.array(json.dumps(metadata, sort_keys=True))}
    for feature, one in statistics.items():
        suffix = _suffix(feature)
        arrays |= {f"mu{suffix}": one.mean.numpy(), f"sigma{suffix}": one.covariance.numpy()}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(path), write)


def _suffix(feature: str) -> str:
    return _ADM_SUFFIXES.get(feature, f"_{feature}")


def load_statistics(path: str | Path) -> ReferenceStatistics:
    """Read statistics that this library wrote, or a file of another tool with `mu` and `sigma`.

    ADM's files may hold `mu_s`, `sigma_s` and images beside them (`arr_0`).

    Raises:
        UserError: when the file is missing or damaged, or holds something else. Pickled content is refused.
    """
    path = Path(path)
    keys = npz_keys(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file[_METADATA_KEY])) if _METADATA_KEY in keys else None
            features = metadata["counts"] if metadata else dict.fromkeys(_ADM_SUFFIXES)
            statistics = {
                feature: _read(file, path, _suffix(feature), count)
                for feature, count in features.items()
                if metadata or {f"mu{_suffix(feature)}", f"sigma{_suffix(feature)}"} <= keys
            }
            extractors = metadata["extractors"] if metadata else {}
            identities = {space: ExtractorIdentity(**identity) for space, identity in extractors.items()}
    except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({error}); write it again") from error
    if not statistics:
        raise UserError(f"{path}: statistics need the arrays mu and sigma, found {', '.join(sorted(keys)) or 'none'}")
    return ReferenceStatistics(
        statistics=statistics,
        path=path,
        sha256=file_digest(path)["sha256"],
        extractors=identities,
        protocol=metadata["protocol"] if metadata else {},
        images=NpzImages(path) if "arr_0" in keys else None,
    )


def _read(file: Mapping[str, np.ndarray], path: Path, suffix: str, count: int | None) -> Statistics:
    mean, covariance = (torch.from_numpy(file[key + suffix].astype(np.float64)) for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: mu{suffix} {tuple(mean.shape)} and sigma{suffix} {tuple(covariance.shape)} must be (D,), (D, D)"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{path}: mu{suffix} or sigma{suffix} is not finite; write it again")
    return Statistics(mean, covariance, count)


def open_reference(words: Sequence[str]) -> ImageSource | ReferenceStatistics:
    """Open a reference named on a command line.

    Args:
        words: a path of a folder, an npz of images or an npz of statistics; or the settings of a dataset,
            `data.kind=digits data.subset=train`.

    Raises:
        UserError: when there is nothing there, or a setting is unknown.
    """
    path = Path(words[0])
    if len(words) == 1 and path.suffix == ".npz" and any(key.startswith(("mu", "sigma")) for key in npz_keys(path)):
        return load_statistics(path)
    return open_images(words)
