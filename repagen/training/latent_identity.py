"""Opening an autoencoder, and checks of the latents it makes."""

from __future__ import annotations

from typing import Any

import torch

from repagen.data import ImageDataset
from repagen.errors import UserError, refusing
from repagen.models.opening import load_model, refuse_missing_folder


def open_autoencoder(
    name: str, *, option: str = "autoencoder", subfolder: str | None = None, revision: str | None = None
) -> Any:
    """Load an autoencoder of this library or of diffusers, from a folder or the Hub, in eval mode.

    Args:
        name: the folder or Hub id.
        option: what the user gave the name as, for messages.
        subfolder, revision: where it is in there.

    Raises:
        UserError: nothing that can be loaded is there.
    """
    where = f"{name}, subfolder {subfolder}" if subfolder else name
    allowed = "a folder or Hub id of an autoencoder"
    refuse_missing_folder(name, option, allowed)
    with refusing(f"{option}: {where} cannot be loaded; allowed: {allowed}"):
        autoencoder = load_model(name, f"{option}: model", subfolder=subfolder, revision=revision)
    if not hasattr(autoencoder, "encode"):
        raise UserError(f"{option}: {where} is a {type(autoencoder).__name__}; allowed: an autoencoder")
    return autoencoder.eval()


def refuse_non_finite(values: torch.Tensor, indices: torch.Tensor, dataset: ImageDataset) -> None:
    """Stop at a sample whose values (B, ...) are not finite, naming it; `indices` (B,) are its places in the dataset.

    Raises:
        UserError: a value is NaN or infinite.
    """
    finite = torch.isfinite(values.flatten(1)).all(1).cpu()
    if not finite.all():
        index = int(indices[~finite][0])
        raise UserError(
            f"{dataset.describe(index)}: its latent is not finite; look at the image, or encode in float32"
        )


def process_group() -> tuple[int, int]:
    """Return (this process, number of processes) of the running process group; (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
