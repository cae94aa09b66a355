"""Files of a Hub repository at one commit, and each way of not getting them as one line with its cause.

A branch may move between two requests, and what was looked at would not be what is loaded (CVE-2026-45804). So a
revision is resolved once, by `resolve_commit`, and everything is fetched at that commit. Downloads, their retries and
the cache are huggingface_hub's; it puts a file into the cache in one rename, whole.
"""

from __future__ import annotations

import errno
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repagen.errors import UserError
from repagen.hub.places import fetch_once

logger = logging.getLogger(__name__)

_STARTS = 5  # of one file from its beginning; huggingface_hub counts no try that brought any byte
_LONGEST_WAIT = 300  # seconds; the Hub counts requests over five minutes
_LOG_IN = "log in with `hf auth login` (or set HF_TOKEN), or pass a local folder that holds the files"
_LATER = "try again later, or pass a local folder that holds the files"


class NotThereError(UserError):
    """There is no such thing on the Hub, so that asking again is in vain."""


def resolve_commit(
    repo_id: str,
    revision: str | None = None,
    *,
    what: str = "model",
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
) -> str:
    """Return the commit that a revision of a Hub model means now; where the Hub is out of reach, as last seen here.

    Args:
        repo_id: as "org/name".
        revision: branch, tag or commit; None is the main branch. A whole commit hash needs no request.
        what: what the repository is to the user, for messages.
        token: of the Hub; None is the one that is logged in.
        local_files_only: ask the cache only.
        cache_dir: the Hub's cache, where it is not the usual one.

    Returns:
        40 hexadecimal digits.

    Raises:
        UserError: the repository or the revision is unknown, closed or out of reach.
    """
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import HfHubHTTPError

    asking: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    with naming_hub_errors(repo_id, revision, what=what, local_files_only=local_files_only):
        try:
            found = resolve_revision(repo_id, local_files_only=local_files_only, **asking).resolved
        except HfHubHTTPError as error:
            if http_status(error) != 429:
                raise
            try:
                found = resolve_revision(repo_id, local_files_only=True, **asking).resolved
            except Exception:  # not seen either: the Hub's answer is the reason
                raise error from None
            logger.warning(
                "%s %r: too many requests to the Hub; taking the commit last seen, %s", what, repo_id, found
            )
    if not re.fullmatch("[0-9a-f]{40}", found):
        raise UserError(
            f"{what} {repo_id!r}: the local cache is damaged, {revision or 'main'} is {found!r} there and no commit; "
            f"remove it with `hf cache rm model/{repo_id}` and fetch it again"
        )
    return found


def fetch_snapshot(
    repo_id: str,
    *,
    revision: str | None,
    patterns: Sequence[str] | None = None,
    what: str = "model",
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
) -> Path:
    """Download files of a Hub model at one commit, or find them in the cache; return the folder, named by the commit.

    Args:
        repo_id: as "org/name".
        revision: branch, tag or commit; see `resolve_commit`.
        patterns: of the files, with `*`; None is all files.
        what: what the repository is to the user, for messages.
        token: of the Hub; None is the one that is logged in.
        local_files_only: ask the cache only.
        cache_dir: the Hub's cache, where it is not the usual one.
        force_download: fetch anew what is in the cache.

    Raises:
        UserError: naming the repository, the cause and what to do about it.
    """
    from huggingface_hub import is_offline_mode, snapshot_download

    local_files_only = local_files_only or is_offline_mode()
    if force_download and local_files_only:
        raise UserError(
            f"{what} {repo_id!r}: force_download asks the Hub, which local_files_only (or HF_HUB_OFFLINE) forbids; "
            "leave one of them out"
        )
    with naming_hub_errors(repo_id, revision, what=what, local_files_only=local_files_only):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=None if patterns is None else list(patterns),
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
        )
    return Path(folder)


def complete_snapshot(folder: Path, what: str) -> None:
    """Download a folder that is missing in a snapshot of the Hub's cache, at the snapshot's commit.

    Args:
        folder: where it must be. Outside the cache nothing happens.
        what: what the folder is to the repository, for messages.

    Raises:
        UserError: as `fetch_snapshot`.
    """
    for parent in folder.parents:
        if parent.parent.name == "snapshots" and parent.parents[1].name.startswith("models--"):
            repo_id = parent.parents[1].name.removeprefix("models--").replace("--", "/")
            pattern = (folder.relative_to(parent) / "*").as_posix()
            fetch_snapshot(repo_id, revision=parent.name, patterns=[pattern], what=what, cache_dir=parent.parents[2])
            return


@contextmanager
def naming_hub_errors(
    repo_id: str, revision: str | None = None, *, what: str = "model", local_files_only: bool = False
) -> Iterator[None]:
    """Bound the waiting of huggingface_hub (and of diffusers over it), and turn what it raises into one line.

    Errors that are not about the Hub, the network or the cache pass.

    Raises:
        UserError: naming the repository, the cause and what to do about it; `NotThereError` where the Hub knows no
            such repository or revision.
    """
    revision = getattr(revision, "resolved", revision)  # diffusers hands on what huggingface_hub has resolved
    try:
        with _limits():
            yield
    except UserError:
        raise
    except Exception as error:
        reason = next(filter(None, (_reason(link, repo_id) for link in causes(error))), None)
        reason = reason or _not_cached(error, repo_id, revision, local_files_only)
        if reason is None:
            raise
        at = f" at revision {revision!r}" if revision else ""
        kind = NotThereError if any(map(_says_not_there, causes(error))) else UserError
        raise kind(f"{what} {repo_id!r}{at}: {reason}") from error


