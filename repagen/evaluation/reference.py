"""What samples are compared with: images, or a file of statistics with the extractors that made them."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from repagen.errors import UserError
from repagen.evaluation.extractor import ExtractorIdentity
from repagen.evaluation.inception import INCEPTION, TENSORFLOW_KERNEL
from repagen.evaluation.moments import Statistics
from repagen.evaluation.reporting import software_versions
from repagen.evaluation.samples import ImageSource, NpzImages, npz_keys, open_images
from repagen.files import file_digest, replace_file

Layout = Literal["repagen", "ADM", "FD-Loss", "mu and sigma"]

_METADATA_KEY = "repagen"
# Feature => the names of its mean and covariance in the layout of the ADM suite; for others see `_array_names`.
_ADM_ARRAYS = {"inception.pool": ("mu", "sigma"), "inception.spatial": ("mu_s", "sigma_s")}
# FD-Loss keeps two poolings of a vision transformer: its own (class token, attention) and the mean of patch tokens.
_FD_LOSS_ARRAYS = {"unnamed.features": ("mu", "sigma"), "unnamed.mean": ("avg_mu", "avg_sigma")}
_PICKLES = (".pkl", ".pickle")
_SYMMETRY = 1e-4  # of the largest entry; float32 covariances of other tools reach about 1e-6


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics read from a file.

    Attributes:
        statistics: feature, as `inception.pool`, => mean and covariance. Those of FD-Loss's transformers are called
            `unnamed.features` and `unnamed.mean`, since the file does not name the network.
        path: the file.
        sha256: of the file.
        extractors: space => what made them; empty in files of other tools, which do not say it.
        protocol: of the images they were made from, as far as the file says it.
        images: images the file carries for precision and recall (ADM: 10,000), not those behind the statistics.
        layout: `repagen`; `ADM` (`mu_s` or images); `FD-Loss` (`avg_mu`); or `mu and sigma` alone, as EDM, clean-fid,
            pytorch-fid and the fork of torch-fidelity write them.
        versions: of the packages that made them, where the file says it.
    """

    statistics: dict[str, Statistics]
    path: Path
    sha256: str
    extractors: dict[str, ExtractorIdentity]
    protocol: dict[str, Any]
    images: NpzImages | None
    layout: Layout
    versions: dict[str, str]

    def require_extractor(self, space: str, identity: ExtractorIdentity) -> None:
        """Refuse to be compared with the features of another extractor.

        Raises:
            UserError: when the file was made with another extractor, or does not say with which, unless it is
                Inception with TensorFlow's resize kernel, whose statistics other tools write without saying it.
        """
        made_with = self.extractors.get(space)
        if made_with is None and self.extractors:
            raise UserError(
                f"{self.path}: holds statistics of {', '.join(self.extractors)}, none of {space}; make a reference "
                "for it with `repagen reference make`"
            )
        if made_with is None:
            if identity.name != INCEPTION or f"kernel={TENSORFLOW_KERNEL}" not in identity.settings:
                raise UserError(
                    f"{self.path}: does not say which extractor made it, so it is taken for Inception's with "
                    f"{TENSORFLOW_KERNEL} and cannot serve {identity}; make a reference with "
                    "`repagen reference make`, or say what made this one with `repagen reference import`"
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
    *,
    images: Path | None = None,
) -> None:
    """Write statistics as an npz in the layout of the ADM suite, and who made them from what.

    Inception's are `mu`, `sigma` (pool) and `mu_s`, `sigma_s` (spatial), so that other tools read them; those of other
    features are `mu_FEATURE`, `sigma_FEATURE`. The file appears whole or not at all.

    Args:
        path: of the file.
        statistics: feature => mean and covariance.
        extractors: space => what made its features.
        protocol: of the images.
        images: an `.npy` file of images, uint8 (N, H, W, 3), for the file to carry as `arr_0`.
    """
    metadata = {
        "extractors": {space: identity.as_dict() for space, identity in extractors.items()},
        "counts": {feature: one.count for feature, one in statistics.items()},
        "protocol": dict(protocol),
        "versions": software_versions(),
    }
    arrays = {_METADATA_KEY: np.array(json.dumps(metadata, sort_keys=True))}
    for feature, one in statistics.items():
        mean, covariance = _array_names(feature)
        arrays |= {mean: one.mean.numpy(), covariance: one.covariance.numpy()}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        if images is not None:
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.write(images, "arr_0.npy")

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(path), write)


