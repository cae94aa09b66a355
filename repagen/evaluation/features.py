"""Feature extractors: what an image is turned into before distributions are compared.

One contract: uint8 images (B, 3, H, W) => features (B, D) float32, plus an identity that goes beside every figure.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F

from repagen.errors import UserError

if TYPE_CHECKING:
    from repagen.encoders import VisionEncoder

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_INCEPTION_SHA256_START = "6726825d"  # the published file carries the first digits of its hash in its name

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class ExtractorIdentity:
    """What must be equal for two figures to be comparable.

    Attributes:
        name: `inception-v3-compat`, or the encoder's id or folder name.
        weights_sha256: hash of the weights.
        settings: layer or pooling, and input size.
    """

    name: str
    weights_sha256: str
    settings: str

    def __str__(self) -> str:
        return f"{self.name} ({self.settings}; weights {self.weights_sha256[:12]})"

    def matches(self, other: ExtractorIdentity) -> bool:
        """Whether both compute the same features; where the weights were loaded from does not matter."""
        return (self.weights_sha256, self.settings) == (other.weights_sha256, other.settings)

    def as_dict(self) -> dict[str, str]:
        """The fields, for JSON."""
        return asdict(self)


class FeatureExtractor(Protocol):
    """uint8 images (B, 3, H, W) on any device => features (B, dimension) float32."""

    @property
    def identity(self) -> ExtractorIdentity:
        """Name, weights and settings of the extractor."""

    @property
    def dimension(self) -> int:
        """Number of features D."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the features."""


class InceptionExtractor:
    """The Inception network of the FID literature: 2048 features after the last pooling, TF1 resize to 299 px inside.

    The network is torch-fidelity's port of the TensorFlow graph, which reproduces the ADM evaluator's FID to 0.04 %.

    Args:
        weights: file with its weights. By default the published file in torch's cache; nothing is ever downloaded.
            Another file than the published one is taken only when given here, and its hash tells it apart.
        device: where to compute.

    Raises:
        UserError: when torch-fidelity or the weights are missing, or the cached file is not the published one.
    """

    dimension = 2048

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("the Inception extractor needs torch-fidelity; pip install 'repagen[metrics]'") from error
        path = Path(weights) if weights else _cached_inception_file()
        content, digest = _read_inception_file(path, must_be_published=weights is None)
        network = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=content)
        self.network = network.to(device)
        self.device = torch.device(device)
        self.identity = ExtractorIdentity(INCEPTION, digest, "layer=2048, size=299")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the features of uint8 images (B, 3, H, W)."""
        return self.network(images.to(self.device))[0]


def is_published_inception(identity: ExtractorIdentity) -> bool:
    """Whether figures of this extractor can stand beside published FIDs."""
    return identity.name == INCEPTION and identity.weights_sha256.startswith(_INCEPTION_SHA256_START)


def _cached_inception_file() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    folder = Path(os.environ.get("TORCH_HOME", cache)).expanduser() / "hub" / "checkpoints"
    return folder / INCEPTION_FILE


def _read_inception_file(path: Path, must_be_published: bool) -> tuple[io.BytesIO, str]:
    """Return the weights as a file in memory, and the sha256 of the file on disk.

    torch-fidelity unpickles whatever it is given. It is therefore given bytes that were loaded as plain tensors first
    and written anew here, never the file itself.
    """
    if not path.is_file():
        raise UserError(
            f"Inception weights not found: {path}; download {INCEPTION_URL} there, or give --extractor-weights FILE, "
            "or another --extractor (an encoder's id or folder)"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if must_be_published and not digest.startswith(_INCEPTION_SHA256_START):
        raise UserError(
            f"{path}: sha256 is {digest[:12]}..., the published weights begin with {_INCEPTION_SHA256_START}; "
            "the file is damaged, download it again"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file fails in the unpickler's many ways
        raise UserError(
            f"{path}: not a file of plain tensors ({type(error).__name__}); give torch-fidelity's weights"
        ) from error
    rewritten = io.BytesIO()
    torch.save(state, rewritten)
    rewritten.seek(0)
    return rewritten, digest


class EncoderExtractor:
    """Any vision encoder as extractor: the mean of its patch tokens, or its CLS token.

    Args:
        encoder: a frozen `VisionEncoder`. Images are resized here, bicubically with antialiasing as metrics do it, and
            normalised by the encoder.
        pooling: `mean` exists for every encoder; `cls` is what FD-DINOv2 is published with (2306.04675).

    Raises:
        UserError: with the first images, when they are not square, or the encoder has no CLS token to pool.
    """

    def __init__(self, encoder: VisionEncoder, pooling: Pooling = "mean") -> None:
        self.encoder = encoder
        self.pooling = pooling
        self.dimension = encoder.hidden_size
        reading = f"layers={encoder.layers}, combination={encoder.combination}, norm_affine={encoder.norm_affine}"
        dtype = str(encoder.dtype).removeprefix("torch.")
        self.identity = ExtractorIdentity(
            name=encoder.name_or_path or f"{encoder.family} with random weights",
            weights_sha256=encoder.fingerprint(),
            settings=f"pooling={pooling}, size={encoder.image_size}, antialiased bicubic, {reading}, dtype={dtype}",
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the features of uint8 images (B, 3, H, W)."""
        if images.shape[-2] != images.shape[-1]:
            raise UserError(f"encoders see square images, got {images.shape[-2]} x {images.shape[-1]} px; crop them")
        pixels = images.to(self.encoder.device).float() / 255
        side = self.encoder.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        output = self.encoder(pixels)
        if self.pooling == "mean":
            return output.tokens.float().mean(dim=1)
        if output.cls is None:
            raise UserError(f"encoder {self.identity.name} has no CLS token; use pooling mean")
        return output.cls.float()


def open_extractor(
    name: str,
    *,
    weights: str | Path | None = None,
    pooling: Pooling = "mean",
    device: torch.device | str = "cpu",
) -> InceptionExtractor | EncoderExtractor:
    """Open `inception`, or an encoder by id or folder.

    Args:
        name: `inception`, or what `VisionEncoder.from_pretrained` takes.
        weights: file with Inception's weights; see `InceptionExtractor`.
        pooling: for encoders; see `EncoderExtractor`.
        device: where to compute.

    Raises:
        UserError: when something is missing, or `weights` is given for an encoder.
    """
    if name in ("inception", INCEPTION):
        return InceptionExtractor(weights, device)
    if weights is not None:
        raise UserError(f"extractor weights are given apart only for inception; {name} brings its own, leave them out")
    from repagen.encoders import VisionEncoder

    return EncoderExtractor(VisionEncoder.from_pretrained(name).to(device), pooling)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch off TF32 and autocast: both move Inception features enough to change an FID's second digit."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