def _says_not_there(error: BaseException) -> bool:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unknown = isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError))
    return unknown and not isinstance(error, GatedRepoError)


def causes(error: BaseException | None, *, with_contexts: bool = False) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if with_contexts else None)


def _reason(error: BaseException, repo_id: str) -> str | None:
    """What an error says about the Hub, or None where it is about something else."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{repo_id}"
    if isinstance(error, GatedRepoError):
        return f"access is gated; accept its licence at {page} and {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such folder here and no such model on the Hub; check the name, or {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub repository has no such revision; its branches and tags are at {page}/tree/main"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the Hub repository has not all files that it should have ({first_line(error)}); see {page}/tree/main"
    if isinstance(error, HFValidationError):
        return "neither a folder on this machine nor a Hub id such as 'org/name'"
    status = http_status(error)
    if status is not None:
        advice = _LOG_IN if status in (401, 403) else _LATER
        too_many = ", too many requests" if status == 429 else ""
        return f"the Hub answered {status}{too_many} ({page}); {advice}"
    return _reason_of_transfer(error) or _reason_of_disk(error)


def _reason_of_transfer(error: BaseException) -> str | None:
    names = _kinds(error)
    broken = f"nothing half is kept; {_LATER}"
    if "TimeoutException" in names:
        return f"the Hub gave no answer within {_time_limit():g} s (HF_HUB_DOWNLOAD_TIMEOUT); {_LATER}"
    if "ProxyError" in names:
        return f"the proxy did not let the request through ({first_line(error)}); check HTTPS_PROXY"
    if isinstance(error, _CutOffError) or "RemoteProtocolError" in names or "ReadError" in names:
        return f"the download broke off ({first_line(error)}); {broken}"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"a file came with another size than the Hub gives for it ({first_line(error)}); {broken}"
    return None


def _reason_of_disk(error: BaseException) -> str | None:
    if not isinstance(error, OSError):
        return None
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the Hub's cache is full{place}; make room (`hf cache ls`), or set HF_HOME to another disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"the Hub's cache cannot be written{place}; set HF_HOME (or cache_dir) to a folder of your own"
    return None


def _not_cached(error: BaseException, repo_id: str, revision: str | None, local_files_only: bool) -> str | None:
    """The line for files that are not here while the Hub cannot be asked, or None where that is not the matter."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError, RevisionResolutionError

    links = list(causes(error, with_contexts=True))  # diffusers names no cause for a file that is not here
    if not any(
        is_unreached(link) or isinstance(link, (LocalEntryNotFoundError, RevisionResolutionError)) for link in links
    ):
        return None
    incomplete = next((link for link in links if isinstance(link, IncompleteSnapshotError)), None)
    names = re.search(r"missing \((.+?)\)\. [A-Z]", str(incomplete))
    found = f"in the local cache without {names[1]}" if names else "no such folder here, and not in the local cache"
    return f"{found}{'' if local_files_only else ' and the Hub is out of reach'}; {fetch_once(repo_id, revision)}"


def is_unreached(error: BaseException) -> bool:
    """Whether an error says that no connection to the Hub came about, or that it broke."""
    return isinstance(error, ConnectionError) or "TransportError" in _kinds(error)


def http_status(error: BaseException) -> int | None:
    """The status of the answer that an error is about, None where it is about none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of an error's message, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:longest]


def _kinds(error: BaseException) -> set[str]:
    # By name: huggingface_hub speaks through httpx or httpx2, by its version.
    return {kind.__name__ for kind in type(error).__mro__}


# --- limits that huggingface_hub does not set ------------------------------------------------------------------------


class _CutOffError(OSError):
    """A download that starts from the beginning again and again."""


@contextmanager
def _limits() -> Iterator[None]:
    """Bound, while it lasts, what huggingface_hub would wait for without end.

    It lists a repository's files without a limit of time and asks six times for a file's facts with a minute for each,
    waits as long as an answer 429 says, and begins a file anew for ever where a server breaks it off and cannot go on
    from the middle.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    starts: Counter[str] = Counter()

    def limit_time(request: Any) -> None:
        longest = _time_limit()
        given = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: min(given.get(kind) or longest, longest) for kind in kinds}

    def limit_tries(response: Any) -> None:
        wait = response.headers.get("Retry-After", "")
        if response.status_code == 429 and wait.isdigit() and int(wait) > _LONGEST_WAIT:
            response.read()
            hf_raise_for_status(response)
        if response.status_code == 200 and response.request.method == "GET":
            starts[str(response.request.url)] += 1
            if starts[str(response.request.url)] > _STARTS:
                raise _CutOffError(f"begun {_STARTS} times, never whole")

    hooks = get_session().event_hooks
    hooks["request"].append(limit_time)
    hooks["response"].append(limit_tries)
    try:
        yield
    finally:
        hooks["request"].remove(limit_time)
        hooks["response"].remove(limit_tries)


def _time_limit() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
