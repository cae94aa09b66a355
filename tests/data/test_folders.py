"""Image folders: classes, flat folders, bad images, and refusals that name the cause."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from repagen.data import DataConfig, ImageDataset, StreamBatchSampler, load_batches, load_in_order, open_dataset
from repagen.errors import UserError


def save(path: Path, level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (level, level, level)).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes with 4, 2 and 2 images; level = 10 * number."""
    names = ["cat/0.png", "cat/1.JPG", "cat/more/2.png", "cat/more/deep/3.webp", "ant/4.png", "ant/5.bmp", "Zoo/6.png"]
    for number, name in enumerate([*names, "Zoo/7.png"]):
        save(tmp_path / name, 10 * number)
    return tmp_path


def opened(path: Path, **options: object) -> ImageDataset:
    dataset = open_dataset(DataConfig(path=str(path), image_size=8, **options))  # type: ignore[arg-type]
    assert isinstance(dataset, ImageDataset)
    return dataset


def test_class_folders_are_sorted_and_searched_in_depth(classes: Path) -> None:
    (classes / "cat" / "notes.txt").write_text("not an image")
    (classes / ".hidden").mkdir()
    save(classes / "cat" / ".thumbnail.png")
    dataset = opened(classes)
    assert dataset.class_names == ["Zoo", "ant", "cat"]
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    levels = [round(float(dataset[i]["image"].mean()) * 25.5) for i in range(len(dataset))]
    assert levels == [6, 7, 4, 5, 0, 1, 2, 3]
    assert dataset.describe(7) == str(classes / "cat/more/deep/3.webp")
    assert dataset[3]["label"] == 1 and dataset[3]["index"] == 3 and dataset[3]["image"].shape == (3, 8, 8)


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.jpeg")
    dataset = opened(tmp_path)
    assert dataset.class_names == [] and dataset.num_classes == 0
    assert dataset.labels.tolist() == [0, 0] and dataset.describe(0).endswith("a.jpeg")


def test_links_between_folders_do_not_loop(classes: Path) -> None:
    (classes / "cat" / "again").symlink_to(classes / "cat", target_is_directory=True)
    assert len(opened(classes)) == 8