def _array_names(feature: str) -> tuple[str, str]:
    return _ADM_ARRAYS.get(feature, (f"mu_{feature}", f"sigma_{feature}"))


def load_statistics(path: str | Path) -> ReferenceStatistics:
    """Read statistics that this library wrote, or a file of another tool with `mu` and `sigma`.

    ADM's files may hold `mu_s`, `sigma_s` and images beside them (`arr_0`); FD-Loss's `avg_mu` and `avg_sigma`.

    Raises:
        UserError: when the file is missing or damaged, or holds something else. Pickled content is refused.
    """
    path = Path(path)
    _refuse_pickle(path)
    keys = npz_keys(path)
    layout = _layout(keys)
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file[_METADATA_KEY])) if layout == "repagen" else None
            counts = metadata["counts"] if metadata else {}
            statistics = {
                feature: _read(file, path, names, counts.get(feature))
                for feature, names in _arrays_by_feature(layout, counts).items()
                if metadata or set(names) <= keys
            }
            extractors = metadata["extractors"] if metadata else {}
            identities = {space: ExtractorIdentity(**identity) for space, identity in extractors.items()}
            protocol = dict(metadata["protocol"]) if metadata else {}
    except UserError:
        raise
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{path}: cannot be read ({error}); write it again") from error
    if not statistics:
        raise UserError(f"{path}: statistics need the arrays mu and sigma, found {', '.join(sorted(keys)) or 'none'}")
    return ReferenceStatistics(
        statistics=statistics,
        path=path,
        sha256=file_digest(path)["sha256"],
        extractors=identities,
        protocol=protocol,
        images=NpzImages(path) if "arr_0" in keys else None,
        layout=layout,
        versions=metadata.get("versions", {}) if metadata else {},
    )


def _layout(keys: set[str]) -> Layout:
    if _METADATA_KEY in keys:
        return "repagen"
    if "avg_mu" in keys:
        return "FD-Loss"
    return "ADM" if {"mu_s", "arr_0"} & keys else "mu and sigma"


def _arrays_by_feature(layout: Layout, counts: Mapping[str, int | None]) -> Mapping[str, tuple[str, str]]:
    if layout == "repagen":
        return {feature: _array_names(feature) for feature in counts}
    return _FD_LOSS_ARRAYS if layout == "FD-Loss" else _ADM_ARRAYS


def _read(file: Mapping[str, np.ndarray], path: Path, names: tuple[str, str], count: Any) -> Statistics:
    mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in names)
    both = " and ".join(names)
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        given = f"{names[0]} {tuple(mean.shape)} and {names[1]} {tuple(covariance.shape)}"
        raise UserError(f"{path}: {given} must be (D,), (D, D); write it again")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{path}: {both} are not finite; write it again")
    if (covariance - covariance.T).abs().max() > _SYMMETRY * covariance.abs().max():
        raise UserError(f"{path}: {names[1]} is not symmetric, hence no covariance; write it again")
    if count is not None and not (isinstance(count, int) and count >= 2):
        raise UserError(f"{path}: {both} are said to be of {count!r} images, must be 2 or more; write it again")
    return Statistics(mean, covariance, count)


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        code = f"import numpy, pickle; numpy.savez('OUT.npz', **pickle.load(open('{path.name}', 'rb'))['fid'])"
        raise UserError(
            f"{path}: a pickle runs code when it is opened, so it is never read here; where you trust who made it, "
            f"convert it at your own risk, for EDM2's with python -c \"{code}\" (or ['fd_dinov2'], and then "
            "`repagen reference import`)"
        )


def open_reference(words: Sequence[str]) -> ImageSource | ReferenceStatistics:
    """Open a reference named on a command line.

    Args:
        words: a path of a folder, an npz of images or an npz of statistics; or the settings of a dataset,
            `data.kind=digits data.subset=train`.

    Raises:
        UserError: when there is nothing there, or a setting is unknown.
    """
    path = Path(words[0])
    _refuse_pickle(path)
    if path.suffix == ".npz" and not path.is_file():
        raise UserError(
            f"no such file: {path}; make statistics with `repagen reference make`, or see with "
            "`repagen download PROTOCOL --to DIR` which file a protocol takes and where it goes"
        )
    if len(words) == 1 and path.suffix == ".npz" and any(key.startswith(("mu", "sigma")) for key in npz_keys(path)):
        return load_statistics(path)
    return open_images(words)
