"""WebDataset shards: read where they lie, resumed and divided as any dataset, and named where they are broken."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from repagen.data import CaptionConfig, DataConfig, ImageDataset, StreamBatchSampler, load_batches, open_dataset
from repagen.data import tar_index as tar_index_module
from repagen.data import webdataset as webdataset_module
from repagen.data.tar_index import shard_paths
from repagen.errors import UserError

SEED = 5


def picture(level: int, shape: tuple[int, int] = (10, 8), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", shape, (level,) * 3).save(stream, kind)
    return stream.getvalue()


def write_shard(path: Path, members: Mapping[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards with 5, 4 and 3 samples; level = 10 * number, its caption `caption of NUMBER`."""
    numbers = iter(range(12))
    for shard, count in enumerate((5, 4, 3)):
        members = {}
        for number in (next(numbers) for _ in range(count)):
            members[f"{number:03d}.png"] = picture(10 * number)
            members[f"{number:03d}.txt"] = f"caption of {number}".encode()
            members[f"{number:03d}.embedding.npy"] = b"of no interest"
        write_shard(tmp_path / "shards" / f"part-{shard:02d}.tar", members)
    return tmp_path / "shards"


def opened(path: Path | str, **options: Any) -> ImageDataset:
    captions = CaptionConfig(**options.pop("captions")) if options.get("captions") is not None else None
    index = Path(str(path).partition("{")[0]).parent / "index"
    config = DataConfig(
        kind="webdataset", path=str(path), image_size=8, captions=captions, index_folder=str(index), **options
    )
    dataset = open_dataset(config)
    assert isinstance(dataset, ImageDataset)
    return dataset


def levels(dataset: ImageDataset) -> list[int]:
    return [round(float(dataset[index]["image"].mean()) * 25.5) for index in range(len(dataset))]


def test_samples_of_all_shards_in_order(shards: Path) -> None:
    dataset = opened(shards, captions={})
    assert levels(dataset) == list(range(12)) and dataset.num_classes == 0
    assert [dataset[index]["caption"] for index in (0, 5, 11)] == ["caption of 0", "caption of 5", "caption of 11"]
    assert dataset.describe(9) == f"009.png of {shards / 'part-02.tar'}"
    assert "caption" not in opened(shards)[0]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("part-01.tar", [5, 6, 7, 8]),
        ("part-{00..01}.tar", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("part-0{2,0}.tar", [9, 10, 11, 0, 1, 2, 3, 4]),
        ("{part,part}-0{0..0}.tar::", None),
    ],
)
def test_shards_are_named_by_patterns(shards: Path, pattern: str, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(UserError, match=r"part-00\.tar is named twice"):
            opened(f"{shards}/{pattern}{shards}/part-01.tar")
        return
    assert levels(opened(f"{shards}/{pattern}")) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("shards/part-{00..04}.tar", r"2 of 5 shards are not there, first .*part-03\.tar, .*part-04\.tar"),
        ("index", "shards are not there"),
        ("https://host/shard-{0..3}.tar", r"https://host/shard-0\.tar given; shards are read from folders"),
        ("pipe:curl x", "pipe:curl x given"),
        ("shards/part-{4..1}.tar", r"\{4\.\.1\}"),
        ("shards/part-{0..99999999}.tar", "allowed: up to"),
    ],
)
def test_shards_that_are_not_there_are_named(
    shards: Path, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    with pytest.raises(UserError, match=message):
        shard_paths(path)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        opened(tmp_path)


def test_json_labels_and_folders_in_a_shard(tmp_path: Path) -> None:
    two = json.dumps({"url": "x", "caption": "short", "long": ["a", "b"]}).encode()
    members = {
        "./a/1.JPG": picture(10, kind="JPEG"), "./a/1.json": two, "./a/1.cls": b"2\n",
        "b/1.v2.png": b"another part", "b/1.webp": picture(20, kind="WEBP"), "b/1.txt": b"x\ny", "b/1.cls": b"0",
        "b/._1.png": b"of the system",
    }  # fmt: skip
    path = write_shard(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)
    dataset = opened(path, captions={})
    assert dataset.class_names == ["0", "1", "2"] and dataset.labels.tolist() == [2, 0]
    assert dataset.captions(0).texts == ("short",) and dataset.captions(1).texts == ("x", "y")
    by_column = opened(path, captions={"columns": {"caption": 1, "long": 2}, "missing": "drop"})
    assert len(by_column) == 1 and by_column.captions(0).weights == (1.0, 1.0, 1.0)
    assert by_column.labels.tolist() == [2]


def test_labels_are_names_or_refused_where_some_are_missing(tmp_path: Path) -> None:
    members = {"a.png": picture(1), "a.cls": b"dog", "b.png": picture(2), "b.cls": "käfer".encode()}
    assert opened(write_shard(tmp_path / "a.tar", members)).class_names == ["dog", "käfer"]
    members["c.png"] = picture(3)
    with pytest.raises(UserError, match=r"c\.png of .*b\.tar has no \.cls"):
        opened(write_shard(tmp_path / "b.tar", members))


def test_missing_captions_name_member_and_shard(shards: Path) -> None:
    members = {"x.png": picture(200), "y.png": picture(210), "y.json": b'{"caption": ""}'}
    write_shard(shards / "part-03.tar", members)
    with pytest.raises(UserError, match=r"2 of 14 images .*: x\.png of .*part-03\.tar, y\.png of .*part-03\.tar;"):
        opened(shards, captions={})
    assert len(opened(shards, captions={"missing": "drop"})) == 12
    assert opened(shards, captions={"missing": "empty"})[13]["caption"] == ""


# --- the index -----------------------------------------------------------------------------------------------------


def test_a_shard_is_gone_through_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(shards, captions={})
    fingerprint = first.fingerprint()
    monkeypatch.setattr(tar_index_module.tarfile, "open", None)
    again = opened(shards, captions={})
    assert levels(again) == levels(first) and again.fingerprint() == fingerprint
    assert again.captions(7) == first.captions(7) and again.state() == first.state()
    monkeypatch.undo()
    for index in (shards.parent / "index").iterdir():
        content = index.read_bytes()
        index.unlink()
        index.write_bytes(content[:20])
    assert opened(shards, captions={}).fingerprint() == fingerprint


def test_a_changed_shard_is_gone_through_again(shards: Path) -> None:
    first = opened(shards)
    fingerprint, state = first.fingerprint(), first.state()
    write_shard(shards / "part-02.tar", {"new.png": picture(250)})
    changed = opened(shards)
    assert levels(changed)[9:] == [25] and changed.fingerprint() != fingerprint and changed.state() != state


def test_images_are_read_from_their_place_alone(shards: Path) -> None:
    """Every byte of the shard but those of one image may be lost."""
    dataset = opened(shards)
    path = shards / "part-01.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("006.png")
    content = bytearray(path.stat().st_size)
    content[member.offset_data : member.offset_data + member.size] = path.read_bytes()[
        member.offset_data : member.offset_data + member.size
    ]
    path.write_bytes(content)
    assert levels_of(dataset, 6) == 6


def levels_of(dataset: ImageDataset, index: int) -> int:
    return round(float(dataset[index]["image"].mean()) * 25.5)


def test_open_files_are_bounded(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_module, "MAX_OPEN_SHARDS", 2)
    dataset = opened(shards)
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 5, 9, 0, 9, 5):
        assert levels_of(dataset, index) == index
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    copy = pickle.loads(pickle.dumps(dataset))  # as for workers that are spawned
    assert levels_of(copy, 9) == 9
    del copy, dataset
    assert len(os.listdir("/proc/self/fd")) <= before


