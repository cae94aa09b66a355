"""Official checkpoints of the field as repagen models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repagen.errors import UserError

FAMILIES = ("sit", "sit_repa", "irepa", "ditdh", "rae")


def convert_checkpoint(
    family: str,
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    with_projectors: bool = False,
    encoder: Any = None,
    decoder_config: str | Path | Mapping[str, Any] | None = None,
    statistics: str | Path | None = None,
) -> Any:
    """Read an official checkpoint into a repagen model with the same outputs.

    The returned model speaks the library's convention, t = 0 for data and velocity = noise - data. Where a family
    counts time the other way (sit): model(x, 1 - t) = -official(x, t). The checkpoint itself does not tell `sit` from
    `sit_repa`: the family must be right. Position tables and random frequencies are taken from the file.

    Args:
        family: "sit" (SiT), "sit_repa" (REPA), "irepa" (iREPA), "ditdh" (RAE's DiT^DH) or "rae" (RAE's autoencoder).
        path: a `.pt` state dict, bare or under "ema", "model" or "state_dict" (the first of them that is there), or
            `.safetensors`. Read with `weights_only`; `module.` and `_orig_mod.` prefixes are dropped.
        config: the official constructor's arguments ("rae": `noise_tau`; sizes are checked). What is left out is read
            off the tensors' shapes; the number of attention heads can be only where there are rotary or query norms,
            or for a published width.
        with_projectors: also return the alignment (sit_repa, irepa) with the projectors of the file.
        encoder: ("rae") the vision encoder: a folder, a Hub id or a `VisionEncoder`.
        decoder_config: ("rae") the decoder's config folder, file or values.
        statistics: ("rae") file of the latent's mean and variance.

    Returns:
        A `SiTTransformer2DModel`, `DiTDHTransformer2DModel` or `RepresentationAutoencoder` in eval mode and float32;
        with projectors (model, `RepresentationAlignment`).

    Raises:
        UserError: unknown family or argument; a file that is missing or unreadable; tensors that are missing, left
            over, of the wrong shape or not finite, by name.
    """
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is unknown; allowed are {', '.join(FAMILIES)}")
    if family == "rae":
        if with_projectors:
            raise UserError("family 'rae' has no projectors; drop with_projectors")
        from repagen.conversion.rae import convert_rae

        return convert_rae(path, encoder=encoder, decoder_config=decoder_config, statistics=statistics, config=config)
    given = {"encoder": encoder, "decoder_config": decoder_config, "statistics": statistics}
    if unused := [name for name, value in given.items() if value is not None]:
        raise UserError(f"family {family!r} has no {', '.join(unused)}; give the constructor's arguments as config")
    from repagen.conversion.generators import convert_generator

    return convert_generator(family, Path(path), config, with_projectors)
