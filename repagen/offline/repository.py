"""A Hub repository in a bundle: which of its files are needed, and getting them as plain files at one commit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from repagen.encoders.backbones import FROZEN_VARIANT
from repagen.encoders.families import FAMILIES, EncoderFamily, family_of
from repagen.encoders.files import CONFIG_FILES, WEIGHT_FILES, read_json
from repagen.errors import UserError
from repagen.files import file_digest, put_file, replace_file
from repagen.hub.fetching import NotThereError, fetch_snapshot, naming_hub_errors
from repagen.hub.folder_facts import ADAPTER_FILE, PIPELINE_FILE
from repagen.hub.publishing import CARD_FILE
from repagen.offline.needs import Need

logger = logging.getLogger(__name__)

_VARIANT_INDEX = "*.safetensors.index.*.json"
_DESCRIPTIONS = ("*.json", "*.txt", "*.model", CARD_FILE)


@dataclass(frozen=True)
class Listing:
    """What the Hub says about a repository.

    Attributes:
        commit: 40 hexadecimal digits.
        files: those that are needed => size in bytes and sha256, where the Hub tells them.
        licence: of the encoders' table, or as its card has it.
    """

    commit: str
    files: Mapping[str, tuple[int | None, str | None]]
    licence: str


def look_up(need: Need, cache: Path) -> Listing:
    """Ask the Hub for a repository's commit, files and licence; only its config is downloaded.

    Args:
        need: on the Hub.
        cache: of the bundle.

    Raises:
        UserError: closed or out of reach; `NotThereError`: unknown, or without weights.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        raise UserError(f"{need.kind} {need.name!r}: not here, and HF_HUB_OFFLINE is set; unset it to download")
    with naming_hub_errors(need.name, need.revision, what=need.kind):
        about = HfApi().dataset_info if need.kind == "dataset" else HfApi().model_info
        info = about(need.name, revision=need.revision, files_metadata=True)
    assert info.sha is not None, "the Hub gives the commit of every revision"
    entries = {entry.rfilename: entry for entry in info.siblings or ()}
    config: dict[str, Any] = {}
    if "config.json" in entries and need.kind != "dataset":
        folder = fetch_snapshot(
            need.name, revision=info.sha, patterns=["config.json"], what=need.kind, cache_dir=cache
        )
        config = read_json(folder / "config.json")
    is_encoder = need.kind == "encoder" or ("_class_name" not in config and _family(need.name, config) is not None)
    files = {
        name: (entries[name].size, getattr(entries[name].lfs, "sha256", None))
        for name in _chosen(list(entries), need, is_encoder)
    }
    card = getattr(info.card_data, "license", None)
    stated = f"{card} (its card)" if card else "none stated"
    family = _family(need.name, config) if is_encoder else None
    return Listing(info.sha, files, family.licence if family else stated)


def _family(name: str, config: Mapping[str, Any]) -> EncoderFamily | None:
    if "architecture" in config and "model_type" not in config:
        return FAMILIES["timm"]
    try:
        return family_of(config.get("model_type"), name)
    except UserError:  # no encoder, or none that this version knows: loading it will say so
        return None


def _chosen(names: Sequence[str], need: Need, is_encoder: bool) -> list[str]:
    """Choose the files of a repository that loading it reads.

    Raises:
        NotThereError: it has no weights.
    """
    if need.kind == "dataset":
        return [name for name in names if name != ".gitattributes"]
    chosen = _of_encoder(names) if is_encoder else _of_model(names, need.subfolder)
    if not any(name.endswith((".safetensors", ".bin")) for name in chosen):
        where = f", subfolder {need.subfolder}" if need.subfolder else ""
        raise NotThereError(
            f"{need.kind} {need.name!r}{where}: it has no weights that are loaded here (as safetensors); see "
            f"https://huggingface.co/{need.name}/tree/main"
        )
    return chosen


def _of_encoder(names: Sequence[str]) -> list[str]:
    """The files that `repagen.encoders.files` looks for."""
    for patterns in WEIGHT_FILES:
        weights = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
        if weights:
            return [*(name for name in CONFIG_FILES if name in names), *weights]
    return []


