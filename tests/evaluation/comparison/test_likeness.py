"""What may stand side by side, what is better, and how many epochs a figure took."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.config import save_config
from repagen.errors import UserError
from repagen.evaluation.comparison.likeness import (
    ComparedResult,
    best_rows,
    differences,
    epochs_to,
    lower_is_better,
    metrics_of,
    require_alike,
)
from repagen.evaluation.comparison.plot import save_plot
from repagen.evaluation.comparison.reading import read_results
from repagen.evaluation.comparison.table import comparison_csv, comparison_table
from repagen.evaluation.extractor import ExtractorIdentity, FeatureExtractor
from repagen.evaluation.generation import evaluate_generation
from repagen.evaluation.protocol import encoder_protocol, load_protocol, metric_names, protocol_names
from repagen.evaluation.samples import TensorImages
from repagen.evaluation.text_to_image.evaluate import TextToImageResult

Json = dict[str, Any]
Write = Callable[..., str]


@pytest.fixture(scope="module")
def evaluated(extractor: FeatureExtractor, random_pictures: Any) -> Json:
    """A real result, of samples whose origin is told as a pipeline tells it."""

    class Sampled(TensorImages):
        @property
        def protocol(self) -> Json:
            facts = {"kind": "pipeline", "path": "org/model", "label_mode": "random", "rounding": "round", "seed": 0}
            return {**facts, "dtype": "float32", "num_inference_steps": 50, "guidance_scale": 1.0}

    images = [torch.from_numpy(random_pictures(count, seed=count)).permute(0, 3, 1, 2) for count in (40, 50)]
    protocol = encoder_protocol("own", metrics=("fd", "precision_recall"))
    result = evaluate_generation(Sampled(images[0]), TensorImages(images[1]), protocol, {"encoder": extractor})
    content = json.loads(json.dumps(result.as_dict()))
    return {**content, "training": {"images": 2_000, "step": 20, "dataset_images": 1_000, "global_batch_size": 100}}


@pytest.fixture
def write(evaluated: Json, tmp_path: Path) -> Write:
    """Write the result with changes by dotted key; => path."""

    def run(name: str, **changes: Any) -> str:
        content = copy.deepcopy(evaluated)
        for key, value in changes.items():
            *sections, last = key.split("__")
            target: Any = content
            for section in sections:
                target = target[int(section) if section.isdecimal() else section]
            target[int(last) if last.isdecimal() else last] = value
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return str(path)

    return run


def result(group: str = "a", **changes: Any) -> ComparedResult:
    """A result put together by hand; `fid`, `images` and `guidance` are short for what holds them."""
    facts = {"fid": 2.0, "images": 1000, "guidance": 1.0, "fixed": {"kind": "generation"}} | changes
    return ComparedResult(
        label=f"{group}{facts['images']}", group=group, origin=f"{group}{facts['images']}.json", kind="generation",
        metrics={"fid": facts["fid"], "recall": 0.5}, fixed=facts["fixed"],
        shown={"guidance_scale": facts["guidance"]} if facts["guidance"] is not None else {},
        training={"images": facts["images"], "step": facts["images"] // 10, "dataset_images": 100},
    )  # fmt: skip


# --- alike or not ----------------------------------------------------------------------------------------------------

UNLIKE = {
    "kind": ("reconstruction", "kind", "one kind"),
    "protocol": ("adm256", "protocol", "one protocol"),
    "settings__rounding": ("truncate", "settings.rounding", "one protocol"),
    "settings__num_samples": (500, "settings.num_samples", "one protocol"),
    "settings__inception_score__order": ("file", "settings.inception_score.order", "one protocol"),
    "settings__precision_recall__neighbours": (5, "settings.precision_recall.neighbours", "one protocol"),
    "settings__spaces__0__extractor__pooling": ("cls", "settings.spaces.encoder.extractor.pooling", "one protocol"),
    "definitions": ({"psnr": "in dB"}, "definitions.psnr", "one protocol"),
    "deviations": (["40 samples, the protocol says 50000"], "deviations", "one protocol"),
    "normalisers": ({"encoder": 1.5}, "normalisers.encoder", "table of normalisers"),
    "spaces__encoder__weights_sha256": ("f" * 64, "space encoder.weights_sha256", "one extractor"),
    "spaces__encoder__settings": ("port=other", "space encoder.settings", "one extractor"),
    "reference__pixels_sha256": ("e" * 64, "reference", "one reference"),
    "reference__sha256": ("d" * 64, "reference", "one reference"),
    "num_samples": (41, "num_samples", "1/N"),
    "samples__label_mode": ("balanced", "samples.label_mode", "sample and evaluate them alike"),
    "samples__rounding": ("truncate", "samples.rounding", "sample and evaluate them alike"),
    "samples__dtype": ("bfloat16", "samples.dtype", "sample and evaluate them alike"),
    "samples__size": ("32x32", "samples.size", "sample and evaluate them alike"),
}


@pytest.mark.parametrize("key", UNLIKE)
def test_each_difference_is_refused(key: str, write: Write) -> None:
    value, named, advice = UNLIKE[key]
    results = read_results([write("a.json"), write("b.json"), write("c.json", **{key: value})])
    require_alike(results[:2])
    with pytest.raises(UserError) as error:
        require_alike(results)
    message = str(error.value)
    assert message.startswith(f"not comparable: {named} is ") and "\n" not in message
    assert "a.json" in message and "c.json" in message and "b.json" not in message and advice in message
    assert [one.key for one in differences(results)] == [named]


def test_old_and_new_value_stand_in_the_refusal(write: Write) -> None:
    paths = [write("a.json"), write("b.json", samples__dtype="bfloat16", samples__label_mode="balanced")]
    with pytest.raises(UserError) as error:
        require_alike(read_results(paths))
    wanted = f"samples.label_mode is random in {paths[0]}, balanced in {paths[1]} (and 1 more: --list-differences)"
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples__path", "other/model"),
        ("samples__seed", 3),
        ("samples__num_inference_steps", 250),
        ("samples__guidance_scale", 1.5),
        ("samples__pixels_sha256", "a" * 64),
        ("training__images", 5),
        ("versions__torch", "3.0"),
        ("wall_time_s", 1.0),
        ("settings__explanation", "other words"),
        ("reference__path", "elsewhere"),
        ("spaces__encoder__name", "the same weights from elsewhere"),
    ],
)
def test_what_may_differ_is_let_through(key: str, value: Any, write: Write) -> None:
    require_alike(read_results([write("a.json"), write("b.json", **{key: value})]))


def test_what_samples_do_not_tell_is_noted(write: Write) -> None:
    words = [
        write("a.json"),
        write("b.json", samples__label_mode=None),
        write("c.json", samples__label_mode="balanced"),
    ]
    silent = read_results(words[:2])
    require_alike(silent)
    assert f"label_mode of {words[1]}; may differ" in comparison_table(silent)
    with pytest.raises(UserError, match=r"label_mode is random in .*a\.json, balanced in .*c\.json"):
        require_alike(read_results(words))  # the one between them that does not tell hides nothing


def test_a_space_that_one_lacks_is_a_difference(write: Write) -> None:
    with pytest.raises(UserError, match=r"space encoder.weights_sha256 is [0-9a-f]{12} in .*, missing in"):
        require_alike(read_results([write("a.json"), write("b.json", spaces={})]))


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", protocol_names())
def test_directions_of_all_metrics_are_known(name: str) -> None:
    for space in load_protocol(name).spaces:
        for metric in space.metrics:
            for key in metric_names(metric, space.name):
                expected = None if "_std" in key else metric in ("fd", "sfid", "kid", "mind", "cmmd")
                assert lower_is_better(key) is expected, key


def test_directions_of_other_metrics() -> None:
    assert [lower_is_better(name) for name in ("fdr", "rfid", "lpips")] == [True] * 3
    assert [lower_is_better(name) for name in ("psnr", "ssim", "clip_score 100*max(cos,0)", "pick_score")] == [
        False
    ] * 4
    assert lower_is_better("fidelity") is None


def test_best_rows() -> None:
    results = [result(fid=2.0), result("b", fid=1.5), result("c", fid=1.5)]
    assert best_rows(results, "fid") == {1, 2}
    assert best_rows(results, "recall") == set()  # equal everywhere
    assert best_rows(results[:1], "fid") == set()


def test_table_marks_and_differences(write: Write, evaluated: Json) -> None:
    fd = evaluated["metrics"]["fd_encoder"]
    words = [
        f"ours={write('a.json')}",
        f"theirs={write('b.json', metrics__fd_encoder=fd - 0.5, samples__seed=1, training__images=4000)}",
    ]
    lines = comparison_table(read_results(words)).splitlines()
    header, ours, theirs = (line.split() for line in lines[:3])
    assert header == [
        "result",
        "fd_encoder",
        "precision_encoder",
        "recall_encoder",
        "training",
        "images",
        "epochs",
        "seed",
    ]
    assert ours[0] == "ours" and theirs[0] == "theirs"
    assert (ours[1], theirs[1:3]) == (f"{fd:.5g}", [f"{fd - 0.5:.5g}*", "(-0.5)"])
    assert (ours[-3:], theirs[-3:]) == (["2000", "2.0", "0"], ["4000", "4.0", "1"])
    text = "\n".join(lines)
    assert "protocol=custom" in text and "num_samples=40" in text and "label_mode=random" in text
    assert "lowest fd_encoder; highest precision_encoder, recall_encoder" in text
    assert "biased upwards" in text  # 40 images are few: the result's own remark


def test_markdown_and_csv_hold_the_same(write: Write, evaluated: Json) -> None:
    fd = evaluated["metrics"]["fd_encoder"]
    results = read_results([write("a|b.json"), write("c.json", metrics__fd_encoder=fd / 3)])
    markdown = comparison_table(results, ["fd_encoder"], "markdown").splitlines()
    assert markdown[0] == "| result | fd_encoder |" and markdown[1] == "| --- | --- |"
    assert f"**{fd / 3:.5g}** ({fd / 3 - fd:+.3g})" in markdown[3] and "a\\|b" in markdown[2]
    rows = list(csv.DictReader(io.StringIO(comparison_csv(results))))
    assert [float(row["fd_encoder"]) for row in rows] == [fd, fd / 3]
    assert [row["fd_encoder difference"] for row in rows] == ["", str(fd / 3 - fd)]
    assert "fd_encoder" in rows[1]["best"].split() and "fd_encoder" not in rows[0]["best"].split()
    assert rows[0]["file"] == results[0].origin


def test_spreads_stand_behind_their_metric(write: Write) -> None:
    metrics = {"kid": 0.01, "kid_std": 0.001, "kid_dinov2": 0.5, "kid_std_dinov2": 0.25}
    results = read_results([write("a.json", metrics=metrics)])
    assert metrics_of(results) == ["kid", "kid_dinov2"]
    assert "0.01 +- 0.001" in comparison_table(results) and "0.5 +- 0.25" in comparison_table(results)
    [row] = csv.DictReader(io.StringIO(comparison_csv(results)))
    assert (row["kid std"], row["kid_dinov2 std"]) == ("0.001", "0.25")


def test_metrics_that_one_lacks_and_that_none_has(write: Write, evaluated: Json) -> None:
    left_out = {key: value for key, value in evaluated["metrics"].items() if key != "recall_encoder"}
    results = read_results([write("a.json", metrics=left_out), write("b.json")])
    assert comparison_table(results, ["recall_encoder"]).splitlines()[1].split()[-1] == "-"
    with pytest.raises(UserError, match=r"no result has the metric 'psnr'; they have fd_encoder"):
        comparison_table(results, ["psnr"])


def test_text_to_image_results(tmp_path: Path) -> None:
    identity = ExtractorIdentity("clip", "a" * 64, "port=transformers")
    words = []
    for number, score in enumerate((0.25, 0.26)):
        evaluated = TextToImageResult(
            metrics={"clip_score": score}, num_samples=4, spaces={"clip_score": identity},
            samples={"kind": "folder", "path": str(number)}, reference={"kind": "prompts", "sha256": "b" * 64},
            training={}, remarks=(), versions={}, wall_time_s=1.0, per_prompt=[],
        )  # fmt: skip
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(evaluated.as_dict()))
        words.append(str(path))
    results = read_results(words)
    require_alike(results)
    assert "0.26* (+0.01)" in comparison_table(results)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as the JSON of a result"),
        ("[" * 100_000, "cannot be read as the JSON of a result"),
        ("\xff", "cannot be read as the JSON of a result"),
        ("[1]", "not a result of `repagen evaluate`"),
        ("{}", "not a result of `repagen evaluate`"),
        ('{"schema": 1, "kind": "poem"}', "not a result of `repagen evaluate`"),
        ('{"schema": 1, "kind": []}', "not a result of `repagen evaluate`"),
        ('{"schema": 2, "kind": "generation"}', "schema 2, and this version of repagen reads schema 1"),
        ('{"schema": 1, "kind": "generation"}', "holds no metrics"),
        ('{"schema": 1, "kind": "generation", "metrics": 3}', ":metrics: damaged"),
        ('{"schema": 1, "kind": "generation", "metrics": {"fid": NaN}}', "metrics.fid: damaged, expected a finite"),
        ('{"schema": 1, "kind": "generation", "metrics": {"fid": "2"}}', "metrics.fid: damaged, expected a finite"),
        ('{"schema": 1, "kind": "generation", "metrics": {"fid": 2}, "settings": []}', ":settings: damaged"),
        (
            '{"schema": 1, "kind": "generation", "metrics": {"fid": 2}, "settings": {"spaces": [{"name": ["x"]}]}}',
            ":settings.spaces: damaged, expected a list of objects with a text as name",
        ),
        (
            '{"schema": 1, "kind": "generation", "metrics": {"fid": 2}, "settings": {"spaces": 3}}',
            ":settings.spaces: damaged",
        ),
        (
            '{"schema": 1, "kind": "generation", "metrics": {"fid": 2}, "num_samples": "64"}',
            ":num_samples: damaged, expected a whole number, got '64'",
        ),
        (
            '{"schema": 1, "kind": "generation", "metrics": {"fid": 2}, "spaces": {"x": 1}}',
            ":spaces.x: damaged",
        ),
        (
            '{"schema": 1, "kind": "generation", "metrics": {"fid": 2}, "deviations": "no"}',
            ":deviations: damaged",
        ),
        (
            '{"schema": 1, "kind": "generation", "metrics": {"fid": 2}, "training": {"images": -1}}',
            "training.images",
        ),
    ],
)
def test_foreign_and_damaged_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_results([str(path)])
    assert str(error.value).startswith(str(path)) and message in str(error.value) and "\n" not in str(error.value)


def test_a_difference_says_what_differs(write: Write) -> None:
    paths = [
        write("a.json", settings__inception_score__splits=10),
        write("b.json", settings__inception_score__splits="10"),
    ]
    with pytest.raises(UserError, match=r"splits is 10 \(int\) in .*a\.json, 10 \(str\) in .*b\.json"):
        require_alike(read_results(paths))
    results = read_results([paths[0], paths[0]])
    silent = {key: value for key, value in results[1].fixed.items() if key != "settings.sampling_dtype"}
    [difference] = differences([results[0], dataclasses.replace(results[1], fixed=silent, origin="old.json")])
    assert str(difference) == f"settings.sampling_dtype is not given in {paths[0]}, missing in old.json"


def test_words_name_results(write: Write, tmp_path: Path) -> None:
    plain, equals = write("runs/one/fid.json"), write("lr=1.json")
    named, alone, same = read_results([f"ours={plain}", plain, equals])
    assert (named.label, named.group) == ("ours", "ours")
    assert (alone.label, alone.group) == (plain.removesuffix(".json"), "one")
    assert same.origin == equals
    twice = read_results([f"ours={plain}", f"ours={equals}"])
    assert [one.label for one in twice] == ["ours (fid)", "ours (lr=1)"]
    for word, message in (("nowhere.json", "no such result"), (f"={plain}", "give NAME=FILE"), ("x=", "NAME=FILE")):
        with pytest.raises(UserError, match=message):
            read_results([word])


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_run(write: Write, tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a run that evaluated every 5 steps of 100 images; => it."""

    def run(name: str, distances: list[float], **changes: Any) -> Path:
        rows: list[Json] = [
            {"step": step, "images": 100 * step, "loss": 1.0} for step in range(1, 5 * len(distances) + 1)
        ]
        for number, distance in enumerate(distances, start=1):
            step = 5 * number
            training = {"images": 100 * step, "step": step, "dataset_images": 250}
            file = f"{name}/evaluation/step-{step:08d}.json"
            write(file, metrics={"fd_encoder": distance}, training=training, **changes)
            rows[step - 1]["evaluation/fd_encoder"] = distance
        log = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(log + '{"step": 99, "evalua')  # torn, as a killed run leaves it
        return tmp_path / name

    return run


