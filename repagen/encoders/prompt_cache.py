"""Embeddings of prompts on disk, so that a large text encoder reads each prompt once and need not stay in memory.

FOLDER/prompt_cache.json            whose embeddings these are
FOLDER/ab/abcd...01.safetensors     one prompt each, in at most 256 sub-folders; named by a hash of encoder and prompt

Files are written in one rename, so that any number of processes may fill a cache and none reads half a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm import tqdm

from repagen.encoders.text import TextEmbeddings, TextEncoder
from repagen.encoders.text_storage import unlike
from repagen.encoders.text_tower import prompt_list
from repagen.errors import UserError, refusing
from repagen.files import TEMPORARY_PREFIX, put_file
from repagen.hub.places import without_names

logger = logging.getLogger(__name__)

_FACTS, _FORMAT = "prompt_cache.json", 1
_BATCH = 32  # prompts that are read at once


class PromptCache:
    """A folder with the embeddings of prompts, all of one text encoder.

    Args:
        folder: an existing cache, or where to make one.
        encoder: whose embeddings these are; None takes an existing cache as it is.

    Attributes:
        description: `TextEncoder.describe()` of the encoder.
        embed_dim, max_length: D and L of its embeddings.

    Raises:
        UserError: a folder that holds something else, or is no cache and cannot become one; or a cache of another
            encoder, naming both.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: TextEncoder | None = None) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / _FACTS
        if not path.is_file():
            if encoder is None:
                raise UserError(f"{path}: not there, so this is no prompt cache; give the encoder that shall fill it")
            facts = {"format": _FORMAT, "encoder": encoder.describe()}
            facts |= {"embed_dim": encoder.embed_dim, "max_length": encoder.max_length}
            with refusing(f"{self.folder}: cannot be made a prompt cache; name a new folder"):
                _make_folder(self.folder, path)
                put_file(path, f"{json.dumps(facts, indent=1)}\n".encode())
        with refusing(f"{path}: cannot be read; delete the folder and fill it again"):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise UserError(f"{path}: of format {content['format']!r}, this version reads {_FORMAT}")
            self.description: list[dict[str, Any]] = content["encoder"]
            self.embed_dim, self.max_length = int(content["embed_dim"]), int(content["max_length"])
            self._identity = _identity(self.description)
        if encoder is not None:
            _refuse_other(path, self.description, encoder.describe())

    def get(self, prompt: str) -> TextEmbeddings | None:
        """Return embeddings (L, D) float32 and mask (L,) of a prompt; None where they are not here, or damaged."""
        try:
            content = load(self._path(prompt).read_bytes())
            mask, own = content["mask"], content["embeddings"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        if mask.shape != (self.max_length,) or own.shape != (int(mask.sum()), self.embed_dim):
            return None
        embeddings = torch.zeros(self.max_length, self.embed_dim)
        embeddings[mask] = own
        return TextEmbeddings(embeddings, mask)

    def put(self, prompts: Sequence[str], read: TextEmbeddings) -> None:
        """Keep what the encoder made of prompts.

        Args:
            prompts: B texts.
            read: embeddings (B, L, D) and mask (B, L) of the cache's encoder.
        """
        for prompt, embeddings, mask in zip(prompts, read.embeddings.cpu(), read.mask.cpu(), strict=True):
            path = self._path(prompt)
            path.parent.mkdir(exist_ok=True)
            put_file(path, save({"embeddings": embeddings[mask].contiguous(), "mask": mask.contiguous()}))

    def size(self) -> tuple[int, int]:
        """Return the number of prompts and of bytes on disk."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/[!.]*.safetensors")]
        return len(sizes), sum(sizes)

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{self._identity}\n{prompt}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


class CachedTextEncoder:
    """A `TextEncoder` that looks into a `PromptCache` first: the same `encode`, `embed_dim` and `max_length`.

    Args:
        folder: the cache's.
        encoder: reads prompts that are not there, which are then kept; None: all prompts must be there.

    Raises:
        UserError: as `PromptCache`.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: TextEncoder | None = None) -> None:
        self.cache = PromptCache(folder, encoder)
        self.encoder = encoder
        self.embed_dim, self.max_length = self.cache.embed_dim, self.cache.max_length

    @property
    def null(self) -> TextEmbeddings:
        """Embeddings (1, L, D) and mask (1, L) of the empty prompt."""
        return self.encode([""])

    def describe(self) -> list[dict[str, Any]]:
        """See `TextEncoder.describe`."""
        return self.cache.description

    def encode(self, prompts: Sequence[str], *, device: torch.device | None = None) -> TextEmbeddings:
        """See `TextEncoder.encode`.

        Args:
            prompts: any texts; one text alone counts as a list of one.
            device: where the embeddings shall be; by default the CPU.

        Raises:
            UserError: a prompt is not there and there is no encoder, naming the first.
        """
        texts = prompt_list(prompts)
        rows = {text: self.cache.get(text) for text in texts}
        self._read([text for text, row in rows.items() if row is None])
        embeddings = torch.zeros(len(texts), self.max_length, self.embed_dim)
        masks = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        for index, text in enumerate(texts):
            row = rows[text] or self.cache.get(text)
            assert row is not None, "it was written just now"
            embeddings[index], masks[index] = row
        return TextEmbeddings(embeddings.to(device), masks.to(device))

    def fill(self, prompts: Sequence[str], batch_size: int = _BATCH) -> int:
        """Read and keep the prompts that are not there, and the empty one.

        Args:
            prompts: any number of texts.
            batch_size: prompts that are read at once.

        Returns:
            How many were read.

        Raises:
            UserError: as `encode`.
        """
        wanted = [prompt for prompt in dict.fromkeys(["", *prompt_list(prompts)]) if self.cache.get(prompt) is None]
        self._read(wanted, batch_size, progress=True)
        count, size = self.cache.size()
        logger.info("%s: %d prompts, %.1f MB", self.cache.folder, count, size / 1e6)
        return len(wanted)

    def _read(self, prompts: list[str], batch_size: int = _BATCH, progress: bool = False) -> None:
        if not prompts:
            return
        if self.encoder is None:
            raise UserError(
                f"{self.cache.folder}: {len(prompts)} prompts are not in this cache, the first is "
                f"{prompts[0][:80]!r}; fill it with the encoder it was made by ({_names(self.cache.description)})"
            )
        starts = range(0, len(prompts), batch_size)
        for start in tqdm(starts, desc="prompts", disable=not progress):
            batch = prompts[start : start + batch_size]
            self.cache.put(batch, self.encoder.encode(batch))


def _make_folder(folder: Path, facts: Path) -> None:
    """Make the folder of a cache, which may be there if it is empty, or another process made it a cache just now."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY_PREFIX)]
    if others and not facts.is_file():
        raise UserError(f"{folder}: not empty and no prompt cache ({others[0]} is in it); name a new folder")


def _identity(description: list[dict[str, Any]]) -> str:
    """What embeddings depend on, as text: the same encoder may lie at several places."""
    return json.dumps(without_names(description), sort_keys=True)


def _refuse_other(path: Path, cached: list[dict[str, Any]], given: list[dict[str, Any]]) -> None:
    if reason := unlike(cached, given):
        raise UserError(
            f"{path}: a prompt cache of text encoder {_names(cached)}, not of {_names(given)} ({reason}); "
            "give another folder, or that encoder"
        )


def _names(description: list[dict[str, Any]]) -> str:
    return " + ".join(repr(one.get("name")) for one in description)
