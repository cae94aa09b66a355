"""Fine-tuning in processes of its own: killed, on two processes, by the presets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from finetune_parts import finetune, finetune_settings, result_bytes, write_images, write_pipeline
from generator_parts import metric_rows, write_settings

from repagen.config import preset_names, read_preset
from repagen.training.finetune import train
from repagen.training.finetune_config import load_finetune_config

PRESETS = [name for name in preset_names() if name.startswith("finetune_")]
WORDS = {"full": ["labels.keep=[dog]"], "lora": ["prior.images_per_class=2", "prior.forward_batch_size=3"]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_pipeline(folder)
    write_images(folder / "images")
    return folder


def settings(parts: Path, output: Path, mode: str, **more: Any) -> dict[str, Any]:
    return {**finetune_settings(parts / "pipeline", parts / "images", mode), "output_dir": str(output), **more}


def start(config: Path, *words: str, processes: int = 1) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        *(launcher if processes > 1 else []),
        "-m",
        "repagen.training.finetune",
        "--config",
        str(config),
        *words,
    ]
    return subprocess.Popen([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora", "labels", "decoder"])
def test_a_killed_run_ends_with_the_same_rows_and_bytes(parts: Path, tmp_path: Path, mode: str) -> None:
    more = {"max_steps": 60, "checkpoint": {"every_steps": 3}}
    words = WORDS.get(mode, [])
    whole = write_settings(settings(parts, tmp_path / "whole", mode, **more), tmp_path / "whole.yaml")
    killed = write_settings(settings(parts, tmp_path / "killed", mode, **more), tmp_path / "killed.yaml")
    assert start(whole, *words).wait(300) == 0
    for rows in (5, 20):
        process = start(killed, *words)
        wait_for_rows(tmp_path / "killed", rows, process)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert len(metric_rows(tmp_path / "killed")) < 60, "the kills came too late to mean anything"
    assert start(killed, *words).wait(300) == 0
    assert metric_rows(tmp_path / "killed") == metric_rows(tmp_path / "whole")
    assert result_bytes(tmp_path / "killed") == result_bytes(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora", "labels", "decoder"])
def test_two_processes_are_one(parts: Path, tmp_path: Path, mode: str) -> None:
    words = WORDS.get(mode, [])
    config = write_settings(settings(parts, tmp_path / "two", mode), tmp_path / "two.yaml")
    assert start(config, *words, processes=2).wait(300) == 0
    one = finetune(settings(parts, tmp_path, mode), tmp_path / "one", *words)
    losses = [[row["loss"] for row in metric_rows(folder)] for folder in (tmp_path / "two", one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    images = [sorted((folder / "prior").rglob("*.png")) for folder in (tmp_path / "two", one)]
    assert [path.read_bytes() for path in images[0]] == [path.read_bytes() for path in images[1]]
    assert len(images[0]) == (4 if mode == "lora" else 0)


def test_there_is_a_preset_for_each_mode() -> None:
    assert [read_preset(name)["mode"] for name in PRESETS] == ["decoder", "full", "labels", "lora"]
    assert {read_preset(name)["recipe"]["program"] for name in PRESETS} == {"finetune"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_here(parts: Path, tmp_path: Path, name: str) -> None:
    words = [
        f"pipeline={parts / 'pipeline'}", f"data.path={parts / 'images'}", "data.image_size=32", "num_workers=0",
        f"output_dir={tmp_path}", "max_steps=1", "device=cpu", "progress_bar=false", "sample.num_images=2",
    ]  # fmt: skip
    if name == "finetune_decoder":
        words.append("lpips.weight=0")
    released = train(load_finetune_config(name, words))
    assert (released / "training.json").is_file()
    assert len(list((tmp_path / "samples").iterdir())) == 1