def _of_model(names: Sequence[str], subfolder: str | None) -> list[str]:
    """The files that diffusers reads for us: descriptions, and weights as safetensors, without variants."""
    inside = [name for name in names if subfolder is None or name.startswith(f"{subfolder}/") or name == PIPELINE_FILE]
    return [name for name in inside if _is_description(name) or _is_weight(name, in_pipeline=PIPELINE_FILE in names)]


def _is_description(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _DESCRIPTIONS) and not fnmatch(name, _VARIANT_INDEX)


def _is_weight(name: str, *, in_pipeline: bool) -> bool:
    path = PurePosixPath(name)
    variant = PurePosixPath(path.stem).suffix.split("-")[0]
    # Beside a pipeline's folders lie copies for others.
    belongs = "/" in name or not in_pipeline or name == ADAPTER_FILE
    return path.suffix == ".safetensors" and variant in ("", f".{FROZEN_VARIANT}") and belongs


def fetch_files(need: Need, listing: Listing, cache: Path) -> list[Path]:
    """Get a repository's files into the bundle's cache, and tell it which commit the revision means.

    The files end as plain ones, without the links between the cache's `snapshots` and `blobs`: any program copies
    them as they are. The revision is written last, so that nothing that is loaded finds half a repository.

    Returns:
        The files, and the one that holds the revision.

    Raises:
        UserError: a file that could not be fetched, or came with another hash than the Hub has for it.
    """
    names = list(listing.files)
    if need.kind == "dataset":
        from huggingface_hub import snapshot_download

        with naming_hub_errors(need.name, listing.commit, what=need.kind):
            folder = Path(
                snapshot_download(
                    need.name, repo_type="dataset", revision=listing.commit, allow_patterns=names, cache_dir=cache
                )
            )
    else:
        folder = fetch_snapshot(need.name, revision=listing.commit, patterns=names, what=need.kind, cache_dir=cache)
    for name, (_, sha256) in listing.files.items():
        _refuse_wrong_hash(folder / name, sha256, need)
    storage = folder.parents[1]
    _settle(storage)
    found = [folder / name for name in names]
    revision = need.revision or "main"
    if revision != listing.commit:
        reference = storage / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        put_file(reference, listing.commit.encode())
        found.append(reference)
    return found


def _refuse_wrong_hash(path: Path, sha256: str | None, need: Need) -> None:
    if sha256 is not None and file_digest(path)["sha256"] != sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise UserError(
            f"{need.kind} {need.name!r}: {path.name} came with another sha256 than the Hub has for it; it is removed, "
            "run the same command again"
        )


def _settle(storage: Path) -> None:
    """Put the files in the place of the links to them, and drop what the cache keeps for downloads alone."""
    links: dict[Path, list[Path]] = defaultdict(list)
    for path in (storage / "snapshots").rglob("*"):
        if path.is_symlink():
            links[path.resolve()].append(path)
    for blob, (first, *others) in links.items():
        for other in others:
            replace_file(other, partial(shutil.copyfile, blob))
        os.replace(blob, first)
    # With a list of all files of the repository, huggingface_hub would take a choice of them for half a download.
    for leftover in (storage / "blobs", storage / "trees", storage.parent / ".locks" / storage.name):
        shutil.rmtree(leftover, ignore_errors=True)


def referred_needs(folder: Path, why: str) -> Iterator[Need]:
    """Find what saved models refer to: the encoders of their autoencoders, and the model an adapter belongs to.

    Args:
        folder: of a model, a pipeline or an adapter.
        why: the key that asks for it.
    """
    for path in sorted([*folder.glob("config.json"), *folder.glob("*/config.json")]):
        encoder = _json(path).get("encoder")
        if isinstance(encoder, dict) and not _json(path).get("encoder_stored") and encoder.get("name_or_path"):
            name, revision = encoder["name_or_path"], encoder.get("revision")
            key = f"{why}:{path.relative_to(folder)}:encoder"
            yield Need("encoder", name, key, revision) if revision else Need("path", name, key)
    if (folder / ADAPTER_FILE).is_file() and (folder / CARD_FILE).is_file():
        from huggingface_hub import ModelCard

        base = ModelCard.load(folder / CARD_FILE).data.get("base_model")
        if isinstance(base, str) and base.count("/") == 1:
            yield Need("model", base, f"{why}:{CARD_FILE}:base_model")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # loading it will say so
        return {}
    return content if isinstance(content, dict) else {}