# --- broken shards -------------------------------------------------------------------------------------------------


def test_a_shard_cut_anywhere_is_named(shards: Path) -> None:
    path = shards / "part-01.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for length in [0, 1, 511, 512, 700, *range(1024, end + 1, 512), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"shard .*part-01\.tar is damaged or truncated at") as refusal:
            opened(shards)
        if length > 1024:
            assert "at member 0" in str(refusal.value)
    path.write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(opened(shards)) == 12


def test_a_damaged_header_and_a_second_archive_are_named(shards: Path) -> None:
    path = shards / "part-01.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    path.write_bytes(whole[: offset + 3] + b"\x00" + whole[offset + 4 :])
    with pytest.raises(UserError, match=r"part-01\.tar .* at member 006\.embedding\.npy: the next header is damaged"):
        opened(shards)
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match=r"at member 008\.embedding\.npy: something else"):
        opened(shards)


def test_what_is_no_plain_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(UserError, match=r"a\.tar is damaged .*must be unpacked"):
        opened(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x", "a.jpg": b"x"}, r"member a\.jpg is a second image of one sample"),
        ({"a.png": b"x", "a.txt": b"x", "a.TXT": b"y"}, r"member a\.TXT is a second \.txt"),
        ({"a.png": b"x", "a.txt": bytes(2**20 + 1)}, r"member a\.txt has 1048577 bytes"),
        ({"a.png": b"x", "b.txt": b"no image"}, r"1 samples have no image .*first b of .*s\.tar"),
        ({"a.png": b"x", "b.gif": b"GIF89a"}, r"first b of .*s\.tar"),
        ({"a.png": b"x", "b.png": b""}, r"first b\.png of .*s\.tar"),
        ({"a.png": b"x", "a.json": b"{"}, r"a\.png of .*s\.tar, its \.json: no readable JSON"),
        ({"a.png": b"x", "a.txt": b"\xff"}, r"a\.png of .*s\.tar, its \.txt: not a text in UTF-8"),
        ({"readme.md": b""}, "hold no images"),
    ],
)
def test_members_that_do_not_fit_are_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(write_shard(tmp_path / "s.tar", members), captions={"missing": "empty"})


