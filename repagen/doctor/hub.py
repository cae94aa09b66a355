"""What is here of the Hub: its cache, a token, encoders, and access to those behind a licence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repagen.doctor.report import Finding, Section, readable_size
from repagen.encoders.families import FAMILIES
from repagen.encoders.files import hub_id, local_weights
from repagen.encoders.text_families import TEXT_FAMILIES
from repagen.errors import UserError, one_line
from repagen.hub.fetching import naming_hub_errors


def hub(encoders: Sequence[str]) -> Section:
    """Check cache, token and encoders.

    Args:
        encoders: Hub ids or folders that must be usable, beside those of the table of families.
    """
    from huggingface_hub import constants, get_token

    offline = "yes, nothing is fetched" if constants.HF_HUB_OFFLINE else "no"
    token = "there is one (not shown)" if get_token() else "none; `hf auth login` stores one"
    known = {"encoders": FAMILIES.values(), "text encoders": TEXT_FAMILIES.values()}
    here = {kind: [row.default_id for row in rows if _is_here(row.default_id)] for kind, rows in known.items()}
    findings = [
        Finding("HF_HUB_OFFLINE", offline, facts={"offline": constants.HF_HUB_OFFLINE}),
        _cache(Path(constants.HF_HUB_CACHE)),
        Finding("token", token, facts={"token": bool(get_token())}),
        *(
            Finding(f"{kind} here", ", ".join(ids) or "none of the families' usual checkpoints", facts={"here": ids})
            for kind, ids in here.items()
        ),
    ]
    gated = [row.default_id for rows in known.values() for row in rows if row.gated and row.default_id not in encoders]
    findings += [_gated(repo_id) for repo_id in gated]
    return Section("Hugging Face Hub", [*findings, *(_wanted(encoder) for encoder in encoders)])


def _cache(folder: Path) -> Finding:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        found = scan_cache_dir(folder)
    except CacheNotFound:
        return Finding("cache", f"{folder}: not made yet", facts={"path": str(folder), "bytes": 0})
    size = found.size_on_disk
    text = f"{folder}: {readable_size(size)} in {len(found.repos)} repositories"
    facts = {"path": str(folder), "bytes": size, "repositories": len(found.repos)}
    broken = [one_line(warning) for warning in found.warnings]
    return Finding("cache", text, "note" if broken else "ok", broken, facts)


def _is_here(encoder: str) -> bool:
    try:
        return local_weights(encoder).is_file()
    except UserError:
        return False


def _refusal(repo_id: str) -> str | None:
    """Why the Hub would not give a repository to whoever is logged in; None where it would."""
    from huggingface_hub import auth_check, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "not asked, HF_HUB_OFFLINE is set"
    try:
        with naming_hub_errors(repo_id):  # for its bounds of time; the cause says what matters here
            auth_check(repo_id)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        if isinstance(cause, GatedRepoError):
            return f"gated; accept its licence at {constants.ENDPOINT}/{repo_id} and log in with `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError):
            return "no such repository, or a private one; check the name, or log in with `hf auth login`"
        if isinstance(cause, HfHubHTTPError):
            return f"the Hub cannot be asked ({one_line(cause)})"
        return f"the Hub is out of reach ({one_line(cause)})"
    return None


def _gated(repo_id: str) -> Finding:
    refusal = _refusal(repo_id)
    if refusal is None:
        return Finding(f"gated {repo_id}", "access granted")
    here = "its files are here; " if _is_here(repo_id) else ""
    return Finding(f"gated {repo_id}", f"{here}{refusal}", "ok" if here else "note")


def _wanted(encoder: str) -> Finding:
    """An encoder that the user named must be here, or to be had."""
    name = f"encoder {encoder}"
    try:
        place = local_weights(encoder)
    except UserError as error:
        absent = str(error)
    else:
        return Finding(name, f"here: {readable_size(place.stat().st_size)} in {place.parent}")
    try:
        repo_id = hub_id(encoder)
    except UserError as error:
        return Finding(name, str(error), "problem")
    refusal = _refusal(repo_id)
    if refusal is None:
        return Finding(name, f"not here, and may be fetched: `hf download {repo_id}`", "note")
    return Finding(name, f"{absent} ({refusal})", "problem")
