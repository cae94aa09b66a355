"""Captions beside images and in tables: what is read, what is refused, and the draw among several."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from repagen.config import load_config
from repagen.data import (
    CaptionConfig,
    Captions,
    CombinedDataset,
    DataConfig,
    ImageDataset,
    StreamBatchSampler,
    data_config_from_words,
    load_batches,
    open_dataset,
)
from repagen.data.captions import read_captions
from repagen.errors import UserError

NAMES = ("a.png", "b.png", "c.png", "d.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(tmp_path / name)
    return tmp_path


def opened(path: Path, **options: Any) -> ImageDataset:
    captions = CaptionConfig(**options.pop("captions", {}))
    dataset = open_dataset(DataConfig(path=str(path), image_size=8, captions=captions, **options))
    assert isinstance(dataset, ImageDataset) and dataset.has_captions
    return dataset


def write_all(photos: Path, text: str = "some picture") -> None:
    for name in NAMES:
        (photos / name).with_suffix(".txt").write_text(text)


def test_all_forms_beside_images_are_read(photos: Path) -> None:
    (photos / "a.txt").write_bytes("\ufeffone blå\n\n  two  \r\n".encode())
    (photos / "b.json").write_text(json.dumps([{"caption": "rare", "weight": 1}, {"caption": "often", "weight": 3}]))
    (photos / "c.json").write_text(json.dumps({"width": 3, "caption": None, "text": ["x", "y"]}))
    (photos / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "from the table"}\n')
    dataset = opened(photos)
    assert [dataset.captions(index) for index in range(4)] == [
        Captions(("one blå", "two"), (1.0, 1.0)),
        Captions(("rare", "often"), (1.0, 3.0)),
        Captions(("x", "y"), (0.5, 0.5)),
        Captions(("from the table",), (1.0,)),
    ]
    assert [dataset[index]["caption"] for index in range(4)] == ["one blå", "often", "x", "from the table"]


def test_json_comes_before_text_before_the_table_and_only_where_it_says_something(photos: Path) -> None:
    write_all(photos, "text")
    rows = [json.dumps({"file_name": name, "text": "row"}) for name in NAMES]
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    (photos / "a.json").write_text('"json"')
    (photos / "b.json").write_text('{"width": 3}')
    (photos / "c.txt").write_text(" \n")
    found = [opened(photos)[index]["caption"] for index in range(4)]
    assert found == ["json", "text", "row", "text"]


def test_tables_lie_in_class_folders_or_above_and_the_nearer_wins(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "classes"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "a.png")
    (root / "metadata.jsonl").write_text(
        '{"file_name": "cat/a.png", "text": "above"}\n{"file_name": "dog/a.png", "text": "above"}\n'
    )
    (root / "dog" / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "beside"}\n')
    dataset = opened(root)
    assert [dataset[0]["caption"], dataset[1]["caption"]] == ["above", "beside"]
    assert dataset.class_names == ["cat", "dog"]


def test_columns_share_their_weight_among_their_captions(photos: Path) -> None:
    write_all(photos, "not a column")
    row = {"short": "s", "long": ["l", "m", "n"], "other": "o"}
    for name in NAMES[:3]:
        (photos / name).with_suffix(".json").write_text(json.dumps(row))
    (photos / "d.json").write_text(json.dumps({"short": "s", "long": ""}))
    dataset = opened(photos, captions={"columns": {"short": 1, "long": 3}})
    assert dataset.captions(0) == Captions(("s", "l", "m", "n"), (1.0, 1.0, 1.0, 1.0))
    assert dataset.captions(3) == Captions(("s",), (1.0,))
    with pytest.raises(UserError, match=r"1 of 4 images have no caption in long: .*d\.png"):
        opened(photos, captions={"columns": {"long": 1}})


def test_missing_captions_are_counted_named_and_left_to_the_rule(photos: Path) -> None:
    (photos / "b.txt").write_text("here")
    with pytest.raises(UserError, match=r"3 of 4 images .*a\.png, .*c\.png, .*d\.png; .*missing=drop"):
        opened(photos)
    empty = opened(photos, captions={"missing": "empty"})
    assert [empty[index]["caption"] for index in range(4)] == ["", "here", "", ""]
    dropped = opened(photos, captions={"missing": "drop"})
    assert len(dropped) == 1 and dropped[0]["caption"] == "here" and dropped.describe(0).endswith("b.png")
    (photos / "b.txt").unlink()
    with pytest.raises(UserError, match="4 of 4"):
        opened(photos, captions={"missing": "drop"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"caption": "x"', r"a\.json: no readable JSON"),
        ("a.json", b"\xff\xfe", r"a\.json: no readable JSON"),
        ("a.json", b"[" * 100_000, r"a\.json: no readable JSON"),
        ("a.json", b"3", r"a\.json: int given as a caption"),
        ("a.json", b'{"caption": {"de": "x"}}', r"a\.json:caption: dict given as a caption"),
        ("a.json", b'[{"caption": "x", "weight": -1}]', r"a\.json: weight -1 given"),
        ("a.json", b'[{"caption": "x", "weight": NaN}]', r"a\.json: weight nan given"),
        ("a.json", b'[{"caption": "x", "weight": true}]', r"a\.json: weight True given"),
        ("a.json", b'[{"caption": "x", "weight": 1%s}]' % (b"0" * 400), r"a\.json: weight 10+ given"),
        ("a.json", rb'{"text": "\ud800 x"}', r"a\.json:text: character 0 is '.ud800', which is half a character"),
        ("a.txt", b"caf\xe9", r"a\.txt: not a text in UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"text": "x"}', r"metadata\.jsonl, line 2: no file_name"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n' * 2, r"metadata\.jsonl, line 2: a second row of a\.png"),
        ("metadata.jsonl", b"\n[1]", r"metadata\.jsonl, line 2: no file_name"),
        ("metadata.jsonl", b"x", r"metadata\.jsonl, line 1: no readable JSON"),
    ],
)
def test_files_that_cannot_be_read_are_named(photos: Path, name: str, content: bytes, message: str) -> None:
    write_all(photos)
    (photos / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(photos, captions={"missing": "empty"})


def test_a_caption_that_can_never_be_drawn_is_none() -> None:
    assert read_captions([{"caption": "x", "weight": 0}, {"text": " "}, None], {}, "here") is None


def test_a_line_of_a_text_file_ends_at_line_ends_alone(photos: Path) -> None:
    write_all(photos)
    (photos / "a.txt").write_bytes("une\u2028île\r\nb\x0bc\rd\x85e\n".encode())
    assert opened(photos).captions(0).texts == ("une\u2028île", "b\x0bc", "d\x85e")


def test_a_table_that_is_rewritten_while_it_is_read_swaps_no_captions(photos: Path) -> None:
    rows = [json.dumps({"file_name": name, "text": f"of {name}"}) for name in NAMES]
    table = photos / "metadata.jsonl"
    table.write_text("\n".join(rows))
    dataset = opened(photos)
    assert dataset.captions(0).texts == ("of a.png",)
    for content in ("\n".join(reversed(rows)), f" {rows[1]}\n", ""):
        table.write_text(content)
        with pytest.raises(UserError, match=r"metadata\.jsonl \(a\.png\): the row is not where it was"):
            dataset.captions(0)


def test_the_draw_follows_the_weights_and_the_generator_alone() -> None:
    captions = Captions(("a", "b", "c"), (1.0, 5.0, 2.0))
    drawn = [captions.draw(torch.Generator().manual_seed(seed)) for seed in range(2000)]
    counts = Counter(drawn)
    # Binomial: three standard deviations are at most 66 of 2000.
    assert abs(counts["a"] - 250) < 66 and abs(counts["b"] - 1250) < 66 and abs(counts["c"] - 500) < 66
    assert drawn[:50] == [captions.draw(torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert captions.draw() == "b" and Captions(("x", "y"), (1.0, 1.0)).draw() == "x"
    assert Captions.from_json(captions.to_json()) == captions


def test_captions_leave_crops_flips_and_order_as_they_were(photos: Path) -> None:
    write_all(photos, "one\ntwo\nthree")
    options: dict[str, Any] = {"crop": "random", "resize_px": 11, "horizontal_flip": True}
    Image.effect_noise((12, 9), 90).convert("RGB").save(photos / "a.png")
    plain = open_dataset(DataConfig(path=str(photos), image_size=8, **options))
    sampler = StreamBatchSampler(4, 2, seed=3, num_steps=8)
    with_captions = list(load_batches(opened(photos, **options), sampler, 3))
    for one, two in zip(load_batches(plain, sampler, 3), with_captions, strict=True):
        assert two.keys() - one.keys() == {"caption"}
        assert all(torch.equal(one[key], two[key]) for key in one)
    captions = [caption for batch in with_captions for caption in batch["caption"]]
    assert {"one", "two", "three"} == set(captions)
    workers = load_batches(opened(photos, **options), sampler, 3, num_workers=2)
    assert [caption for batch in workers for caption in batch["caption"]] == captions


def test_a_bad_image_takes_its_caption_along(photos: Path) -> None:
    for name in NAMES:
        (photos / name).with_suffix(".txt").write_text(name)
    (photos / "b.png").write_bytes(b"")
    sample = opened(photos, max_bad_images=1)[1]
    assert sample["caption"] == NAMES[sample["index"]] != "b.png"


def test_the_fingerprint_sees_captions_only_where_they_count(photos: Path) -> None:
    write_all(photos)
    without = open_dataset(DataConfig(path=str(photos), image_size=8))
    before, captioned = without.fingerprint(), opened(photos).fingerprint()
    assert before != captioned == opened(photos).fingerprint()
    (photos / "c.txt").write_text("another")
    assert opened(photos).fingerprint() not in (before, captioned)
    assert without.fingerprint() == before and "caption" not in without[0]


def test_combined_datasets_have_captions_where_all_parts_have(photos: Path, tmp_path: Path) -> None:
    write_all(photos)
    part, plain = opened(photos), open_dataset(DataConfig(path=str(photos), image_size=8))
    both = CombinedDataset([(part, []), (part, [])], [])
    assert both.has_captions and both.captions(5) == part.captions(1) and both[5]["caption"] == "some picture"
    assert not CombinedDataset([(part, []), (plain, [])], []).has_captions


def test_kinds_without_captions_refuse_them() -> None:
    with pytest.raises(UserError, match=r"data\.captions: given, but data\.kind=digits"):
        open_dataset(DataConfig(kind="digits", image_size=8, captions=CaptionConfig()))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["data.captions={}"], CaptionConfig()),
        (["data.captions.missing=drop"], CaptionConfig(missing="drop")),
        (["data.captions.columns.a=1", "data.captions.columns.b=2.5"], CaptionConfig(columns={"a": 1.0, "b": 2.5})),
    ],
)
def test_the_section_switches_captions_on(words: list[str], expected: CaptionConfig | None, tmp_path: Path) -> None:
    assert data_config_from_words(["data.path=x", *words]).captions == expected
    (tmp_path / "c.yaml").write_text("path: x\n")
    assert load_config(DataConfig, tmp_path / "c.yaml", [w.removeprefix("data.") for w in words]).captions == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.captions.mising=drop", "mising"),
        ("data.captions.missing=skip", "skip"),
        ("data.captions.columns.a=0", r"data\.captions\.columns\.a: 0"),
        ("data.captions.columns.a=1 data.kind=latents", r"data\.captions\.columns: a given, but .*=latents has no"),
        ("data.path.a=3", r"data\.path\.a=3: not a known setting"),
    ],
)
def test_wrong_words_of_the_section_are_named(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_config_from_words(["data.path=x", *word.split()])


# --- Hugging Face datasets -----------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def save(**columns: list[Any]) -> Path:
        images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(len(next(iter(columns.values()))))]
        made = datasets.Dataset.from_dict({**columns, "image": images})
        made.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize(
    ("columns", "settings", "expected"),
    [
        ({"note": ["x", "y"]}, {}, Captions(("y",), (1.0,))),
        ({"note": ["x", "y"], "text": ["t", "u"]}, {}, Captions(("u",), (1.0,))),
        ({"texts": [["x"], ["y", "z"]]}, {}, Captions(("y", "z"), (0.5, 0.5))),
        ({"a": ["x", "y"], "b": [["p"], ["q", "r"]]}, {"a": 1, "b": 4}, Captions(("y", "q", "r"), (1.0, 2.0, 2.0))),
        ({"c": [[{"caption": "x", "weight": 2.0}]] * 2}, {"c": 3}, Captions(("x",), (3.0,))),
    ],
)
def test_columns_of_tables(table: Any, columns: Any, settings: Any, expected: Captions) -> None:
    dataset = opened(table(**columns), kind="datasets", captions={"columns": settings})
    assert dataset.captions(1) == expected


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, {}, r"data\.captions\.columns: nothing given .* 2 text columns; .*a \(Value\)"),
        ({"a": [1]}, {}, "0 text columns"),
        ({"a": ["x"]}, {"z": 1}, r"data\.captions\.columns: z given; allowed: .*a \(Value\)"),
        ({"a": [1]}, {"a": 1}, "row 0:a: int given as a caption"),
    ],
)
def test_columns_that_are_not_there_are_named(table: Any, columns: Any, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(table(**columns), kind="datasets", captions={"columns": settings})


def test_rows_without_a_caption_follow_the_rule(table: Any) -> None:
    path = table(text=["x", None, " ", "y"])
    with pytest.raises(UserError, match="2 of 4 images have no caption: row 1, row 2;"):
        opened(path, kind="datasets")
    dropped = opened(path, kind="datasets", captions={"missing": "drop"})
    assert [dropped[index]["caption"] for index in range(len(dropped))] == ["x", "y"]
    assert dropped.describe(1).startswith("row 3")
    assert round(float(dropped[1]["image"][0, 0, 0]) * 255) == 3
    assert opened(path, kind="datasets", captions={"missing": "empty"})[1]["caption"] == ""
