"""Aspect buckets: sizes, crops, and an order in which every step holds one size and nothing is lost."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.data import (
    CombinedDataset,
    DataConfig,
    ImageDataset,
    StreamBatchSampler,
    folders,
    indices_of_largest,
    load_batches,
    load_first,
    open_dataset,
    open_image_dataset,
)
from repagen.data import dataset as dataset_module
from repagen.data.buckets import bucket_sizes, nearest_buckets
from repagen.data.images import BadImageError, center_crop, decode_image, random_crop, read_size
from repagen.errors import UserError

RATIOS = ["1:1", "3:2", "2:3", "16:9"]
SHAPES = {
    "square": (20, 20),
    "wide": (30, 20),
    "tall": (20, 31),
    "cinema": (36, 20),
    "near": (22, 21),
}  # width, height


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_ratios_become_sizes_of_about_the_same_area() -> None:
    # 3:2 at 256^2 is 313.5 x 209.02 pixels; 16:9 is 341.3 x 192.
    assert bucket_sizes(RATIOS, 256, 16) == [(256, 256), (208, 320), (320, 208), (192, 336)]
    assert bucket_sizes([[64, 128], "1:1"], 256, 64) == [(64, 128), (256, 256)]
    for height, width in bucket_sizes([f"{w}:{h}" for w, h in ((5, 4), (4, 3), (2, 1), (21, 9), (9, 21))], 512, 8):
        assert height % 8 == width % 8 == 0 and abs(height * width / 512**2 - 1) < 0.02


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([969], r"data\.buckets\.0: 969 given \(YAML reads 16:9 without quotes"),
        (["1:1", "3/2"], r"data\.buckets\.1: '3/2' given; allowed: a ratio in quotes"),
        (["0:1"], r"data\.buckets\.0"),
        ([[16, 24]], r"data\.buckets\.0: \[16, 24\] given; allowed: multiples of data\.bucket_step=16"),
        ([[16, -16]], r"data\.buckets\.0"),
        ([[16, 16, 16]], r"data\.buckets\.0"),
        ([[True, 16]], r"data\.buckets\.0"),
        (["1:1", "100:99"], r"data\.buckets\.1: 100:99 becomes 32x32, of the same proportions as 32x32"),
        ([[16, 32], [32, 64]], r"data\.buckets\.1"),
    ],
)
def test_entries_that_are_no_sizes_are_named(entries: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(path="x", image_size=32, buckets=entries).validate()


def test_images_go_to_the_nearest_proportions() -> None:
    sizes = bucket_sizes(RATIOS, 256, 16)
    images = torch.from_numpy(np.random.default_rng(0).integers(1, 500, (200, 2)))
    for (height, width), found in zip(images.tolist(), nearest_buckets(images, sizes).tolist(), strict=True):
        stretches = [max(width * h / (height * w), height * w / (width * h)) for h, w in sizes]
        assert stretches[found] == min(stretches)
    assert nearest_buckets(torch.tensor([[0, 0]]), sizes).tolist() == [0]  # unreadable


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_head_of_a_file_tells_its_size(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (30, 20)).save(path, **({} if suffix == "bmp" else {"exif": exif}))
    width, height = decode_image(path).size
    assert read_size(path) == read_size(path.read_bytes()) == (height, width)
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(BadImageError):
        read_size(path)


def test_the_head_is_enough(tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 50).save(tmp_path / "a.png")
    assert read_size((tmp_path / "a.png").read_bytes()[:64]) == (200, 300)


# --- crops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (16, 16)])
@pytest.mark.parametrize("original", [(200, 100), (100, 200), (33, 20), (20, 20), (49, 49)])
def test_a_crop_takes_all_of_one_side(size: tuple[int, int], original: tuple[int, int]) -> None:
    """A gradient along x, then along y: the crop spans the whole of the side that is relatively shorter."""
    height, width = size
    ramp = np.linspace(0, 255, original[0])[None].repeat(original[1], 0)
    for axis, extent in ((0, original[0]), (1, original[1])):
        levels = ramp if axis == 0 else np.linspace(0, 255, original[1])[:, None].repeat(original[0], 1)
        image = Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")
        found = np.asarray(center_crop(image, size))[..., 0].astype(float)
        assert found.shape == size
        share = min(1.0, (width / height if axis == 0 else height / width) * original[1 - axis] / extent)
        line = found.mean(axis)
        assert (line[-1] - line[0]) / 255 == pytest.approx(share * (1 - 1 / len(line)), abs=0.05)


def test_a_square_is_cropped_as_before() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 77, 3), dtype=np.uint8))
    assert center_crop(noise, 16).tobytes() == center_crop(noise, (16, 16)).tobytes()
    drawn = [random_crop(noise, size, 24, torch.Generator().manual_seed(1)).tobytes() for size in (16, (16, 16))]
    assert drawn[0] == drawn[1]


# --- order ---------------------------------------------------------------------------------------------------------

GROUPS = torch.tensor(np.random.default_rng(3).permutation([0] * 17 + [2] * 9 + [3] * 2))
BATCH, SEED = 4, 7


def micro_batches(steps: int, buckets: torch.Tensor = GROUPS, **options: int) -> list[list[tuple[int, int]]]:
    return list(StreamBatchSampler(len(buckets), BATCH, SEED, num_steps=steps, buckets=buckets, **options))


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_every_step_holds_one_bucket_however_it_is_split(processes: int, accumulation: int) -> None:
    whole = micro_batches(60)
    assert all(len({int(GROUPS[index]) for index, _ in batch}) == 1 for batch in whole)
    parts = [
        micro_batches(60, process_index=rank, num_processes=processes, accumulation_steps=accumulation)
        for rank in range(processes)
    ]
    for step in range(60):
        joined = [
            pair
            for micro in range(accumulation)
            for rank in range(processes)
            for pair in parts[rank][step * accumulation + micro]
        ]
        assert joined == whole[step] and [place for _, place in joined] == list(
            range(step * BATCH, (step + 1) * BATCH)
        )


@pytest.mark.parametrize("start", [1, 6, 7, 13, 1000])
def test_a_restart_continues_the_order(start: int) -> None:
    stream = StreamBatchSampler(len(GROUPS), BATCH, SEED, buckets=GROUPS)
    assert list(islice(stream, start, start + 20)) == micro_batches(20, start_step=start)


def test_nothing_is_lost_or_repeated() -> None:
    """Each bucket's samples come in whole permutations, one after the other, and at the rate of their number."""
    steps = micro_batches(28 * 10)  # 40 epochs: every bucket's samples fill whole steps by then
    taken = {bucket: [index for step in steps for index, _ in step if GROUPS[index] == bucket] for bucket in (0, 2, 3)}
    for bucket, indices in taken.items():
        members = (bucket == GROUPS).nonzero().flatten().tolist()
        rounds = [indices[start : start + len(members)] for start in range(0, len(indices), len(members))]
        assert all(sorted(one) == members for one in rounds) and len(rounds) == 40
        assert len({tuple(one) for one in rounds}) > 1
    for epochs in range(1, 40):  # at no epoch's end is a bucket more than a step behind
        done = sum(epochs * int((bucket == GROUPS).sum()) // BATCH for bucket in taken)
        counts = Counter(index for step in steps[:done] for index, _ in step)
        for bucket, number in Counter(GROUPS.tolist()).items():
            had = sum(counts[index] for index in range(len(GROUPS)) if GROUPS[index] == bucket)
            assert epochs * number - BATCH < had <= epochs * number


def test_the_sizes_are_mixed_within_an_epoch() -> None:
    buckets = torch.arange(400) % 2
    sizes = [int(buckets[step[0][0]]) for step in micro_batches(100, buckets)]
    changes = sum(one != two for one, two in pairwise(sizes))
    assert sum(sizes) == 50 and 35 < changes < 65


def test_one_bucket_is_the_plain_stream() -> None:
    plain = list(StreamBatchSampler(13, BATCH, SEED, num_steps=30))
    assert micro_batches(30, torch.zeros(13, dtype=torch.int64)) == plain
    assert micro_batches(30, torch.full((13,), 5)) == plain


def test_a_dataset_smaller_than_a_step() -> None:
    steps = micro_batches(9, torch.tensor([0, 1, 1]))
    counts = Counter(index for step in steps for index, _ in step)
    assert counts == {0: 12, 1: 12, 2: 12}


# --- datasets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, shape in SHAPES.items():
        for number in range(3):
            path = tmp_path / "photos" / f"{name}{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.effect_noise(shape, 90).convert("RGB").save(path)
    return tmp_path / "photos"


def opened(path: Path, **options: Any) -> ImageDataset:
    settings: dict[str, Any] = {"buckets": RATIOS[:3], "bucket_step": 8, "image_size": 32}
    settings |= {"index_folder": str(path.parent / "index"), **options}
    dataset = open_dataset(DataConfig(path=str(path), **settings))
    assert isinstance(dataset, ImageDataset)
    return dataset


SIZES = {"square": (32, 32), "wide": (24, 40), "tall": (40, 24), "cinema": (24, 40), "near": (32, 32)}


def test_every_batch_of_a_folder_has_one_size(photos: Path) -> None:
    dataset = opened(photos, buckets=["1:1", "3:2", "2:3"], horizontal_flip=True, crop="random")
    assert dataset.original_sizes().tolist() == [
        list(reversed(SHAPES[name])) for name in sorted(SHAPES) for _ in range(3)
    ]
    sampler = StreamBatchSampler(len(dataset), 2, SEED, num_steps=30, buckets=dataset.buckets)
    batches = list(load_batches(dataset, sampler, SEED))
    for batch in batches:
        for index in batch["index"].tolist():
            name = Path(dataset.describe(index)).stem[:-1]
            assert batch["image"].shape == (2, 3, *SIZES[name])
    assert {tuple(batch["image"].shape[2:]) for batch in batches} == set(SIZES.values())
    for one, two in zip(batches, load_batches(dataset, sampler, SEED, num_workers=2), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    largest = load_first(dataset, 4, SEED)["image"]
    assert largest.shape == (4, 3, 32, 32)  # 24 x 40 is less


def test_the_first_samples_have_one_size_where_two_are_equally_large() -> None:
    settings: dict[str, Any] = {"image_size": 32, "bucket_step": 8, "buckets": [[32, 32], [32, 48], [48, 32]]}
    dataset = open_dataset(DataConfig(kind="shapes", num_images=12, **settings))
    assert list(indices_of_largest(dataset)) == [1, 4, 7, 10]
    first = load_first(dataset, 3, SEED)
    assert first["image"].shape == (3, 3, 32, 48) and {1, 4, 7, 10} >= set(first["index"].tolist())
    dataset = open_dataset(DataConfig(kind="shapes", image_size=32, num_images=3))
    assert list(indices_of_largest(dataset)) == [0, 1, 2]


def test_a_bad_image_is_replaced_in_its_size(photos: Path) -> None:
    path = photos / "wide1.png"
    path.write_bytes(path.read_bytes()[:60])  # its head is whole
    (photos / "tall0.png").write_bytes(b"")
    dataset = opened(photos, max_bad_images=2)
    for index in range(len(dataset)):
        assert dataset[index]["image"].shape[1:] == dataset.size(index)
    assert [Path(dataset.describe(index)).name for index in dataset.bad_indices] == ["tall0.png", "wide1.png"]


def test_heads_are_read_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def counted(path: Path) -> tuple[int, int]:
        calls.append(path)
        return read_size(path)

    monkeypatch.setattr(folders, "read_size", counted)
    first = opened(photos).buckets
    assert first is not None and len(calls) == 15
    again = opened(photos).buckets
    assert again is not None and torch.equal(again, first) and len(calls) == 15
    [index] = (photos.parent / "index").iterdir()
    index.write_bytes(b"damaged")
    assert torch.equal(opened(photos).buckets, first) and len(calls) == 30  # type: ignore[arg-type]
    Image.new("RGB", (20, 60)).save(photos / "wide0.png")
    changed = opened(photos).buckets
    assert changed is not None and len(calls) == 45
    assert (changed != first).nonzero().flatten().tolist() == [12]


def test_an_index_folder_that_cannot_be_used_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.index_folder: .*file cannot be made"):
        _ = opened(photos, index_folder=str(tmp_path / "file")).buckets


def test_without_buckets_nothing_is_looked_at(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "read_sizes", None)
    plain = opened(photos, buckets=[])
    assert plain.buckets is None and plain.size(0) == (32, 32) and plain[0]["image"].shape == (3, 32, 32)
    assert not (photos.parent / "index").exists()


def test_sizes_are_part_of_the_fingerprint(photos: Path) -> None:
    prints = [opened(photos, buckets=b).fingerprint() for b in ([], ["1:1"], ["1:1", "3:2"])]
    assert len(set(prints)) == 3


def test_combined_datasets_share_their_sizes(photos: Path) -> None:
    part, other = opened(photos), opened(photos, buckets=["1:1"])
    both = CombinedDataset([(part, []), (part, [])], [])
    assert both.buckets is not None and torch.equal(both.buckets, torch.cat([part.buckets, part.buckets]))  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"data\.buckets: .*different sizes"):
        CombinedDataset([(part, []), (other, [])], [])


def test_where_one_size_is_needed_buckets_are_refused(photos: Path) -> None:
    config = DataConfig(path=str(photos), image_size=32, buckets=["1:1"])
    with pytest.raises(UserError, match=r"data\.buckets: given"):
        open_image_dataset(config)
    assert open_image_dataset(config, several_sizes=True).bucket_sizes == [(32, 32)]
    with pytest.raises(UserError, match=r"drop .*data\.buckets"):
        open_dataset(DataConfig(kind="digits", image_size=32, buckets=["1:1"]))


def test_rows_of_a_table_go_to_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    images = [Image.new("RGB", shape) for shape in SHAPES.values()]
    table = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    dataset = opened(tmp_path / "saved", kind="datasets", buckets=["1:1", "3:2", "2:3"])
    found = [tuple(dataset[index]["image"].shape[1:]) for index in range(len(SHAPES))]
    assert found == [SIZES[name] for name in SHAPES]
    assert math.prod(dataset.original_sizes()[3].tolist()) == 36 * 20


def test_shapes_are_drawn_in_every_size() -> None:
    settings: dict[str, Any] = {"image_size": 64, "bucket_step": 8, "buckets": RATIOS, "num_images": 8}
    dataset = open_dataset(DataConfig(kind="shapes", **settings))
    shapes = [tuple(dataset[index]["image"].shape[1:]) for index in range(8)]
    assert shapes == [(64, 64), (56, 80), (80, 56), (48, 88)] * 2  # height, width; 16:9 of 64^2 is 48 x 85.3
