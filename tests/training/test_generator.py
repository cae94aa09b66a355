from __future__ import annotations

import copy
import os
import shutil
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_parts import (
    SIT_WIDTHS,
    finish,
    fork,
    join,
    settings,
    start,
    stop_after,
    train_settings,
    write_parts,
    write_settings,
)
from generator_parts import metric_rows as rows
from safetensors.torch import load_file

from repagen.config import load_config
from repagen.data import DataConfig, open_dataset
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.pipelines.class_to_image import ClassToImagePipeline
from repagen.training import generator as generator_module
from repagen.training.generator import train
from repagen.training.generator_config import GeneratorConfig
from repagen.training.latent_cache import CacheConfig, cache_latents
from repagen.training.launch import EXIT_CODE_STOPPED
from repagen.training.log import read_metrics
from repagen.training.objective import GeneratorObjective
from repagen.training.run import Run


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def run(parts: Path, folder: Path, *words: str) -> Path:
    """Train the tiny configuration with overrides; => the run's folder."""
    return train_settings(settings(parts, folder / "run"), folder, *words)


def final_bytes(folder: Path) -> dict[str, bytes]:
    newest = max((folder / "checkpoints").iterdir())
    names = ["model", "ema", "optimizer", "alignment"]
    files = {name: (newest / f"{name}.safetensors").read_bytes() for name in names}
    weights = folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    return {**files, "pipeline": weights.read_bytes()}


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([[row["loss"], row["loss_flow"], row["loss_alignment"]] for row in rows(folder)])


@pytest.fixture(scope="module")
def uninterrupted(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(parts, tmp_path_factory.mktemp("uninterrupted"))


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_rows_are_complete_and_count_images(uninterrupted: Path) -> None:
    recorded = read_metrics(uninterrupted / "metrics.jsonl")
    assert [(row["step"], row["images"]) for row in recorded] == [(step, 8 * step) for step in range(1, 7)]
    columns = {"loss", "loss_flow", "loss_alignment", "grad_norm", "learning_rate", "time_s", "images_per_s"}
    assert all(columns <= row.keys() for row in recorded)
    assert [row["learning_rate"] for row in recorded] == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_loss_is_flow_plus_weighted_alignment(uninterrupted: Path) -> None:
    for row in rows(uninterrupted):
        assert row["loss"] == pytest.approx(row["loss_flow"] + 0.5 * row["loss_alignment"], rel=1e-5)


def test_training_reduces_the_loss_and_raises_the_alignment(parts: Path, tmp_path: Path) -> None:
    words = ["max_steps=60", "optimizer.learning_rate=3e-3", "checkpoint.every_steps=60", "global_batch_size=32"]
    recorded = losses(run(parts, tmp_path, *words))
    assert recorded[-15:, 1].mean() < 0.8 * recorded[:15, 1].mean()
    assert recorded[-15:, 2].mean() < recorded[:5, 2].mean() - 0.2


def test_release_holds_the_ema_weights_the_sampler_and_the_classes(uninterrupted: Path) -> None:
    pipeline = ClassToImagePipeline.from_pretrained(uninterrupted / "pipeline")
    shadow = load_file(uninterrupted / "checkpoints" / "step-00000006" / "ema.safetensors")
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, shadow[f"shadow.{name}"]), name
    assert pipeline.scheduler.config.shift == pytest.approx((16 * 4 * 4 / 4096) ** 0.5)
    assert pipeline.config.id2label == {str(digit): str(digit) for digit in range(10)}
    assert pipeline.transformer.config.num_classes == 10
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(class_labels=["3", 7], num_inference_steps=2).images) == 2


