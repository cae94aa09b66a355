"""Hugging Face datasets from local files: images, labels, and refusals that list what is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from repagen.data import DataConfig, ImageDataset, open_dataset
from repagen.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(["cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (9, 8), (0, 0, 0, 255 - 10 * number)).save(path)  # level 10 * number over white
    return tmp_path / "images"


@pytest.fixture
def table(folder: Path) -> object:
    return datasets.load_dataset(str(folder), split="train")


def opened(path: Path, **options: object) -> ImageDataset:
    dataset = open_dataset(DataConfig(kind="datasets", path=str(path), image_size=8, **options))  # type: ignore[arg-type]
    assert isinstance(dataset, ImageDataset)
    return dataset


def levels(dataset: ImageDataset) -> list[int]:
    return [round(float(dataset[i]["image"].mean()) * 25.5) for i in range(len(dataset))]


def test_an_image_folder_is_read_with_our_decoding(folder: Path) -> None:
    dataset = opened(folder)
    assert dataset.class_names == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 1, 1]
    assert levels(dataset) == [0, 1, 2, 3]
    assert dataset.describe(2).startswith("row 2") and "dog/a.png" in dataset.describe(2)


def test_saved_and_parquet_forms_agree(table: object, folder: Path, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")  # type: ignore[attr-defined]
    table.to_parquet(tmp_path / "table.parquet")  # type: ignore[attr-defined]
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    for name in ("saved", "table.parquet", "splits"):
        dataset = opened(tmp_path / name)
        assert levels(dataset) == [0, 1, 2, 3] and dataset.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (["b", "a", "b", "c"], ["a", "b", "c"], [1, 0, 1, 2]),
        ([2, 0, 0, 1], ["0", "1", "2"], [2, 0, 0, 1]),
    ],
)
def test_plain_label_columns(
    table: object, tmp_path: Path, values: list[object], names: list[str], labels: list[int]
) -> None:
    changed = table.remove_columns("label").add_column("kind", values)  # type: ignore[attr-defined]
    changed.save_to_disk(tmp_path / "saved")
    dataset = opened(tmp_path / "saved", label_column="kind")
    assert dataset.class_names == names and dataset.labels.tolist() == labels
    assert opened(tmp_path / "saved").class_names == []  # not asked for, not a ClassLabel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, r"data\.image_column: picture .*image \(Image\), label \(ClassLabel\)"),
        ({"label_column": "class"}, r"data\.label_column: class .*label \(ClassLabel\)"),
        ({"image_column": "label"}, "label holds no images"),
        ({"label_column": "image"}, "image is Image"),
        ({"split": "test"}, "data.split: test given.*train"),
    ],
)
def test_wrong_columns_and_splits_are_named(
    table: object, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    table.save_to_disk(tmp_path / "saved")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "saved", **options)


def test_ambiguous_and_missing_columns_list_what_is_there(table: object, tmp_path: Path) -> None:
    images = datasets.Dataset.from_dict({"number": [1, 2]})
    images.save_to_disk(tmp_path / "plain")
    with pytest.raises(UserError, match=r"0 image columns.*number \(Value\)"):
        opened(tmp_path / "plain")
    doubled = datasets.concatenate_datasets([table, table.rename_columns({"image": "i", "label": "l"})], axis=1)  # type: ignore[attr-defined]
    doubled.save_to_disk(tmp_path / "doubled")
    with pytest.raises(UserError, match="2 image columns"):
        opened(tmp_path / "doubled")
    with pytest.raises(UserError, match="2 label columns"):
        opened(tmp_path / "doubled", image_column="i")


def test_negative_and_missing_labels_are_refused(table: object, tmp_path: Path) -> None:
    plain = table.remove_columns("label")  # type: ignore[attr-defined]
    plain.add_column("n", [0, -1, 0, 1]).save_to_disk(tmp_path / "negative")
    with pytest.raises(UserError, match="-1 in row 1"):
        opened(tmp_path / "negative", label_column="n")
    plain.add_column("n", [0, 1, None, 1]).save_to_disk(tmp_path / "missing")
    with pytest.raises(UserError, match="no label in row 2"):
        opened(tmp_path / "missing", label_column="n")


def test_bad_rows_follow_the_rule_of_bad_images(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": b"no image", "path": "x.png"}, {"bytes": b"", "path": None}]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    dataset = opened(tmp_path / "saved", max_bad_images=1)
    assert dataset.try_load(0) is None
    with pytest.raises(UserError, match="row 1"):
        dataset.try_load(1)


def test_missing_paths_ids_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"somebody/something.*could not be opened"):
        open_dataset(DataConfig(kind="datasets", path="somebody/something"))
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"allowed files: \.parquet"):
        opened(tmp_path / "table.csv")


def test_a_damaged_file_here_is_not_to_be_fetched_from_the_hub(table: object, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    table.to_parquet(path)  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"could not be opened: .*; check the split, and that the files there are"):
        opened(path)


def test_samples_are_the_same_type_as_those_of_folders(folder: Path) -> None:
    sample = opened(folder)[1]
    assert sample["image"].dtype == torch.float32 and sample["image"].shape == (3, 8, 8)
    assert (sample["label"], sample["index"]) == (0, 1)


def test_state_sees_content_where_the_fingerprint_does_not(folder: Path, tmp_path: Path) -> None:
    def state(path: Path) -> str:
        return opened(path).state()

    before = state(folder)
    assert state(folder) == before
    for path in folder.rglob("*.png"):  # the same size, other pixels
        os.utime(path, ns=(1, 1))
    assert state(folder) != before
    for level in (1, 2):
        table = datasets.Dataset.from_dict(
            {"image": [Image.new("RGB", (9, 8), (level, 0, 0))] * 3},
            features=datasets.Features({"image": datasets.Image()}),
        )
        table.save_to_disk(tmp_path / f"saved-{level}")
    shutil.copytree(tmp_path / "saved-1", tmp_path / "place")
    saved, fingerprint = state(tmp_path / "place"), opened(tmp_path / "place").fingerprint()
    assert state(tmp_path / "place") == saved
    shutil.rmtree(tmp_path / "place")
    shutil.copytree(tmp_path / "saved-2", tmp_path / "place")
    assert opened(tmp_path / "place").fingerprint() == fingerprint
    assert state(tmp_path / "place") != saved
