"""`repagen compare` as a program."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from repagen import cli

Compare = Callable[..., str]


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Run `repagen compare`; => what it printed, be it the one line of an error."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["repagen", "compare", *words])
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code == 2
            error = capsys.readouterr().err
            assert error.startswith("repagen: error: ") and error.count("\n") == 1
            return error
        return capsys.readouterr().out

    return run


@pytest.fixture
def course(tmp_path: Path) -> list[str]:
    """Results of two models in the course of training, RAE's figure among them: 177 epochs to FID 2."""
    paths = []
    figures = {"rae": {80: 2.31, 160: 2.05, 177: 2.0}, "raev2": {20: 2.5, 35: 1.98}, "sit": {800: 8.3}}
    for model, by_epoch in figures.items():
        (tmp_path / model).mkdir()
        for epoch, fid in by_epoch.items():
            content: dict[str, Any] = {
                "schema": 1,
                "kind": "generation",
                "protocol": "rae",
                "metrics": {"fid": fid, "inception_score": 100.0 + epoch, "inception_score_std": 2.0},
                "num_samples": 50_000,
                "reference": {"kind": "statistics", "sha256": "a" * 64},
                "samples": {"path": f"org/{model}", "guidance_scale": 1.0, "label_mode": "balanced"},
                "training": {"images": epoch * 1_281_167, "step": epoch * 1251, "dataset_images": 1_281_167},
            }
            path = tmp_path / model / f"{epoch}.json"
            path.write_text(json.dumps(content))
            paths.append(str(path))
    return paths


def test_table(compare: Compare, course: list[str]) -> None:
    header, *rows = compare(*course, "--metrics", "fid").split("\n\n")[0].splitlines()
    assert header.split() == ["result", "fid", "training", "images", "step", "epochs", "path"]
    assert len(rows) == 6 and "1.98* (-0.33)" in rows[4] and rows[4].split()[-2:] == ["35.0", "org/raev2"]


def test_epochs_to(compare: Compare, course: list[str]) -> None:
    *_, sentences = compare(*course, "--epochs-to", "fid=2.0").rstrip().split("\n\n")
    assert sentences.splitlines() == [
        "rae: EP_FID@2 = 177 (fid 2; the evaluation before: 2.05 at 160 epochs)",
        "raev2: EP_FID@2 = 35 (fid 1.98; the evaluation before: 2.5 at 20 epochs)",
        "sit: EP_FID@2 not reached (lowest fid: 8.3 at 800 epochs)",
    ]
    assert "sit: epochs to inception_score 900 = 800 (inception_score 900; its first evaluation)" in compare(
        *course, "--epochs-to", "inception_score=900"
    )
    for wrong in ("fid", "fid=", "=2", "fid=nan", "fid=two"):
        assert "give METRIC=VALUE" in compare(*course, "--epochs-to", wrong)
    assert "no result has the metric 'rfid'" in compare(*course, "--epochs-to", "rfid=2")


def test_csv_and_markdown(compare: Compare, course: list[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(compare(*course, "--csv"))))
    assert [float(row["fid"]) for row in rows] == [2.31, 2.05, 2.0, 2.5, 1.98, 8.3]
    assert [row["best"] for row in rows] == ["", "", "", "", "fid", "inception_score"]
    assert compare(*course, "--markdown").startswith("| result | fid | inception_score |")


def test_plot(compare: Compare, course: list[str], tmp_path: Path) -> None:
    assert compare(*course, "--plot", str(tmp_path / "plot.png"), "--x", "epochs", "--log-x").startswith("result")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and image.size == (1200, 432)


def test_refusals_and_their_list(compare: Compare, course: list[str]) -> None:
    other = Path(course[1])
    content = json.loads(other.read_text())
    other.write_text(json.dumps(content | {"protocol": "adm256", "num_samples": 10_000}))
    refusal = compare(*course)
    assert f"protocol is rae in {course[0]}, adm256 in {other} (and 1 more: --list-differences)" in refusal
    assert compare(*course, "--list-differences").splitlines() == [
        f"protocol is rae in {course[0]}, adm256 in {other}",
        f"num_samples is 50000 in {course[0]}, 10000 in {other}",
    ]
    assert compare(course[0], course[2], "--list-differences").startswith("no differences")
    assert not Path(course[0]).with_name("plot.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--x", "epochs"], "--x is for --plot"),
        (["--log-x"], "--log-x is for --plot"),
        (["--csv", "--epochs-to", "fid=2"], "leave one of them out"),
        (["--csv", "--markdown"], "not allowed with"),
        (["--dataset-images", "0"], "--dataset-images must be at least 1"),
        (["--plot", "plot.svg"], "name a file that ends with .png"),
    ],
)
def test_contradictions_are_refused(words: list[str], message: str, compare: Compare, course: list[str]) -> None:
    assert message in compare(*course, *words)