def test_run_folder_holds_one_model_index_and_projectors_stay_in_checkpoints(uninterrupted: Path) -> None:
    assert [path.parent.name for path in uninterrupted.rglob("model_index.json")] == ["pipeline"]
    assert {path.name for path in (uninterrupted / "checkpoints").iterdir()} == {"step-00000004", "step-00000006"}
    names = load_file(uninterrupted / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").keys()
    assert not any("projector" in name for name in names)
    assert not list(uninterrupted.rglob("*.p*kl")) and not list(uninterrupted.rglob("*.pt"))


def test_saved_config_is_the_resolved_one(uninterrupted: Path) -> None:
    assert load_config(GeneratorConfig, uninterrupted / "config.yaml").ema.decay == 0.9


# --- the same numbers however the work is cut ----------------------------------------------------------------------


def test_a_second_run_is_equal_bit_for_bit(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    again = run(parts, tmp_path)
    assert rows(again) == rows(uninterrupted)
    assert final_bytes(again) == final_bytes(uninterrupted)


@pytest.mark.parametrize("first_steps", [1, 2, 5])
def test_a_continued_run_is_equal_bit_for_bit(
    parts: Path, tmp_path: Path, uninterrupted: Path, first_steps: int
) -> None:
    stopped = stop_after(settings(parts, tmp_path / "run"), tmp_path, first_steps)
    assert len(rows(stopped)) == first_steps
    continued = run(parts, tmp_path)
    assert rows(continued) == rows(uninterrupted)
    assert final_bytes(continued) == final_bytes(uninterrupted)


def test_sampling_and_workers_and_release_do_not_touch_training(
    parts: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    words = ["sample.every_steps=1", "sample.num_images=2", "num_workers=1", "checkpoint.every_steps=1"]
    busy = run(parts, tmp_path, *words)
    assert len(list((busy / "samples").iterdir())) == 6
    assert rows(busy) == rows(uninterrupted)
    assert final_bytes(busy) == final_bytes(uninterrupted)


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_accumulation_equals_the_large_batch(
    parts: Path, tmp_path: Path, uninterrupted: Path, micro_batch_size: int
) -> None:
    accumulated = run(parts, tmp_path, f"micro_batch_size={micro_batch_size}")
    assert torch.allclose(losses(accumulated), losses(uninterrupted), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    checkpointed = run(parts, tmp_path, "gradient_checkpointing=true")
    assert torch.allclose(losses(checkpointed), losses(uninterrupted), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")  # dynamo
@pytest.mark.parametrize("words", [[], ["gradient_checkpointing=true"]])
def test_compiled_blocks_change_nothing(parts: Path, tmp_path: Path, uninterrupted: Path, words: list[str]) -> None:
    compiled = run(parts, tmp_path, "compile=true", *words)
    assert torch.allclose(losses(compiled), losses(uninterrupted), atol=1e-5, rtol=1e-5)


def test_bf16_stays_near_fp32_and_saves_fp32(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    half = run(parts, tmp_path, "precision=bf16")
    assert not torch.equal(losses(half), losses(uninterrupted))
    assert torch.allclose(losses(half)[:, 1], losses(uninterrupted)[:, 1], rtol=0.1)
    weights = load_file(half / "checkpoints" / "step-00000006" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_cutoff_stops_the_alignment(parts: Path, tmp_path: Path) -> None:
    folder = run(parts, tmp_path, "alignment.schedule={kind: cutoff, end_step: 3}")
    assert ["loss_alignment" in row for row in rows(folder)] == [True] * 3 + [False] * 3


# --- resume: what may change and what may not ----------------------------------------------------------------------


def continue_with(parts: Path, finished: Path, folder: Path, *words: str) -> Path:
    shutil.copytree(finished, folder / "run", dirs_exist_ok=True)
    return run(parts, folder, *words)


@pytest.mark.parametrize(
    "word",
    [
        "max_steps=7",
        "micro_batch_size=4",
        "checkpoint.keep=3",
        "sample.every_steps=7",
        "num_workers=0",
        "log_with=[]",
        "sampler.shift=2",
        "data.max_bad_images=3",
        "data.index_folder=elsewhere",
    ],
)
def test_harmless_changes_continue_and_are_told(
    parts: Path, tmp_path: Path, uninterrupted: Path, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "repagen")
    continue_with(parts, uninterrupted, tmp_path, word)
    if word not in ("num_workers=0", "log_with=[]"):
        assert f"continuing with {word.split('=')[0]}=" in caplog.text


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.learning_rate=2e-3",
        "optimizer.schedule.warmup_steps=3",
        "ema.decay=0.8",
        "seed=1",
        "global_batch_size=16",
        "precision=bf16",
        "label_dropout=0.2",
        "flow.shift=2",
        "transformer.overrides.depth=3",
        "alignment.schedule.weight=1.0",
        "data.subset=train",
    ],
)
def test_harmful_changes_are_refused_by_name(parts: Path, tmp_path: Path, uninterrupted: Path, word: str) -> None:
    with pytest.raises(UserError, match=word.split("=")[0]):
        continue_with(parts, uninterrupted, tmp_path, word)


def test_another_autoencoder_of_the_same_name_is_refused(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    other = tmp_path / "parts"
    shutil.copytree(parts, other)
    autoencoder = RepresentationAutoencoder.from_pretrained(other / "rae")
    autoencoder.latents_mean.add_(1.0)
    autoencoder.save_pretrained(other / "rae")
    values = settings(parts, tmp_path / "run")
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.copytree(parts / "rae", tmp_path / "kept")
    try:
        shutil.copytree(other / "rae", parts / "rae", dirs_exist_ok=True)
        config = write_settings(values, tmp_path / "config.yaml")
        with pytest.raises(UserError, match="autoencoder"):
            train(load_config(GeneratorConfig, config))
    finally:
        shutil.copytree(tmp_path / "kept", parts / "rae", dirs_exist_ok=True)


def test_moved_data_and_models_are_the_same(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(parts, tmp_path / "moved")
    continue_with(tmp_path / "moved", uninterrupted, tmp_path, "max_steps=7")
    assert rows(tmp_path / "run")[:6] == rows(uninterrupted)


def test_resume_never_refuses_a_used_folder(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(UserError, match="already holds checkpoints"):
        continue_with(parts, uninterrupted, tmp_path, "resume=never")


def test_resume_from_a_path_branches_off(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    checkpoint = uninterrupted / "checkpoints" / "step-00000004"
    branch = run(parts, tmp_path, f"resume={checkpoint}")
    assert rows(branch) == rows(uninterrupted)[4:]
    assert final_bytes(branch) == final_bytes(uninterrupted)
    with pytest.raises(UserError, match="neither latest, nor never, nor a checkpoint folder"):
        run(parts, tmp_path / "other", "resume=lates")


def test_damaged_newest_checkpoint_falls_back_and_ends_equal(
    parts: Path, tmp_path: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = run(parts, tmp_path)
    assert "optimizer.safetensors: damaged" in caplog.text
    assert rows(again) == rows(uninterrupted)
    newest = again / "checkpoints" / "step-00000006" / "model.safetensors"
    assert newest.read_bytes() == final_bytes(uninterrupted)["model"]


# --- stops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("step", [0, 3, 5])
def test_what_is_not_finite_stops_before_the_step_and_names_it(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, step: int
) -> None:
    forward, calls = GeneratorObjective.forward, iter(range(100))

    def spoiled(self: Any, *arguments: Any) -> Any:
        found = forward(self, *arguments)
        if next(calls) == step:
            if bad == "loss":
                found["flow"] = found["flow"] * torch.tensor([1.0, 1.0, float("nan")] + [1.0] * 5)
            else:
                found["flow"].register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(GeneratorObjective, "forward", spoiled)
    with pytest.raises(UserError, match=rf"step {step}: .*not finite.*samples: digit \d+ of subset all") as caught:
        run(parts, tmp_path)
    assert str(caught.value).count("of subset") == (1 if bad == "loss" else 8)
    folder = tmp_path / "run"
    assert len(rows(folder)) == step
    saved = sorted((folder / "checkpoints").glob("step-*")) if step else []
    assert [path.name for path in saved] == [f"step-{k:08d}" for k in (2, 4) if k <= step]


def test_a_model_that_went_bad_is_never_saved(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def spoiled(self: Any, *arguments: Any) -> Any:
        step(self, *arguments)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)
    with pytest.raises(UserError, match="not finite"):
        run(parts, tmp_path, "checkpoint.every_steps=1")
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_with_75_and_the_same_command_continues(
    parts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = write_settings(settings(parts, tmp_path / "run"), tmp_path / "config.yaml")
    process = fork(config, "max_steps=100000", "checkpoint.every_steps=100000")
    wait_for_rows(tmp_path / "run", 2)
    os.kill(process.pid or 0, number)
    assert join(process) == EXIT_CODE_STOPPED
    saved = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert saved == [len(rows(tmp_path / "run"))]


def wait_for_rows(folder: Path, count: int) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def test_two_runs_cannot_share_a_folder(parts: Path, tmp_path: Path) -> None:
    config = write_settings(settings(parts, tmp_path / "run"), tmp_path / "config.yaml")
    first = fork(config, "max_steps=100000")
    try:
        wait_for_rows(tmp_path / "run", 1)
        with pytest.raises(UserError, match=f"another run is using this folder .pid {first.pid}"):
            train(load_config(GeneratorConfig, config))
    finally:
        first.kill()
        join(first)
    run(parts, tmp_path)  # the killed run's lock is stale


# --- kill -9 -------------------------------------------------------------------------------------------------------


def kill_and_restart(config: Path, folder: Path, waits_s: Sequence[float]) -> int:
    """Kill the run after each wait from its first new row on, then let it finish; => number of kills that hit it."""
    kills = 0
    for wait_s in waits_s:
        done = len((folder / "metrics.jsonl").read_bytes().splitlines()) if (folder / "metrics.jsonl").exists() else 0
        process = fork(config)
        while process.is_alive() and not grown(folder, done):
            time.sleep(0.01)
        time.sleep(wait_s)
        kills += process.is_alive()
        process.kill()
        join(process)
    assert join(fork(config)) == 0
    return kills


def grown(folder: Path, done: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") not in (0, done)


def kill_test(parts: Path, folder: Path, steps: int, waits_s: Sequence[float]) -> None:
    whole, killed = copy.deepcopy(settings(parts, folder / "whole")), settings(parts, folder / "killed")
    for values in (whole, killed):
        values["max_steps"] = steps
        values["checkpoint"]["every_steps"] = 3
    assert join(fork(write_settings(whole, folder / "whole.yaml"))) == 0
    kills = kill_and_restart(write_settings(killed, folder / "killed.yaml"), folder / "killed", waits_s)
    assert kills >= len(waits_s) // 2, "the kills came too late to mean anything"
    assert rows(folder / "killed") == rows(folder / "whole")
    assert final_bytes(folder / "killed") == final_bytes(folder / "whole")
    assert not list((folder / "killed").rglob(".tmp-*"))


def test_killed_run_ends_with_the_same_rows_and_bytes(parts: Path, tmp_path: Path) -> None:
    kill_test(parts, tmp_path, 40, [0.1, 0.0])


@pytest.mark.slow
def test_run_killed_again_and_again_ends_with_the_same_rows_and_bytes(parts: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    kill_test(parts, tmp_path, 400, (torch.rand(12, generator=generator) * 1.5).tolist())


def die_at(target: int, count: Path) -> None:
    """End this process like a kill at file operation number `target`, before (odd) or after it; write their count."""
    points = 0

    def point() -> None:
        nonlocal points
        points += 1
        if points == target:
            os._exit(9)
        os.write(descriptor, b".")

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            point()
            result = function(*arguments, **options)
            point()
            return result

        return call

    descriptor = os.open(count, os.O_CREAT | os.O_WRONLY)
    for owner, name in FILE_OPERATIONS:
        setattr(owner, name, watched(getattr(owner, name)))


FILE_OPERATIONS = [
    *((os, name) for name in ("fsync", "truncate", "rmdir", "unlink")),
    *((Path, name) for name in ("rename", "mkdir", "chmod", "write_text")),
]


@pytest.mark.slow
def test_killed_before_and_after_every_file_operation(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    def attempt(folder: Path, target: int) -> int | None:
        folder.mkdir(exist_ok=True)
        config = write_settings(settings(parts, folder / "run"), folder / "config.yaml")
        return join(fork(config, prepare=partial(die_at, target, folder / "count")))

    assert attempt(tmp_path / "count", -1) == 0
    total = (tmp_path / "count" / "count").stat().st_size
    assert total > 100
    for target in range(1, total + 1, 2):
        folder = tmp_path / str(target)
        assert attempt(folder, target) == 9
        assert attempt(folder, -1) == 0, target
        assert rows(folder / "run") == rows(uninterrupted), target
        assert final_bytes(folder / "run") == final_bytes(uninterrupted), target


# --- two processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["micro_batch_size=2"], ["alignment.schedule={kind: cutoff, end_step: 3}"]])
def test_two_processes_equal_one(parts: Path, tmp_path: Path, words: list[str]) -> None:
    values = settings(parts, tmp_path / "two")
    code, errors = finish(start(write_settings(values, tmp_path / "two.yaml"), *words, processes=2))
    assert code == 0, errors
    assert "2 process(es)" in errors
    one = run(parts, tmp_path, *words)
    for first, second in zip(rows(one), rows(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-5, abs=1e-5)
    stopped = load_file(tmp_path / "two" / "checkpoints" / "step-00000006" / "model.safetensors")
    alone = load_file(one / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(torch.allclose(stopped[name], alone[name], atol=1e-4) for name in alone)


@pytest.mark.slow
def test_errors_of_two_processes_end_both_with_one_line(parts: Path, tmp_path: Path) -> None:
    values = settings(parts, tmp_path / "two")
    config = write_settings(values, tmp_path / "two.yaml")
    finish(start(config, processes=2))
    code, errors = finish(start(config, "ema.decay=0.5", processes=2))
    assert code != 0
    assert "repagen: error: ema.decay" in errors


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_processes(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    stopped = stop_after(settings(parts, tmp_path / "run"), tmp_path, 3)
    code, errors = finish(start(tmp_path / "config.yaml", processes=2))
    assert code == 0, errors
    assert "processes is 2 (was 1)" in errors
    assert torch.allclose(losses(stopped), losses(uninterrupted), atol=1e-5, rtol=1e-5)


# --- other latents -------------------------------------------------------------------------------------------------


def make_cache(parts: Path, folder: Path, name: str = "rae", **options: Any) -> Path:
    from repagen.training.latent_identity import open_autoencoder

    encoder = VisionEncoder.from_pretrained(parts / "encoder")
    dataset: Any = open_dataset(DataConfig(kind="digits", image_size=32))
    autoencoder = open_autoencoder(str(parts / name))
    cache_latents(autoencoder, dataset, folder / "cache", encoders=[encoder], config=CacheConfig(256, **options))
    return folder / "cache"


def test_cached_latents_give_the_same_losses(parts: Path, tmp_path: Path, uninterrupted: Path) -> None:
    cache = make_cache(parts, tmp_path)
    cached = run(parts, tmp_path, "data.kind=latents", f"data.path={cache}")
    assert torch.allclose(losses(cached), losses(uninterrupted), atol=1e-4, rtol=1e-4)


def test_cache_of_another_autoencoder_or_encoder_is_refused(parts: Path, tmp_path: Path) -> None:
    cache = make_cache(parts, tmp_path)
    words = ["data.kind=latents", f"data.path={cache}"]
    other = RepresentationAutoencoder.from_pretrained(parts / "rae")
    other.latents_std.mul_(2.0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another statistics"):
        run(parts, tmp_path, *words, f"autoencoder.path={tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"alignment.targets: the cached latents hold"):
        run(parts, tmp_path, *words, "alignment.targets.0.encoder=digits")


def sit_words(parts: Path, *words: str) -> list[str]:
    widths = ", ".join(f"{name}: {value}" for name, value in SIT_WIDTHS.items())
    return [
        f"autoencoder.path={parts / 'kl'}",
        "transformer.architecture=sit",
        "transformer.patch_size=2",
        "transformer.prediction=velocity",
        f"transformer.overrides={{{widths}}}",
        *words,
    ]


def test_kl_latents_are_drawn_per_sample(parts: Path, tmp_path: Path) -> None:
    whole = run(parts, tmp_path / "a", *sit_words(parts))
    split = run(parts, tmp_path / "b", *sit_words(parts, "micro_batch_size=2"))
    assert torch.allclose(losses(whole), losses(split), atol=1e-5, rtol=1e-5)


def test_cached_kl_latents_are_drawn_from_the_posterior(parts: Path, tmp_path: Path) -> None:
    cache = make_cache(parts, tmp_path, "kl")
    words = sit_words(parts, "data.kind=latents", f"data.path={cache}")
    live, cached = run(parts, tmp_path / "a", *sit_words(parts)), run(parts, tmp_path / "b", *words)
    assert torch.allclose(losses(live), losses(cached), atol=1e-4, rtol=1e-4)


def test_unconditional_folder(parts: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 36), (number * 50, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    folder = run(parts, tmp_path, "data.kind=folder", f"data.path={tmp_path / 'images'}", "data.horizontal_flip=true")
    pipeline = ClassToImagePipeline.from_pretrained(folder / "pipeline")
    assert pipeline.transformer.config.num_classes == 0
    assert pipeline.config.id2label is None


def test_trackers_get_the_rows(parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = run(parts, tmp_path, "log_with=[tensorboard]")
    assert list(folder.rglob("events.out.tfevents*"))


# --- wrong input ---------------------------------------------------------------------------------------------------

WRONG = [
    (["autoencoder.path=/no/such/folder"], "autoencoder"),
    (["data.image_size=64"], "image_size"),
    (["transformer.patch_size=3"], "transformer.patch_size"),
    (["transformer.overrides.num_heads=3"], "^transformer.overrides.hidden_size, transformer.overrides.num_heads: "),
    (["transformer.overrides.mlp_ratio=0.001"], "^transformer.overrides.mlp_ratio: .*no hidden unit"),
    (["sampler.guidance_method=internal"], "^sampler.guidance_method: is 'internal', but DiTDH.* no base head"),
    (["sampler.preset=dit-ddpm"], "^sampler.preset: scheduler DDPMScheduler takes no explicit grid of flow times"),
    (["sampler.guidance_channels=9999"], "^sampler.guidance_channels: is 9999; this model's latents have 16"),
    (["sampler.preset=dit-ddpm", "sampler.shift=2"], "^sampler.shift: sampler preset 'dit-ddpm' walks integer steps"),
    (
        ["label_dropout=0", "sample.every_steps=2", "sample.guidance_scale=2"],
        "^sample.guidance_scale: is 2.0, but the transformer was trained without a null class",
    ),
    (["loss.base=0.5"], "^loss.base: 0.5 has no effect, DiTDH.* has no such loss; leave it out, or set it to 1.0"),
    (["loss.distillation=0"], "^loss.distillation: 0.0 has no effect"),
    (["loss.variational_bound=2"], "^loss.variational_bound: 2.0 has no effect"),
    (["alignment.dispersive={}", "micro_batch_size=1"], "^alignment.dispersive: compares the samples"),
    (["alignment.targets.0.block=3"], "block"),
    (["alignment.targets.0.encoder=/no/such/encoder"], "^alignment.targets.0.encoder '/no/such/encoder': no such"),
    (
        ["alignment.attention={encoder: digits, layers: [9], blocks: [1]}"],
        r"^alignment.attention.layers: \[9\] must be .* in \[0, ",
    ),
    (["log_with=[nosuchtracker]"], "log_with"),
    (["data.kind=folder", "data.path=/no/such/folder"], "data.path"),
    (["output_dir=/proc/no/such"], "output_dir"),
]


@pytest.mark.parametrize(("words", "name"), WRONG, ids=[words[0] for words, _ in WRONG])
def test_wrong_input_is_named_before_training(
    parts: Path, tmp_path: Path, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "steps", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(UserError, match=name) as caught:
        run(parts, tmp_path, *words)
    assert "\n" not in str(caught.value)


def test_precision_of_the_launcher_must_agree(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="precision: accelerate launch asks for 'fp16'"):
        run(parts, tmp_path)


def test_program_reports_a_mistake_in_one_line_with_code_2(
    parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_settings(settings(parts, tmp_path / "run"), tmp_path / "config.yaml")
    assert join(fork(config, "max_stepz=3")) == 2
    expected = "repagen: error: command line:max_stepz: unknown key; did you mean 'max_steps'?\n"
    assert capfd.readouterr().err == expected


def test_generator_module_has_no_second_loop() -> None:
    """One engine: the program neither writes checkpoints nor seeds streams itself."""
    text = Path(generator_module.__file__).read_text()
    assert "torch.save" not in text and "DataLoader" not in text