def test_linked_class_folders_are_followed(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    for name in ("ant", "cat"):
        (other / name).symlink_to(classes / name, target_is_directory=True)
    assert opened(other).labels.tolist() == [0, 0, 1, 1, 1, 1]


def test_horizontal_flip_takes_half(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png")
    dataset = opened(tmp_path, horizontal_flip=True)
    flips = [int(dataset.load(0, torch.Generator().manual_seed(s))["image"][0, 0, 7]) for s in range(200)]
    assert 70 < sum(flips) < 130
    assert dataset[0]["image"][0, 0, 0] == 1  # without a generator nothing is flipped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "holds no images"),
        (lambda root: (root / "a.txt").write_text("x"), "holds no images"),
        (lambda root: [save(root / "cat/a.png"), (root / "dog").mkdir()], "without images: dog"),
        (lambda root: [save(root / "cat/a.png"), save(root / "b.png")], "b.png .* beside folders .*cat"),
        (lambda root: [save(root / "train/cat/a.png"), save(root / "val/cat/a.png")], "holds the splits"),
        (lambda root: [save(root / "cat/a.png"), (root / "cat/b.tiff").write_bytes(b"x")], "b.tiff"),
    ],
    ids=["empty", "no image", "empty class", "mixed", "splits", "unread format"],
)
def test_unusable_folders_are_refused_by_name(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_missing_path_and_file_path_are_refused(classes: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        opened(classes / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        opened(classes / "ant" / "4.png")


def damage(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.write_bytes(path.read_bytes()[:40])


def test_a_bad_image_stops_by_default_and_is_named(classes: Path) -> None:
    damage(classes, ["ant/4.png"])
    dataset = opened(classes)
    dataset[0]
    with pytest.raises(UserError, match=r"ant/4\.png.*max_bad_images=0; raise it .* \(a run may continue so\)"):
        dataset[2]


def test_a_bad_image_is_replaced_by_its_index_alone(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(classes, ["ant/4.png", "cat/1.JPG"])
    dataset, again = opened(classes, max_bad_images=2), opened(classes, max_bad_images=2)
    with caplog.at_level(logging.WARNING):
        first = [dataset[2]["index"] for _ in range(3)]
        dataset[5]
    assert [message.count("4.png") for message in caplog.messages] == [1, 0]  # each named once
    assert len(set(first)) == 1 and first[0] not in (2, 5)
    again[5]  # met in another order
    assert again[2]["index"] == first[0]
    assert dataset.bad_indices == [2, 5]
    damage(classes, ["Zoo/6.png"])
    with pytest.raises(UserError, match=r"Zoo/6\.png.*so far 3"):
        dataset[0]


def test_unread_formats_count_as_bad(classes: Path) -> None:
    (classes / "cat" / "a.gif").write_bytes(b"GIF89a")
    damage(classes, ["ant/4.png"])
    dataset = opened(classes, max_bad_images=1)
    with pytest.raises(UserError, match="so far 2"):
        dataset[2]


def test_a_folder_of_bad_images_alone_ends(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="no readable image"):
        opened(tmp_path, max_bad_images=9)[0]


def batches(dataset: ImageDataset, num_workers: int) -> list[dict[str, torch.Tensor]]:
    sampler = StreamBatchSampler(len(dataset), 4, seed=3, num_steps=6)
    return list(load_batches(dataset, sampler, 3, num_workers=num_workers))


def test_workers_change_nothing(classes: Path) -> None:
    damage(classes, ["ant/4.png", "cat/1.JPG"])
    options = {"max_bad_images": 2, "horizontal_flip": True, "crop": "random", "resize_px": 11}
    alone, together = opened(classes, **options), opened(classes, **options)
    for one, two in zip(batches(alone, 0), batches(together, 2), strict=True):
        assert one.keys() == two.keys() == {"image", "label", "index", "position"}
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert alone.bad_indices == together.bad_indices == [2, 5]  # workers share the count


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_workers_error_stays_one_line(classes: Path, num_workers: int) -> None:
    damage(classes, ["ant/4.png"])
    with pytest.raises(UserError) as error:
        batches(opened(classes), num_workers)
    assert "ant/4.png" in str(error.value) and "Traceback" not in str(error.value)


class Dying(ImageDataset):
    """Images of a folder whose loader worker dies at one of them."""

    def __init__(self, inner: ImageDataset) -> None:
        super().__init__(inner.config, inner.labels, inner.class_names)
        self.inner = inner

    def describe(self, index: int) -> str:
        return self.inner.describe(index)

    def _decode(self, index: int) -> Image.Image:
        import os

        os._exit(1)

    def _hash_sources(self, digest: object) -> None: ...


def test_a_dead_worker_is_a_users_error(classes: Path) -> None:
    with pytest.raises(UserError, match="worker died"):
        batches(Dying(opened(classes)), 1)


def test_reading_in_order_leaves_bad_images_out(classes: Path) -> None:
    damage(classes, ["ant/4.png", "ant/5.bmp"])
    dataset = opened(classes, max_bad_images=2)
    found = [batch["index"].tolist() for batch in load_in_order(dataset, range(1, 8), 2)]
    assert found == [[1], [4], [5, 6], [7]]


def test_fingerprint_sees_names_labels_sizes_and_preprocessing(classes: Path) -> None:
    first = opened(classes).fingerprint()
    assert opened(classes, horizontal_flip=True).fingerprint() == first
    assert opened(classes, crop="random").fingerprint() != first
    (classes / "cat" / "0.png").rename(classes / "ant" / "0.png")
    moved = opened(classes).fingerprint()
    assert moved != first
    save(classes / "ant" / "9.png")
    assert opened(classes).fingerprint() not in (first, moved)


def test_state_sees_place_and_time_of_files_where_the_fingerprint_does_not(classes: Path, tmp_path: Path) -> None:
    first = opened(classes)
    assert opened(classes).state() == first.state() == opened(classes / "cat" / "..").state()
    copy = opened(shutil.copytree(classes, tmp_path.parent / f"{tmp_path.name}-copy"))
    assert copy.fingerprint() == first.fingerprint() and copy.state() != first.state()
    before, fingerprint = first.state(), first.fingerprint()
    save(classes / "ant" / "5.bmp", 77)  # the same size, other pixels
    assert first.fingerprint() == fingerprint and first.state() != before


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"path": None}, "data.path"),
        ({"path": "x", "image_size": 0}, "data.image_size"),
        ({"path": "x", "max_bad_images": -1}, "data.max_bad_images"),
        ({"path": "x", "crop": "random", "resize_px": 4}, "data.resize_px"),
        ({"path": "x", "resize_px": 300}, "data.resize_px"),
        ({"kind": "digits", "image_size": 30}, "data.image_size"),
        ({"kind": "digits", "image_size": 32, "horizontal_flip": True}, "horizontal_flip"),
        ({"kind": "latents", "path": "/nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        open_dataset(DataConfig(**{"image_size": 8, **options}))  # type: ignore[arg-type]
