"""The Inception network of the FID literature, with all the features that its metrics need, from one forward pass."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import torch

from repagen.errors import UserError
from repagen.evaluation.extractor import ExtractorIdentity
from repagen.evaluation.resize import ResizeKernel, resize
from repagen.hub.places import published_file_command, torch_checkpoint

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
TENSORFLOW_KERNEL: ResizeKernel = "tensorflow1-bilinear"  # of the graph itself, and of nearly all published figures
INCEPTION_SHA256_START = "6726825d"  # the published file carries the first digits of its hash in its name
_SIDE = 299


class InceptionExtractor:
    """Features of the 2015 Inception network, in torch-fidelity's port of the TensorFlow graph.

    The port reproduces the ADM evaluator's FID to 0.04 %. Its features:

    - `pool` (2048): after the last pooling, for FID, KID, precision and recall.
    - `spatial` (2023): the first 7 channels of `mixed_6/conv`, 17 x 17, flattened as (h, w, channel), for sFID as the
      ADM suite defines it (2103.03841).
    - `logits` (1008): without bias, for the Inception Score.

    Args:
        weights: file with its weights. By default the published file in torch's cache; nothing is ever downloaded.
            Another file than the published one is taken only when given here, and its hash tells it apart.
        device: where to compute.
        kernel: how images get to 299 px; TensorFlow's own, or clean-fid's `pillow-bicubic-float`.

    Raises:
        UserError: when the weights are missing or are of something else, or the cached file is not the published one.
    """

    dimensions = {"pool": 2048, "spatial": 7 * 17 * 17, "logits": 1008}  # noqa: RUF012

    def __init__(
        self,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        kernel: ResizeKernel = TENSORFLOW_KERNEL,
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights) if weights else torch_checkpoint(INCEPTION_FILE)
        content, digest = _read_inception_file(path, must_be_published=weights is None)
        try:
            network = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=content)
        except (RuntimeError, TypeError, AttributeError) as error:  # what torch raises over foreign content
            raise UserError(
                f"{path}: not the weights of torch-fidelity's Inception ({_misfit(error)}); download {INCEPTION_URL}"
            ) from error
        self.network: Any = network.to(device)
        self.device = torch.device(device)
        self.kernel = kernel
        self.identity = ExtractorIdentity(INCEPTION, digest, f"port=torch-fidelity, size={_SIDE}, kernel={kernel}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of uint8 images (B, 3, H, W)."""
        state = (resize(images.to(self.device), _SIDE, self.kernel) - 128) / 128
        spatial = None
        # torch-fidelity's own forward pass takes 8-bit images, and tells nothing of the branch that sFID needs.
        for name, module in self.network.named_children():
            if name == "fc":
                break
            if name == "Mixed_6d":
                spatial = module.branch1x1(state)[:, :7].permute(0, 2, 3, 1).flatten(1)
            state = module(state)
        assert spatial is not None, "torch-fidelity's Inception has no layer Mixed_6d"
        pool = state.flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": pool.mm(self.network.fc.weight.T)}


def is_published_inception(identity: ExtractorIdentity) -> bool:
    """Whether figures of this extractor can stand beside published FIDs."""
    return identity.name == INCEPTION and identity.weights_sha256.startswith(INCEPTION_SHA256_START)


def _misfit(error: Exception) -> str:
    """What torch found first: a missing key, or anything else."""
    missing = re.search(r'Missing key\(s\) in state_dict: "([^"]+)"', str(error))
    return f"the tensor {missing[1]} is missing" if missing else " ".join(str(error).split())[:200]


def _read_inception_file(path: Path, must_be_published: bool) -> tuple[io.BytesIO, str]:
    """Return the weights as a file in memory, and the sha256 of the file on disk.

    torch-fidelity unpickles whatever it is given. It is therefore given bytes that were loaded as plain tensors first
    and written anew here, never the file itself.
    """
    if not path.is_file():
        raise UserError(
            f"Inception weights not found: {path}; get them with {published_file_command('inception')}, or give "
            "--extractor-weights FILE, or another --extractor (an encoder's id or folder)"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if must_be_published and not digest.startswith(INCEPTION_SHA256_START):
        raise UserError(
            f"{path}: sha256 is {digest[:12]}..., the published weights begin with {INCEPTION_SHA256_START}; "
            f"the file is damaged, delete it and get it again with {published_file_command('inception')}"
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
