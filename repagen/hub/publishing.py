"""Publishing a saved folder on the Hub, in one commit; each way of failing is one line with its cause.

Nothing is written into the folder: what differs on the Hub (the name in the card, paths of this machine in configs) is
changed on the way. A failed upload leaves the folder as it was, and the repository too.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repagen.errors import UserError
from repagen.files import TEMPORARY_PREFIX
from repagen.hub.card import (
    CardKind,
    LicenceFact,
    addressed,
    carried_folder,
    render_card,
    without_local_paths,
)
from repagen.hub.fetching import causes, first_line, http_status, is_unreached
from repagen.hub.folder_facts import ADAPTER_FILE, PIPELINE_FILE, carries_code, facts_of_folder, pipeline_class
from repagen.hub.inspection import inspect_upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"

# Weights as diffusers calls them, with their folder and variant: a file, a shard, or a table of shards.
_WEIGHTS = re.compile(
    r"(?P<folder>(?:.*/)?)diffusion_pytorch_model(?:-\d+-of-\d+)?(?:\.(?P<variant>[^./]+?))?(?:-\d+-of-\d+)?"
    r"\.safetensors(?:\.index(?:\.(?P<variant_of_index>[^./]+))?\.json)?"
)
# Nobody misses these.
_UNPUBLISHED = ("__pycache__", ".git", ".cache", ".DS_Store", "run.lock")
_LARGEST_CONFIG_BYTES = 1 << 22
_OFFLINE = "cannot be published while HF_HUB_OFFLINE is set; unset it where there is a network"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


def publish_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    licences: Sequence[LicenceFact] = (),
    subfolder: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a saved pipeline, autoencoder, transformer or adapter in one commit; return the commit's address.

    Where neither the folder nor the repository has a `README.md`, a card is made from the configs. Weights of an
    earlier push that would be loaded in place of this one's are removed by the same commit; other files stay.

    Args:
        folder: as `save_pretrained` or a training program wrote it.
        repo_id: as "org/name"; created if needed.
        private: whether only its owner sees the repository; None leaves it to the Hub. An open repository is refused
            where it is True.
        revision: branch to commit to, made from the main one if needed; None is the main branch.
        commit_message: first line of the commit.
        token: of the Hub; None is the one that is logged in.
        licences: of the parts, for a card made here.
        subfolder: place in the repository; no card is written then.
        create_pr: open a pull request instead of committing to the branch.

    Raises:
        UserError: the folder cannot be published, the repository holds a pipeline and the folder none, or one of
            another class, or the other way round, or the Hub refuses or cannot be reached; it names the cause.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    facts = facts_of_folder(folder, licences)
    files = _files_to_publish(folder)
    repo_id = open_repository(repo_id, private=private, revision=None if create_pr else revision, token=token)
    with hub_failures(repo_id):
        api = HfApi(token=token)
        present = set(api.list_repo_files(repo_id, revision=None if create_pr else revision))
        own_code = subfolder is None and carries_code(folder)
        if subfolder is not None:
            files = {f"{subfolder.strip('/')}/{name}": content for name, content in files.items()}
        else:
            _refuse_other_kind(facts.kind.endswith("_to_image"), present, repo_id)
            if PIPELINE_FILE in present:
                index = api.hf_hub_download(repo_id, PIPELINE_FILE, revision=None if create_pr else revision)
                _refuse_another(f"a {facts.class_name}", f"a {pipeline_class(Path(index))}", repo_id)
            files = files if own_code else {**_carried_files(facts.kind), **files}
            if CARD_FILE not in files and CARD_FILE not in present:
                files[CARD_FILE] = render_card(facts).encode()
            if CARD_FILE in files:
                files[CARD_FILE] = addressed(_text(files[CARD_FILE]), repo_id, revision).encode()
        stale = _outdated_weights(present, files)
        if own_code:  # that of an earlier push would be read by nobody but who must decide whether to trust it
            stale |= {name for name in present - files.keys() if name.endswith(".py")}
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, sorted(stale))],
            commit_message=commit_message or f"Upload {'adapter' if facts.kind == 'adapter' else facts.class_name}",
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def open_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Make sure that a repository, and the branch, is there and may be written to; return its whole id.

    Args:
        repo_id, private, revision, token: see `publish_folder`.

    Raises:
        UserError: offline, no token or one that may not write, a wrong name, an open repository that shall be
            private, or the Hub cannot be reached.
    """
    api = _api(repo_id, token)
    with hub_failures(repo_id):
        api.whoami()
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _require_write(api, full_id, private)
        if revision not in (None, "main"):
            api.create_branch(full_id, branch=str(revision), exist_ok=True)
    return full_id