def test_runs_are_read(write_run: Callable[..., Path]) -> None:
    folder = write_run("fast", [9.0, 4.0, 3.0])
    results = read_results([str(folder)])
    assert [one.label for one in results] == ["fast@5", "fast@10", "fast@15"]
    assert [one.metrics["fd_encoder"] for one in results] == [9.0, 4.0, 3.0]
    assert [one.epochs for one in results] == [2.0, 4.0, 6.0]
    assert {one.group for one in results} == {"fast"}
    assert {one.group for one in read_results([f"named={folder}"])} == {"named"}


def test_leftovers_of_a_run_do_not_count(write_run: Callable[..., Path]) -> None:
    folder = write_run("run", [9.0, 4.0])
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(rows[:7]) + "\n")  # back to step 7
    assert [one.label for one in read_results([str(folder)])] == ["run@5"]


def test_runs_stand_beside_runs_and_results(write_run: Callable[..., Path], write: Write) -> None:
    one, two = write_run("one", [3.0, 2.0]), write_run("two", [4.0], samples__guidance_scale=1.0)
    few = write_run("few", [3.0, 2.0], num_samples=30)
    require_alike(read_results([str(one), str(two), write("other.json")]))
    found = differences(read_results([str(one), str(few)]))
    assert [str(difference) for difference in found] == [
        f"num_samples is 40 in {one}/evaluation/step-00000005.json, 30 in {few}/evaluation/step-00000005.json"
    ]
    [report, _] = epochs_to(read_results([str(one), str(two)]), "fd_encoder", 2.0)
    assert report.reached is not None and report.reached.epochs == 4.0


