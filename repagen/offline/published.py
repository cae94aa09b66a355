"""Published weights that are no Hub repositories: which files they are, and fetching one into torch's cache."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repagen.errors import UserError
from repagen.evaluation.inception import INCEPTION_FILE, INCEPTION_SHA256_START, INCEPTION_URL
from repagen.evaluation.metrics.perceptual import PUBLISHED_SHA256, TRUNKS
from repagen.files import file_digest, replace_file

_TIMEOUT_S = 60


@dataclass(frozen=True)
class PublishedFile:
    """Weights under an address that their own package names.

    Attributes:
        file: its name, which it also has in torch's cache.
        sha256: how its hash begins, as far as it is published.
        licence: of the weights.
        url: where it is; asked of the package that knows it.
    """

    file: str
    sha256: str
    licence: str
    url: Callable[[], str]


def _vgg16_url() -> str:
    from torchvision.models import VGG16_Weights

    return VGG16_Weights.IMAGENET1K_V1.url


def _alexnet_url() -> str:
    from torchvision.models import AlexNet_Weights

    return AlexNet_Weights.IMAGENET1K_V1.url


_TORCHVISION = "BSD-3-Clause (torchvision)"
PUBLISHED_FILES = {
    "inception": PublishedFile(
        INCEPTION_FILE, INCEPTION_SHA256_START, "Apache-2.0 (TensorFlow's models)", lambda: INCEPTION_URL
    ),
    "lpips-vgg": PublishedFile(TRUNKS["vgg"][1], PUBLISHED_SHA256[TRUNKS["vgg"][1]], _TORCHVISION, _vgg16_url),
    "lpips-alex": PublishedFile(TRUNKS["alex"][1], PUBLISHED_SHA256[TRUNKS["alex"][1]], _TORCHVISION, _alexnet_url),
}
"""By the names that `repagen download` takes."""


def fetch_published(published: PublishedFile, path: Path) -> None:
    """Download a file, whole or not at all.

    Raises:
        UserError: out of reach, or with another hash than the published one.
    """
    from tqdm import tqdm

    url = published.url()

    def write(temporary: Path) -> None:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, temporary.open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm.wrapattr(answer, "read", total=size, desc=published.file, leave=False) as body:
                shutil.copyfileobj(body, file)
        digest = file_digest(temporary)["sha256"]
        if not digest.startswith(published.sha256):
            raise UserError(
                f"{url}: came with sha256 {digest[:12]}..., the published file has {published.sha256[:12]}; try "
                f"again, or fetch it by hand to {path}"
            )

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        replace_file(path, write)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{url}: cannot be reached ({error}); try again, or fetch it by hand to {path}, sha256 {published.sha256}"
        ) from error
