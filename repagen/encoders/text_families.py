"""The table of text encoders: everything repagen knows about one that its own files do not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repagen.encoders.families import TransformersFamily
from repagen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TextFamily(TransformersFamily):
    """One kind of text encoder and how its token states are read.

    Attributes:
        max_length: tokens of a prompt that are read when none are asked for.
        positions_key: key of the model's own config that bounds them; empty where positions are relative.
        part: path of the module that is kept of `model_class`; empty for all of it.
        sees_padding: the network was trained on prompts filled up to its position table, without an attention mask: it
            gets them so, and the mask only says which of its outputs are the prompt's own tokens.
        lower_case: it was trained on lower case.
    """

    max_length: int = 256
    positions_key: str = ""
    part: str = ""
    sees_padding: bool = False
    lower_case: bool = False


_NO_CACHE = {"use_cache": False}
_OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")
_GEMMA_TERMS = "Gemma Terms of Use (gated)"

_ROWS = (
    TextFamily(
        # CLIP (2103.00020): causal.
        name="clip",
        model_types=("clip", "clip_text_model"),
        model_class="CLIPTextModel",
        config_class="CLIPTextConfig",
        max_length=77,
        positions_key="max_position_embeddings",
        default_id="openai/clip-vit-large-patch14",
        licence="MIT",
        redistributable=True,
    ),
    TextFamily(
        # SigLIP (2303.15343), and SigLIP 2 (2502.14786) of fixed image size.
        name="siglip",
        model_types=("siglip", "siglip_text_model"),
        model_class="SiglipTextModel",
        config_class="SiglipTextConfig",
        max_length=64,
        positions_key="max_position_embeddings",
        sees_padding=True,
        lower_case=True,
        default_id="google/siglip2-base-patch16-256",
        licence="Apache-2.0",
        redistributable=True,
    ),
    TextFamily(
        # SigLIP 2 (2502.14786) of variable image size.
        name="siglip2",
        model_types=("siglip2", "siglip2_text_model"),
        model_class="Siglip2TextModel",
        config_class="Siglip2TextConfig",
        max_length=64,
        positions_key="max_position_embeddings",
        sees_padding=True,
        lower_case=True,
        default_id="google/siglip2-base-patch16-naflex",
        licence="Apache-2.0",
        redistributable=True,
    ),
    TextFamily(
        # T5 (1910.10683), its version 1.1 and Flan-T5.
        name="t5",
        model_types=("t5",),
        model_class="T5EncoderModel",
        config_class="T5Config",
        part="encoder",
        default_id="google/flan-t5-xl",
        licence="Apache-2.0",
        redistributable=True,
    ),
    TextFamily(
        # mT5 (2010.11934).
        name="mt5",
        model_types=("mt5",),
        model_class="MT5EncoderModel",
        config_class="MT5Config",
        part="encoder",
        default_id="google/mt5-base",
        licence="Apache-2.0",
        redistributable=True,
    ),
    TextFamily(
        # UMT5 (2304.09151).
        name="umt5",
        model_types=("umt5",),
        model_class="UMT5EncoderModel",
        config_class="UMT5Config",
        part="encoder",
        default_id="google/umt5-base",
        licence="Apache-2.0",
        redistributable=True,
    ),
    TextFamily(
        # Gemma 2 (2408.00118): a causal language model, as the following ones.
        name="gemma2",
        model_types=("gemma2",),
        model_class="Gemma2Model",
        config_class="Gemma2Config",
        positions_key="max_position_embeddings",
        old_keys=_OLD_ROPE,
        arguments=_NO_CACHE,
        default_id="google/gemma-2-2b",
        licence=_GEMMA_TERMS,
        redistributable=False,
        gated=True,
    ),
    TextFamily(
        # Gemma 3 (2503.19786); of a checkpoint that sees images too, its text model.
        name="gemma3",
        model_types=("gemma3_text", "gemma3"),
        model_class="Gemma3TextModel",
        config_class="Gemma3TextConfig",
        positions_key="max_position_embeddings",
        old_keys=_OLD_ROPE,
        tower_prefix=r"(model\.)?language_model\.(model\.)?",
        arguments=_NO_CACHE,
        default_id="google/gemma-3-1b-pt",
        licence=_GEMMA_TERMS,
        redistributable=False,
        gated=True,
    ),
    TextFamily(
        # Qwen3 (2505.09388).
        name="qwen3",
        model_types=("qwen3",),
        model_class="Qwen3Model",
        config_class="Qwen3Config",
        positions_key="max_position_embeddings",
        old_keys=_OLD_ROPE,
        arguments=_NO_CACHE,
        default_id="Qwen/Qwen3-0.6B",
        licence="Apache-2.0",
        redistributable=True,
    ),
)

TEXT_FAMILIES: dict[str, TextFamily] = {row.name: row for row in _ROWS}


def text_family_of(model_type: Any, name: str) -> TextFamily:
    """Return the family of a checkpoint.

    Args:
        model_type: entry of its `config.json`.
        name: its folder or Hub id.

    Raises:
        UserError: for a type repagen does not know, naming the file it stands in.
    """
    for row in _ROWS:
        if model_type in row.model_types:
            return row
    known = ", ".join(sorted(model_type for row in _ROWS for model_type in row.model_types))
    raise UserError(f"{name}:config.json: model_type {model_type!r} is no supported text encoder; supported: {known}")