def test_a_protocol_that_changed_within_a_run_is_refused(write_run: Callable[..., Path], write: Write) -> None:
    folder = write_run("run", [3.0, 2.0])
    training = {"images": 1000, "step": 10, "dataset_images": 250}
    write("run/evaluation/step-00000010.json", metrics={"fd_encoder": 2.0}, training=training, protocol="clean")
    with pytest.raises(
        UserError, match=r"protocol is custom in .*step-00000005\.json, clean in .*step-00000010\.json"
    ):
        require_alike(read_results([str(folder)]))


def test_folders_that_are_no_evaluated_run(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="not the folder of a training run"):
        read_results([str(tmp_path)])
    folder = write_run("run", [3.0])
    log = folder / "metrics.jsonl"
    for text, message in (
        ('{"step": 1, "images": 10}\n', "the run never evaluated"),
        ('{"step": 5, "evaluation/fd_encoder": 3.5}\n', "step-00000005.json: is not of this run"),
        ('{"step": 6, "evaluation/fd_encoder": 3.0}\n', "step-00000006.json: is missing"),
        ("{\n", "line 1 is damaged"),
        ('{"step": 1}\n[]\n', "line 2 is damaged"),
        ('{"images": 3}\n', "line 1 is damaged"),
    ):
        log.write_text(text)
        with pytest.raises(UserError, match=message):
            read_results([str(folder)])


