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
from repagen.encoders.families import FAMILIES, EncoderFamily, TransformersFamily, family_of
from repagen.encoders.files import CONFIG_FILES, TEXT_FILES, WEIGHT_FILES, read_json
from repagen.encoders.text_families import TextFamily, text_family_of
from repagen.errors import UserError
from repagen.files import file_digest, put_file, replace_file
from repagen.hub.fetching import NotThereError, fetch_snapshot, naming_hub_errors
from repagen.hub.folder_facts import ADAPTER_FILE, PIPELINE_FILE
from repagen.hub.publishing import CARD_FILE
from repagen.offline.needs import Need, NeedKind

logger = logging.getLogger(__name__)

_VARIANT_INDEX = "*.safetensors.index.*.json"
_ENCODER_FILES: dict[NeedKind, Sequence[str]] = {"encoder": CONFIG_FILES, "text_encoder": TEXT_FILES}
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
    families = _families(need, config)
    files = {
        name: (entries[name].size, getattr(entries[name].lfs, "sha256", None))
        for name in _chosen(list(entries), need, list(families))
    }
    card = getattr(info.card_data, "license", None)
    stated = f"{card} (its card)" if card else "none stated"
    known = (family.licence for family in families.values() if family is not None)
    return Listing(info.sha, files, next(known, stated))


def _families(need: Need, config: Mapping[str, Any]) -> dict[NeedKind, TransformersFamily | None]:
    """What a repository holds encoders for, with their families where they are known.

    The repository of a user's own request may be one of a vision encoder, of a text encoder, or of both.
    """
    found: dict[NeedKind, TransformersFamily | None] = {
        "encoder": _family(need.name, config),
        "text_encoder": _text_family(need.name, config),
    }
    if need.kind in found:
        return {need.kind: found[need.kind]}
    model = need.kind == "model" and "_class_name" not in config
    return {kind: family for kind, family in found.items() if model and family is not None}


def _family(name: str, config: Mapping[str, Any]) -> EncoderFamily | None:
    if "architecture" in config and "model_type" not in config:
        return FAMILIES["timm"]
    try:
        return family_of(config.get("model_type"), name)
    except UserError:  # no encoder, or none that this version knows: loading it will say so
        return None


def _text_family(name: str, config: Mapping[str, Any]) -> TextFamily | None:
    try:
        return text_family_of(config.get("model_type"), name)
    except UserError:  # as above
        return None


def _chosen(names: Sequence[str], need: Need, encoders: Sequence[NeedKind]) -> list[str]:
    """Choose the files of a repository that loading it reads.

    Raises:
        NotThereError: it has no weights.
    """
    if need.kind == "dataset":
        return [name for name in names if name != ".gitattributes"]
    chosen = _of_encoders(names, encoders) if encoders else _of_model(names, need.subfolder)
    if not any(name.endswith((".safetensors", ".bin")) for name in chosen):
        where = f", subfolder {need.subfolder}" if need.subfolder else ""
        raise NotThereError(
            f"{need.kind} {need.name!r}{where}: it has no weights that are loaded here (as safetensors); see "
            f"https://huggingface.co/{need.name}/tree/main"
        )
    return chosen


def _of_encoders(names: Sequence[str], encoders: Sequence[NeedKind]) -> list[str]:
    """The files that `repagen.encoders` looks for."""
    described = {file for kind in encoders for file in _ENCODER_FILES[kind]}
    for patterns in WEIGHT_FILES:
        weights = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
        if weights:
            return [*(name for name in names if name in described), *weights]
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
    """Find what saved models refer to: encoders, of autoencoders and of texts, and the model an adapter belongs to.

    Args:
        folder: of a model, a pipeline or an adapter.
        why: the key that asks for it.
    """
    for path in sorted([*folder.glob("config.json"), *folder.glob("*/config.json")]):
        content, place = _json(path), f"{why}:{path.relative_to(folder)}"
        if not content.get("encoder_stored"):
            yield from _referred("encoder", content.get("encoder"), f"{place}:encoder")
        if not content.get("encoders_stored") and isinstance(content.get("encoders"), list):
            for index, encoder in enumerate(content["encoders"]):
                yield from _referred("text_encoder", encoder, f"{place}:encoders.{index}")
    if (folder / ADAPTER_FILE).is_file() and (folder / CARD_FILE).is_file():
        from huggingface_hub import ModelCard

        base = ModelCard.load(folder / CARD_FILE).data.get("base_model")
        if isinstance(base, str) and base.count("/") == 1:
            yield Need("model", base, f"{why}:{CARD_FILE}:base_model")


def _referred(kind: NeedKind, encoder: Any, key: str) -> Iterator[Need]:
    """The need of an encoder's description in a config, where it names one."""
    if isinstance(encoder, dict) and encoder.get("name_or_path"):
        name, revision = encoder["name_or_path"], encoder.get("revision")
        yield Need(kind, name, key, revision) if revision else Need("path", name, key)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # loading it will say so
        return {}
    return content if isinstance(content, dict) else {}