def test_bad_images_follow_the_rule(shards: Path) -> None:
    write_shard(shards / "part-03.tar", {"x.png": picture(250)[:50], "x.txt": b"x", "y.txt": b"y"})
    with pytest.raises(UserError, match=r"1 samples have no image .*first y of .*part-03\.tar"):
        opened(shards)
    with pytest.raises(UserError, match=r"bad image x\.png of .*part-03\.tar: .*so far 2"):
        opened(shards, max_bad_images=1)[12]
    replaced = opened(shards, max_bad_images=2, captions={})[12]
    assert replaced["index"] < 12 and replaced["caption"] == f"caption of {replaced['index']}"


def test_a_shard_that_is_cut_while_it_is_read_has_bad_images(shards: Path) -> None:
    dataset = opened(shards, max_bad_images=3)
    os.truncate(shards / "part-02.tar", 520)
    assert dataset[9]["index"] != 9 and dataset.bad_indices[-1] == 9
    strict = opened(shards / "part-01.tar")
    os.truncate(shards / "part-01.tar", 520)
    with pytest.raises(UserError, match=r"005\.png of .*part-01\.tar: the shard ends within it"):
        strict[0]


# --- order ---------------------------------------------------------------------------------------------------------


def test_workers_and_buckets_change_nothing(tmp_path: Path) -> None:
    shapes = [(20, 20), (30, 20), (20, 30)]
    for shard in range(2):
        members = {f"{n}.png": picture(10 * n, shapes[(n + shard) % 3]) for n in range(7)}
        write_shard(tmp_path / "shards" / f"{shard}.tar", members)
    dataset = opened(tmp_path / "shards", buckets=["1:1", "3:2", "2:3"], bucket_step=2)
    assert dataset.original_sizes()[:8].tolist() == [list(reversed(shapes[n % 3])) for n in (*range(7), 1)]
    sampler = StreamBatchSampler(len(dataset), 2, SEED, num_steps=20, buckets=dataset.buckets)
    batches = list(load_batches(dataset, sampler, SEED))
    assert {tuple(batch["image"].shape[2:]) for batch in batches} == {(8, 8), (6, 10), (10, 6)}
    for one, two in zip(batches, load_batches(dataset, sampler, SEED, num_workers=2), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


LOADER = """
import json, sys
from repagen.data import CaptionConfig, DataConfig, StreamBatchSampler, load_batches, open_dataset

path, index, rank, processes, start, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
config = DataConfig(kind="webdataset", path=path, image_size=8, index_folder=index, captions=CaptionConfig())
dataset = open_dataset(config)
sampler = StreamBatchSampler(
    len(dataset), 4, 5, start_step=start, num_steps=steps, process_index=rank, num_processes=processes
)
for batch in load_batches(dataset, sampler, 5, num_workers=2):
    print(json.dumps([batch["index"].tolist(), batch["caption"], batch["image"].mean((1, 2, 3)).tolist()]), flush=True)
"""


def loader(shards: Path, rank: int, processes: int, start: int, steps: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", LOADER, str(shards), str(shards.parent / "index")]
    numbers = [str(number) for number in (rank, processes, start, steps)]
    return subprocess.Popen([*words, *numbers], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.slow
def test_processes_share_the_samples_and_a_killed_one_goes_on(shards: Path) -> None:
    """Two processes with two workers each, both killed in the middle of a shard and an epoch, and started again."""
    steps = 12  # of 4 samples; an epoch has 12 samples
    expected = list(StreamBatchSampler(12, 4, SEED, num_steps=steps))
    whole = [[index for index, _ in batch] for batch in expected]
    found: list[list[list[Any]]] = [[], []]
    running = [loader(shards, rank, 2, 0, 1000) for rank in (0, 1)]
    for rank, process in enumerate(running):
        assert process.stdout is not None
        found[rank] = [json.loads(process.stdout.readline()) for _ in range(5)]
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for rank, process in enumerate([loader(shards, rank, 2, 5, steps - 5) for rank in (0, 1)]):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        found[rank] += [json.loads(line) for line in output.splitlines()]
    for step in range(steps):
        mine, others = found[0][step], found[1][step]
        assert mine[0] + others[0] == whole[step]
        assert mine[1] == [f"caption of {index}" for index in mine[0]]
        assert mine[2] == pytest.approx([10 * index / 255 for index in mine[0]])
    for epoch in range(4):
        parts = [{index for batch in found[rank][3 * epoch : 3 * epoch + 3] for index in batch[0]} for rank in (0, 1)]
        assert not parts[0] & parts[1] and parts[0] | parts[1] == set(range(12))