# --- epochs to a figure ----------------------------------------------------------------------------------------------


def test_epochs_to_is_the_first_evaluation_that_is_good_enough() -> None:
    course = [(1000, 5.0), (2000, 2.1), (3000, 2.0), (4000, 2.2), (5000, 1.0)]
    results = [result("a", images=images, fid=fid) for images, fid in reversed(course)]
    results += [result("b", images=images, fid=fid + 1) for images, fid in course[:3]]
    reached, failed = epochs_to(results, "fid", 2.0)
    assert (reached.group, failed.group) == ("a", "b")
    assert reached.reached is not None and reached.reached.epochs == 30.0
    assert reached.before is not None and reached.before.epochs == 20.0
    assert failed.reached is None and (failed.best.epochs, failed.best.metrics["fid"]) == (30.0, 3.0)
    [early] = epochs_to(results[:5], "fid", 6.0)
    assert early.reached is not None and early.reached.epochs == 10.0 and early.before is None


def test_epochs_to_a_metric_that_grows() -> None:
    [report] = epochs_to([result(images=1000), result(images=2000)], "recall", 0.5)
    assert report.reached is not None and report.reached.epochs == 10.0
    [report] = epochs_to([result(images=1000)], "recall", 0.51)
    assert report.reached is None


def test_epochs_are_those_of_unguided_samples() -> None:
    epochs_to([result(guidance=1.0)], "fid", 2.0)
    with pytest.raises(UserError, match=r"a1000.json was sampled with guidance_scale=1.5.*unguided"):
        epochs_to([result(guidance=1.5)], "fid", 2.0)
    with pytest.raises(UserError, match="does not say with what guidance"):
        epochs_to([result(guidance=None)], "fid", 2.0)


