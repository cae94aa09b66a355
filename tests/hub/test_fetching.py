"""Fetching at one commit: what is asked, what is kept, and the line for each failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from folders import folder_bytes
from hub_stand_in import COMMIT, StandInHub, write_model
from huggingface_hub import constants

from repagen.errors import UserError
from repagen.hub.fetching import fetch_snapshot, resolve_commit

WEIGHTS = "part/weights.safetensors"
LARGE = b"\1" * 12_000_000  # more than huggingface_hub reads before it writes


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and "org/model" in message
    return message


def nothing_half(cache: Path) -> bool:
    """Whether the cache has no file that was begun only, and no blob of another size than a whole one."""
    return not list(cache.rglob("*.incomplete")) and not list(cache.glob("*/blobs/*"))


# --- one commit ------------------------------------------------------------------------------------------------------


def test_branch_tag_and_commit_give_the_commit(hub: StandInHub, folder: Path) -> None:
    repository = hub.add("org/model", folder, COMMIT)
    repository.refs["v1"] = COMMIT
    assert resolve_commit("org/model") == resolve_commit("org/model", "v1") == COMMIT
    asked = len(hub.requests)
    assert resolve_commit("org/model", COMMIT) == COMMIT
    assert len(hub.requests) == asked == 2


def test_a_snapshot_is_whole_and_named_by_its_commit(hub: StandInHub, folder: Path, cache: Path) -> None:
    hub.add("org/model", folder, COMMIT)
    found = fetch_snapshot("org/model", revision=COMMIT)
    assert found.name == COMMIT and found.is_relative_to(cache)
    assert folder_bytes(found) == folder_bytes(folder)
    asked = len(hub.requests)
    assert fetch_snapshot("org/model", revision=COMMIT) == found
    assert len(hub.requests) == asked, "a commit in the cache needs no request"


def test_only_what_is_asked_for_comes(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder)
    found = fetch_snapshot("org/model", revision=None, patterns=["*.json"])
    assert set(folder_bytes(found)) == {"config.json"}
    assert not hub.asked("*.safetensors", method=None)


def test_a_branch_that_moves_between_two_requests(hub: StandInHub, folder: Path, tmp_path: Path) -> None:
    repository = hub.add("org/model", folder)
    first = repository.refs["main"]
    newer = write_model(tmp_path / "newer", "second")
    hub.fault("org/model", "(info)", then=lambda: repository.commit(newer), times=1)
    commit = resolve_commit("org/model")
    assert commit == first != repository.refs["main"]
    assert folder_bytes(fetch_snapshot("org/model", revision=commit)) == folder_bytes(folder)
    assert {request.revision for request in hub.requests if request.path != "(info)"} == {first}


def test_another_cache_and_a_fetch_anew(hub: StandInHub, folder: Path, tmp_path: Path) -> None:
    hub.add("org/model", folder, COMMIT)
    found = fetch_snapshot("org/model", revision=COMMIT, cache_dir=tmp_path / "elsewhere")
    assert found.is_relative_to(tmp_path / "elsewhere")
    (found / WEIGHTS).resolve().write_bytes(b"rotten")
    assert (found / WEIGHTS).read_bytes() == b"rotten"
    fetch_snapshot("org/model", revision=COMMIT, cache_dir=tmp_path / "elsewhere", force_download=True)
    assert folder_bytes(found) == folder_bytes(folder)


def test_a_fetch_anew_without_the_hub_is_refused(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder, COMMIT)
    assert "leave one of them out" in refusal(
        fetch_snapshot, "org/model", revision=COMMIT, force_download=True, local_files_only=True
    )


# --- private and gated repositories, and names that are wrong --------------------------------------------------------


def test_a_private_repository_needs_its_token(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder, COMMIT, token="hf_secret")
    message = refusal(resolve_commit, "org/model")
    assert "no such model on the Hub" in message and "hf auth login" in message
    assert resolve_commit("org/model", token="hf_secret") == COMMIT
    found = fetch_snapshot("org/model", revision=COMMIT, token="hf_secret")
    assert folder_bytes(found) == folder_bytes(folder)


def test_a_token_is_in_no_message(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder, token="hf_secret")
    hub.fault("org/model", "(tree)", status=403)
    assert "hf_secret" not in refusal(fetch_snapshot, "org/model", revision=None, token="hf_secret")


@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_a_gated_repository_says_where_to_ask(hub: StandInHub, folder: Path, token: str | None, cache: Path) -> None:
    hub.add("org/model", folder, COMMIT, gated=True)
    message = refusal(fetch_snapshot, "org/model", revision=COMMIT, token=token, what="encoder")
    assert message.startswith("encoder 'org/model' at revision")
    assert "accept its licence at https://huggingface.co/org/model" in message and "hf auth login" in message
    assert nothing_half(cache)


def test_names_that_are_not_there(hub: StandInHub, folder: Path) -> None:
    hub.add("org/other", folder)
    assert "no such model on the Hub" in refusal(resolve_commit, "org/model")
    assert "neither a folder on this machine nor a Hub id" in refusal(resolve_commit, "deep/org/model")
    hub.add("org/model", folder)
    message = refusal(resolve_commit, "org/model", "v9")
    assert "no such revision" in message and "'v9'" in message and "/tree/main" in message
    assert "no such revision" in refusal(fetch_snapshot, "org/model", revision="f" * 40)


# --- answers that are refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["(info)", "(tree)", WEIGHTS])
@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, "hf auth login"), (403, "hf auth login"), (429, "too many requests"), (500, "later"), (503, "later")],
)
def test_an_answer_with_an_error(
    hub: StandInHub, folder: Path, path: str, status: int, expected: str, waits: list[float], cache: Path
) -> None:
    hub.add("org/model", folder)
    hub.fault("org/model", path, status=status)
    message = refusal(fetch_snapshot, "org/model", revision=None, patterns=["*.safetensors"])
    assert f"the Hub answered {status}" in message and expected in message
    assert len(hub.asked(path, method=None)) <= 8 and sum(waits) < 60, "tries are bounded"
    assert nothing_half(cache)


def test_too_many_requests_pass_by(hub: StandInHub, folder: Path, waits: list[float]) -> None:
    hub.add("org/model", folder)
    hub.fault("org/model", WEIGHTS, method="GET", status=429, headers={"Retry-After": "7"}, times=2)
    assert folder_bytes(fetch_snapshot("org/model", revision=None)) == folder_bytes(folder)
    assert waits == [8, 8], "as long as the Hub asks for, and one second"


def test_too_many_requests_for_an_hour_are_not_waited_for(hub: StandInHub, folder: Path, waits: list[float]) -> None:
    hub.add("org/model", folder)
    hub.fault("org/model", WEIGHTS, method="GET", status=429, headers={"Retry-After": "3600"})
    assert "the Hub answered 429" in refusal(fetch_snapshot, "org/model", revision=None)
    assert waits == []


def test_too_many_requests_fall_back_on_what_was_seen(
    hub: StandInHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("org/model", folder, COMMIT)
    hub.fault("org/model", "(info)", status=429, times=1)
    assert "too many requests" in refusal(resolve_commit, "org/model")
    assert resolve_commit("org/model") == COMMIT
    hub.fault("org/model", "(info)", status=429)
    assert resolve_commit("org/model") == COMMIT
    assert "last seen" in caplog.text


def test_a_damaged_cache_names_no_commit(hub: StandInHub, folder: Path, cache: Path) -> None:
    hub.add("org/model", folder, COMMIT)
    fetch_snapshot("org/model", revision=None)
    (cache / "models--org--model" / "refs" / "main").write_text("")
    assert "hf cache rm model/org/model" in refusal(resolve_commit, "org/model", local_files_only=True)


def test_a_resolved_revision_is_shown_by_its_commit(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder, COMMIT)
    resolved = huggingface_hub.resolve_revision("org/model")
    hub.fault("org/model", "*", status=500)
    message = refusal(fetch_snapshot, "org/model", revision=resolved)
    assert f"at revision '{COMMIT}'" in message and "ResolvedRevision" not in message


def test_a_file_of_the_list_that_is_not_there(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder)
    hub.fault("org/model", WEIGHTS, status=404, code="EntryNotFound")
    assert "has not all files" in refusal(fetch_snapshot, "org/model", revision=None)


# --- silence, cuts and lies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["(info)", "(tree)", WEIGHTS])
def test_a_hub_that_hangs(hub: StandInHub, folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.add("org/model", folder)
    hub.fault("org/model", path, hang=True)
    start = time.monotonic()
    assert "no answer within 0.1 s" in refusal(fetch_snapshot, "org/model", revision=None)
    assert time.monotonic() - start < 5


def test_a_connection_that_is_refused(hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    message = refusal(resolve_commit, "org/model")
    assert "the Hub is out of reach" in message and "hf download org/model" in message


def test_a_body_that_breaks_off_is_gone_on_with(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder)
    hub.fault("org/model", WEIGHTS, method="GET", cut=30_000, times=2)
    assert folder_bytes(fetch_snapshot("org/model", revision=None)) == folder_bytes(folder)
    assert len(hub.asked(WEIGHTS)) == 3


def test_a_body_that_always_breaks_off_is_given_up(hub: StandInHub, folder: Path, cache: Path) -> None:
    (folder / WEIGHTS).write_bytes(LARGE)
    hub.add("org/model", folder)
    hub.fault("org/model", WEIGHTS, method="GET", cut=11_000_000, resumes=False)
    message = refusal(fetch_snapshot, "org/model", revision=None, patterns=["*.safetensors"])
    assert "the download broke off" in message and "nothing half is kept" in message
    assert len(hub.asked(WEIGHTS)) <= 7
    assert nothing_half(cache)
    hub.faults.clear()
    assert folder_bytes(fetch_snapshot("org/model", revision=None)) == folder_bytes(folder)


def test_a_file_of_another_size(hub: StandInHub, folder: Path, cache: Path) -> None:
    hub.add("org/model", folder)
    hub.fault("org/model", WEIGHTS, method="GET", body=b"other")
    assert "another size" in refusal(fetch_snapshot, "org/model", revision=None, patterns=["*.safetensors"])
    assert nothing_half(cache)
    hub.faults.clear()
    assert folder_bytes(fetch_snapshot("org/model", revision=None)) == folder_bytes(folder)


def test_limits_end_with_the_call(hub: StandInHub, folder: Path) -> None:
    hub.add("org/model", folder)
    before = {kind: list(hooks) for kind, hooks in huggingface_hub.get_session().event_hooks.items()}
    fetch_snapshot("org/model", revision=None)
    with pytest.raises(UserError):
        fetch_snapshot("org/missing", revision=None)
    assert huggingface_hub.get_session().event_hooks == before


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.filterwarnings("ignore:Not enough free disk space:UserWarning")
def test_a_disk_that_is_really_full(hub: StandInHub, folder: Path, small_disk: Path, tmp_path: Path) -> None:
    hub.add("org/model", folder)
    message = refusal(fetch_snapshot, "org/model", revision=None, cache_dir=small_disk)
    assert "disk of the Hub's cache is full" in message and "HF_HOME" in message
    assert not list(small_disk.rglob("*.safetensors")) and not list(small_disk.rglob("*.incomplete"))


def test_a_disk_that_gets_full(hub: StandInHub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where nothing can be mounted: the last step fails with the error that the system gives."""
    hub.add("org/model", folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download._chmod_and_move", full)
        message = refusal(fetch_snapshot, "org/model", revision=None, patterns=["*.safetensors"])
    assert "disk of the Hub's cache is full" in message
    assert nothing_half(cache)
    assert folder_bytes(fetch_snapshot("org/model", revision=None)) == folder_bytes(folder)


def test_a_cache_that_cannot_be_written(
    hub: StandInHub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the error that the system gives: the tests may run as root, whom no mode of a folder stops."""
    hub.add("org/model", folder)

    def closed(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system", "there/blobs")

    monkeypatch.setattr("os.makedirs", closed)
    message = refusal(fetch_snapshot, "org/model", revision=None)
    assert "cache cannot be written (there/blobs)" in message and "HF_HOME" in message


# --- offline ---------------------------------------------------------------------------------------------------------


def test_offline_with_and_without_the_cache(
    hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    hub.add("org/model", folder, COMMIT)
    message = refusal(resolve_commit, "org/model", local_files_only=True)
    assert "not in the local cache;" in message and "hf download org/model" in message
    found = fetch_snapshot("org/model", revision=None, patterns=["config.json"])
    hub.requests.clear()
    for options in ({"local_files_only": True}, {}):
        if not options:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve_commit("org/model", **options) == COMMIT
        assert fetch_snapshot("org/model", revision=None, patterns=["config.json"], **options) == found
        message = refusal(fetch_snapshot, "org/model", revision=COMMIT, **options)
        assert f"in the local cache without {WEIGHTS}" in message, "the file that is missing is named"
        assert "not in the local cache" in refusal(resolve_commit, "org/model", "v2", **options)
    assert hub.requests == []


# --- killed in the middle --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_in_the_middle_and_again(hub: StandInHub, folder: Path, cache: Path) -> None:
    (folder / WEIGHTS).write_bytes(LARGE)
    hub.add("org/model", folder)
    hub.fault("org/model", WEIGHTS, method="GET", cut=11_000_000, stall=True, times=1)
    program = "from repagen.hub.fetching import fetch_snapshot; fetch_snapshot('org/model', revision=None)"
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    begun: list[Path] = []
    while not begun and process.poll() is None:
        begun = [path for path in cache.rglob("*.incomplete") if path.stat().st_size > 0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert begun and "weights.safetensors" not in {path.name for path in cache.rglob("*.safetensors")}
    assert folder_bytes(fetch_snapshot("org/model", revision=None)) == folder_bytes(folder)
