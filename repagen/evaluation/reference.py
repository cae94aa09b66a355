"""What samples are compared with: images, or a file of statistics with the extractor that made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repagen.errors import UserError
from repagen.evaluation.features import INCEPTION, ExtractorIdentity
from repagen.evaluation.moments import Statistics
from repagen.evaluation.samples import ImageSource, NpzImages, npz_keys, open_images

_METADATA_KEY = "repagen"


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics read from a file.

    Attributes:
        statistics: mean and covariance.
        path: the file.
        sha256: of the file.
        extractor: what made them; None in files of the ADM layout, which do not say it.
        protocol: of the images they were made from, as far as the file says it.
        images: images the file carries for precision and recall (ADM: 10,000), not those behind the statistics.
    """

    statistics: Statistics
    path: Path
    sha256: str
    extractor: ExtractorIdentity | None
    protocol: dict[str, Any]
    images: NpzImages | None

    def require_extractor(self, identity: ExtractorIdentity) -> None:
        """Refuse to be compared with the features of another extractor.

        Raises:
            UserError: when the file was made with another extractor, or does not say with which, unless it has the
                ADM layout, which is Inception's, and the extractor is Inception too.
        """
        if self.extractor is None:
            if identity.name != INCEPTION:
                raise UserError(
                    f"{self.path}: does not say which extractor made it, so only --extractor inception may use it, "
                    f"not {identity.name}; make a reference for this extractor with --save-reference FILE"
                )
        elif not self.extractor.matches(identity):
            raise UserError(
                f"{self.path}: made with {self.extractor}, but the extractor is {identity}; use the same extractor, "
                "or make a reference for this one with --save-reference FILE"
            )


def save_statistics(
    path: str | Path, statistics: Statistics, extractor: ExtractorIdentity, protocol: dict[str, Any]
) -> None:
    """Write statistics as an npz with ADM's keys `mu` and `sigma`, and who made them from what.

    The file appears whole or not at all.
    """
    target = Path(path)
    metadata = {"extractor": extractor.as_dict(), "count": statistics.count, "protocol": protocol}
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            repagen=np.array(json.dumps(metadata, sort_keys=True)),
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)


def load_statistics(path: str | Path) -> ReferenceStatistics:
    """Read statistics that this library wrote, or a file of the ADM layout (`mu`, `sigma`, perhaps `arr_0`).

    Raises:
        UserError: when the file is missing or damaged, or holds something else. Pickled content is refused.
    """
    path = Path(path)
    keys = npz_keys(path)
    if not {"mu", "sigma"} <= keys:
        raise UserError(f"{path}: statistics need the arrays mu and sigma, found {', '.join(sorted(keys)) or 'none'}")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma"))
            metadata = json.loads(str(file[_METADATA_KEY])) if _METADATA_KEY in keys else None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write it again") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} must be (D,) and (D, D)")
    return ReferenceStatistics(
        statistics=Statistics(mean, covariance, metadata["count"] if metadata else None),
        path=path,
        sha256=_file_sha256(path),
        extractor=ExtractorIdentity(**metadata["extractor"]) if metadata else None,
        protocol=metadata["protocol"] if metadata else {},
        images=NpzImages(path) if "arr_0" in keys else None,
    )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_reference(words: Sequence[str], max_bad_images: int = 0) -> ImageSource | ReferenceStatistics:
    """Open a reference named on a command line.

    Args:
        words: a path of a folder, an npz of images or an npz of statistics; or the settings of a dataset,
            `data.kind=digits data.subset=train`.
        max_bad_images: see `open_images`.

    Raises:
        UserError: when there is nothing there, or a setting is unknown.
    """
    path = Path(words[0])
    if len(words) == 1 and path.suffix == ".npz" and {"mu", "sigma"} & npz_keys(path):
        return load_statistics(path)
    return open_images(words, max_bad_images)