def test_two_results_at_one_moment_are_refused() -> None:
    with pytest.raises(UserError, match="both 'a' after 10 epochs; tell models apart with NAME=FILE"):
        epochs_to([result(), result(fid=3.0)], "fid", 2.0)


def test_epochs_need_the_size_of_the_dataset(write: Write) -> None:
    word = write("a.json", training={"images": 3000})
    with pytest.raises(UserError, match=r"how many epochs .* give --dataset-images"):
        epochs_to(read_results([word]), "fd_encoder", 1.0)
    [report] = epochs_to(read_results([word], dataset_images=500), "fd_encoder", 1e9)
    assert report.best.epochs == 6.0
    assert read_results([write("b.json")], dataset_images=500)[0].epochs == 2.0  # what the result says goes first


# --- plots -----------------------------------------------------------------------------------------------------------


def ink(path: Path) -> np.ndarray:
    """Pixels (H, W) that are coloured, as only lines of data and legends are."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (pixels.max(axis=2) - pixels.min(axis=2)) > 60


def test_plot_has_a_line_for_each_model(tmp_path: Path) -> None:
    one = [result("a", images=images, fid=fid) for images, fid in ((1000, 9.0), (5000, 4.0), (9000, 2.0))]
    two = [result("b", images=images, fid=fid) for images, fid in ((1000, 8.0), (9000, 1.0))]
    for name, results in (("one", one), ("two", [*one, *two])):
        save_plot(results, tmp_path / f"{name}.png", metrics=["fid"])
    with Image.open(tmp_path / "one.png") as image:
        assert (image.format, image.size) == ("PNG", (600, 432))
    few, more = ink(tmp_path / "one.png"), ink(tmp_path / "two.png")
    assert few.sum() > 500 and more.sum() > 1.5 * few.sum()
    columns = np.flatnonzero(few[60:380].any(axis=0))
    assert columns.min() < 120 and columns.max() > 500  # the line runs over the whole panel


def test_panels_axes_and_scales(tmp_path: Path) -> None:
    results = [result("a", images=images, fid=fid) for images, fid in ((1000, 9.0), (10_000, 2.0))]
    plain, logarithmic = tmp_path / "deep" / "plain.png", tmp_path / "log.png"
    save_plot(results, plain, axis="epochs")
    save_plot(results, logarithmic, axis="epochs", log_x=True)
    with Image.open(plain) as image:
        assert image.size == (1200, 432)
    assert plain.read_bytes() != logarithmic.read_bytes()
    with pytest.raises(UserError, match=r"name a file that ends with \.png"):
        save_plot(results, tmp_path / "plot.pdf")
    with pytest.raises(UserError, match="cannot show a result at 0"):
        save_plot([result(images=0)], tmp_path / "plot.png", log_x=True)
    assert not list(tmp_path.glob("plot*"))


def test_protocol_files_and_results_have_the_same_settings(tmp_path: Path, write: Write) -> None:
    """A result of a protocol's file equals one of the protocol's name in all settings: only the name differs."""
    save_config(load_protocol("clean"), tmp_path / "mine.yaml")
    mine, clean = (dataclasses.asdict(load_protocol(name)) for name in (str(tmp_path / "mine.yaml"), "clean"))
    results = read_results([write("a.json", settings=mine), write("b.json", settings=clean)])
    assert differences(results) == []