def check_repository(
    repo_id: str, *, pipeline: bool, private: bool | None = None, revision: str | None = None
) -> None:
    """Find out what would keep a folder from being published, without making anything on the Hub.

    Called before a long training. Of a repository that is not there yet, its owner is compared with the account and
    its organisations; a fine-grained token does not say where it may make one.

    Args:
        repo_id: as "org/name", there or not.
        pipeline: whether the folder will hold a pipeline, not a model or adapter.
        private, revision: see `publish_folder`.

    Raises:
        UserError: as `open_repository`; the repository holds a pipeline and the folder will not, or the other way
            round.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    api = _api(repo_id, None)
    with hub_failures(repo_id):
        validate_repo_id(repo_id)
        account = api.whoami()
        try:
            _require_write(api, repo_id, private)
        except RepositoryNotFoundError:
            _require_owner(account, repo_id)
            return
        try:
            present = api.list_repo_files(repo_id, revision=revision)
        except RevisionNotFoundError:  # made from the main branch then
            present = api.list_repo_files(repo_id)
    _refuse_other_kind(pipeline, set(present), repo_id)


def _api(repo_id: str, token: str | None) -> HfApi:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id}: {_OFFLINE}")
    if token is None and get_token() is None:
        raise UserError(f"{repo_id}: no token for the Hub; {_LOG_IN}")
    return HfApi(token=token)


def _require_write(api: HfApi, repo_id: str, private: bool | None) -> None:
    api.auth_check(repo_id, write=True)
    if private and not api.model_info(repo_id).private:
        raise UserError(
            f"{repo_id}: is open to everybody already, but shall be private; make it private in its settings on "
            "the Hub, or choose another name"
        )


def _require_owner(account: Mapping[str, Any], repo_id: str) -> None:
    """Refuse a new repository that an account may not make."""
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(f"{repo_id}: the token may only read; {_LOG_IN}")
    owners = [account["name"], *(one["name"] for one in account.get("orgs", ()) if one.get("roleInOrg") != "read")]
    if role == "write" and repo_id.split("/")[0] not in owners:
        raise UserError(
            f"{repo_id}: there is no such repository, and the token may make one only under {', '.join(owners)}; "
            "check the name, or publish under one of these"
        )


@contextmanager
def hub_failures(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises over writing to a repository into one line; other errors pass.

    Raises:
        UserError: naming the repository, the cause and what to do about it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(filter(None, map(_reason, causes(error))), None)
        if reason is None:
            raise
        raise UserError(f"{repo_id}: {reason}") from error


def _reason(error: BaseException) -> str | None:
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    said = first_line(error, 300)
    if isinstance(error, HFValidationError):
        return f"no name for a repository ({said}); give it as org/name"
    if isinstance(error, OfflineModeIsEnabled):
        return _OFFLINE
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token for the Hub; {_LOG_IN}"
    status = http_status(error)
    if status is not None:
        advice = {
            401: f"the token is not valid; {_LOG_IN}",
            403: "the token may not write there; give it the right to, or publish under a name of your own",
            404: "there is no such repository or organisation, or the token may not see it; check the name",
            429: "too many requests; try again later",
        }.get(status, "try again later" if status >= 500 else f"it says: {_server_message(error, said)}")
        return f"the Hub answered {status}; {advice}"
    if is_unreached(error):
        return f"the Hub cannot be reached ({type(error).__name__}: {said}); check the network and try again"
    return None


def _server_message(error: BaseException, otherwise: str) -> str:
    return (getattr(error, "server_message", None) or otherwise).splitlines()[0][:300]


def _refuse_other_kind(pipeline: bool, present: set[str], repo_id: str) -> None:
    """A pipeline and a model in one place would be read as a mixture of both, or the wrong one of them."""
    if present & {PIPELINE_FILE, "config.json", ADAPTER_FILE}:
        names = {True: "a pipeline", False: "a model or adapter"}
        _refuse_another(names[pipeline], names[PIPELINE_FILE in present], repo_id)


def _refuse_another(given: str, there: str, repo_id: str) -> None:
    """Parts of what is there that the given has not, and its card, would stay."""
    if there != given:
        raise UserError(
            f"{repo_id}: holds {there} already, but {given} shall be published there; choose another name, or a "
            "place inside it by push_to_hub(..., subfolder=...)"
        )


def _outdated_weights(present: set[str], files: Iterable[str]) -> set[str]:
    """Weights of the same component and variant as pushed ones: diffusers would prefer an old table of shards."""
    pushed = {_component_and_variant(name) for name in files} - {None}
    return {name for name in present.difference(files) if _component_and_variant(name) in pushed}


def _component_and_variant(name: str) -> tuple[str, str] | None:
    found = _WEIGHTS.fullmatch(name)
    return (found["folder"], found["variant"] or found["variant_of_index"] or "") if found else None


def _files_to_publish(folder: Path) -> dict[str, str | bytes]:
    """Name in the repository => path, or content where it differs from the file; hidden files are left out."""
    found: dict[str, str | bytes] = {}
    left_out: set[str] = set()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part in _UNPUBLISHED or part.startswith(TEMPORARY_PREFIX) for part in parts):
            continue
        if any(part.startswith(".") for part in parts):
            left_out.add("/".join(parts))
            continue
        inspect_upload(path, folder, "push")
        if not path.is_file():
            continue
        changed = _published_json(path) if path.suffix == ".json" else None
        found["/".join(parts)] = str(path) if changed is None else changed
    if left_out:
        logger.warning("%s: hidden files are not published: %s", folder, ", ".join(sorted(left_out)))
    return found


def _published_json(path: Path) -> bytes | None:
    """A config without paths of this machine; None where it has none and goes as it is."""
    if not (path.name.endswith("config.json") or path.name in ("model_index.json", "training.json")):
        return None
    if path.stat().st_size > _LARGEST_CONFIG_BYTES:
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    cleaned = without_local_paths(content)
    if cleaned == content:
        return None
    logger.info("%s: paths of this machine are cut to their last part in what is published", path)
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _carried_files(kind: CardKind) -> dict[str, str | bytes]:
    """Scripts that a repository of a kind carries beside weights and card."""
    return {path.name: str(path) for path in sorted(carried_folder(kind).glob("*.py"))}


def _text(content: str | bytes) -> str:
    return content.decode() if isinstance(content, bytes) else Path(content).read_text(encoding="utf-8")
