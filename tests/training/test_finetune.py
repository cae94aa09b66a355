from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from finetune_parts import (
    finetune,
    finetune_settings,
    result_bytes,
    write_images,
    write_pipeline,
    write_pipeline_and_images,
)
from generator_parts import TINY, metric_rows
from safetensors.torch import load_file

import repagen
from repagen import ClassToImagePipeline
from repagen.errors import UserError
from repagen.training.generator_config import ARCHITECTURES
from repagen.training.launch import RunStopped
from repagen.training.run import Run

MODES = ["full", "lora", "labels", "decoder"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline_and_images(tmp_path_factory.mktemp("parts"))


def settings(parts: Path, mode: str) -> dict[str, Any]:
    return finetune_settings(parts / "pipeline", parts / "images", mode)


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    words = {"full": ["labels.keep=[dog]"], "lora": ["prior.images_per_class=2", "prior.forward_batch_size=3"]}
    return {mode: finetune(settings(parts, mode), folder / mode, *words.get(mode, [])) for mode in MODES}


def load(folder: Path) -> Any:
    pipeline = ClassToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, label: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(class_labels=label, generator=generator, output_type="pt", num_inference_steps=2).images


# --- what is released ----------------------------------------------------------------------------------------------


def test_full_releases_a_pipeline_with_the_kept_and_the_new_classes(parts: Path, finished: dict[str, Path]) -> None:
    old, new = load(parts / "pipeline"), load(finished["full"] / "pipeline")
    # `dog` was kept by name, `cat` because the pipeline knows it; `bird` is new, the null row stays last.
    assert new.config.id2label == {"0": "dog", "1": "tabby, cat", "2": "bird"}
    assert new.transformer.config.num_classes == 3
    assert new.transformer.label_embedder.table.weight.shape == (4, 16)
    assert new.scheduler.config == old.scheduler.config
    assert new.config.sampling_defaults == old.config.sampling_defaults
    for name, tensor in old.vae.state_dict().items():
        assert torch.equal(tensor, new.vae.state_dict()[name]), name
    assert not torch.equal(old.transformer.proj_out.weight, new.transformer.proj_out.weight)
    facts = json.loads((finished["full"] / "pipeline" / "training.json").read_text())
    assert (facts["program"], facts["mode"], facts["step"], facts["images"]) == ("finetune", "full", 4, 16)
    assert facts["pipeline"] == str(parts / "pipeline")


def test_weights_that_get_no_gradient_stay_in_their_rows(parts: Path, tmp_path: Path) -> None:
    words = ["labels.keep=[dog, 2]", "optimizer.weight_decay=0", "label_dropout=0", "max_steps=2"]
    new = load(
        finetune(settings(parts, "full"), tmp_path, *words) / "pipeline"
    ).transformer.label_embedder.table.weight
    old = load(parts / "pipeline").transformer.label_embedder.table.weight
    assert torch.equal(new[0], old[1]) and torch.equal(new[1], old[2]) and torch.equal(new[-1], old[-1])
    assert not torch.equal(new[2], old[0])  # cat, which is in the data


def test_lora_releases_an_adapter_that_the_pipeline_loads(parts: Path, finished: dict[str, Path]) -> None:
    pipeline = load(parts / "pipeline")
    before = draw(pipeline, "dog")
    pipeline.load_lora_weights(finished["lora"] / "adapter")
    assert pipeline.config.id2label["3"] == "bird"
    assert not torch.equal(draw(pipeline, "dog"), before)
    unfused = draw(pipeline, "bird")
    pipeline.fuse_lora()
    assert (draw(pipeline, "bird") - unfused).abs().max() < 1e-5
    assert json.loads((finished["lora"] / "adapter" / "training.json").read_text())["mode"] == "lora"


def test_labels_release_the_new_rows_alone_and_old_classes_stay_to_the_bit(
    parts: Path, finished: dict[str, Path]
) -> None:
    tensors = load_file(finished["labels"] / "adapter" / "pytorch_lora_weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "transformer.label_embedder.rows": (1, 16)
    }
    pipeline = load(parts / "pipeline")
    before = draw(pipeline, ["tabby, cat", "dog", "fish"])
    mean = pipeline.transformer.label_embedder.table.weight[:3].mean(0)
    assert not torch.allclose(tensors["transformer.label_embedder.rows"][0], mean, atol=1e-3)
    pipeline.load_lora_weights(finished["labels"] / "adapter")
    assert torch.equal(draw(pipeline, ["tabby, cat", "dog", "fish"]), before)
    assert draw(pipeline, "bird").shape == (1, 3, 32, 32)


def test_decoder_releases_the_pipeline_with_another_decoder_and_the_same_latents(
    parts: Path, finished: dict[str, Path]
) -> None:
    old, new = load(parts / "pipeline"), load(finished["decoder"] / "pipeline")
    for name, tensor in old.transformer.state_dict().items():
        assert torch.equal(tensor, new.transformer.state_dict()[name]), name
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(old.vae.encode(images).latent, new.vae.encode(images).latent)
    assert not torch.equal(old.vae.decoder.decoder_pred.weight, new.vae.decoder.decoder_pred.weight)
    assert new.config.id2label == old.config.id2label


@pytest.mark.parametrize("mode", ["lora", "labels"])
def test_checkpoints_hold_what_is_trained_alone(finished: dict[str, Path], mode: str) -> None:
    newest = max((finished[mode] / "checkpoints").iterdir())
    names = load_file(newest / "model.safetensors").keys()
    assert names == {name.removeprefix("shadow.") for name in load_file(newest / "ema.safetensors")}
    assert all("lora_" in name or name.endswith("weight.0.rows") for name in names)
    released = next((finished[mode] / "adapter").glob("*.safetensors"))
    averaged = load_file(newest / "ema.safetensors")["shadow.label_embedder.table.parametrizations.weight.0.rows"]
    assert torch.equal(load_file(released)["transformer.label_embedder.rows"], averaged)


def test_rank_and_targets_are_the_configured_ones(parts: Path, tmp_path: Path) -> None:
    words = ["lora.rank=3", "lora.target_modules=[to_q, modulation]", "lora.use_dora=true", "max_steps=1"]
    run = finetune(settings(parts, "lora"), tmp_path, *words)
    tensors = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[-3] for name in tensors if "lora_A" in name} == {"to_q", "modulation"}
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {3}
    assert any("magnitude" in name for name in tensors)


# --- classes -------------------------------------------------------------------------------------------------------


def test_new_classes_begin_with_the_named_class_or_the_mean(parts: Path, tmp_path: Path) -> None:
    table = load(parts / "pipeline").transformer.label_embedder.table.weight
    found = {}
    for name, words in {"mean": [], "named": ["labels.start_from.bird=fish"]}.items():
        run = finetune(settings(parts, "labels"), tmp_path / name, *words, "optimizer.learning_rate=1e-9")
        found[name] = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")[
            "transformer.label_embedder.rows"
        ]
    assert torch.allclose(found["mean"][0], table[:3].mean(0), atol=1e-6)
    assert torch.allclose(found["named"][0], table[2], atol=1e-6)


def test_unconditional_pipelines_are_tuned_on_flat_folders(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "parts", num_classes=0)
    images = write_images(tmp_path / "images", classes=[])
    for mode in ("full", "lora"):
        run = finetune(
            finetune_settings(pipeline, images, mode), tmp_path / mode, "max_steps=1", "sample.every_steps=1"
        )
        assert (run / "samples" / "step-00000001.png").is_file()
    load(tmp_path / "full" / "run" / "pipeline")(num_inference_steps=2)


def test_a_weaker_model_that_no_longer_fits_is_left_out(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weaker = load(parts / "pipeline").transformer
    defaults = {"num_inference_steps": 2, "guidance_scale": 1.5, "guidance_method": "autoguidance"}
    folder = tmp_path / "parts"
    shutil.copytree(parts / "rae", folder / "rae")
    pipeline = write_pipeline(folder, guidance_transformer=weaker, sampling_defaults=defaults)
    run = finetune(finetune_settings(pipeline, parts / "images", "full"), tmp_path, "max_steps=1")
    assert "guidance_transformer has 3 classes, the generator now 2: it is left out" in caplog.text
    released = load(run / "pipeline")
    assert released.guidance_transformer is None
    assert released.config.sampling_defaults == {**defaults, "guidance_method": None}
    draw(released, "bird")


def test_a_copy_without_the_weaker_model_loads_the_adapter(
    parts: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = load(parts / "pipeline")
    pipeline.register_modules(guidance_transformer=load(parts / "pipeline").transformer)
    pipeline.save_pretrained(tmp_path / "weaker")
    copied = ClassToImagePipeline.from_pretrained(tmp_path / "weaker", guidance_transformer=None)
    copied.save_pretrained(tmp_path / "copy")
    copied = load(tmp_path / "copy")
    copied.load_lora_weights(finished["labels"] / "adapter")
    assert draw(copied, "bird").shape == (1, 3, 32, 32)


@pytest.mark.parametrize("mode", ["lora", "labels"])
def test_muon_trains_what_is_trained_of_a_frozen_generator(parts: Path, tmp_path: Path, mode: str) -> None:
    run = finetune(settings(parts, mode), tmp_path, "optimizer.name=muon")
    optimizer = load_file(max((run / "checkpoints").iterdir()) / "optimizer.safetensors")
    assert optimizer.keys() and all(name.startswith("muon") for name in optimizer)  # matrices alone
    finetune(settings(parts, mode), tmp_path, "optimizer.name=muon", "max_steps=5")


def lora_of(architecture: Any, parts: Path, tmp_path: Path, *words: str, **more: Any) -> torch.Tensor:
    """Tune a tiny generator of a class in the latents of a KL autoencoder; => what it draws of the new class."""
    size, widths = TINY[architecture]
    cls = getattr(repagen, ARCHITECTURES[architecture])
    shape = {"sample_size": 8, "in_channels": 4, "num_classes": 3, "patch_size": 2}
    torch.manual_seed(2)
    transformer = cls(**cls.config_for_size(size, **widths, **shape, **more))
    transformer.initialize_weights()
    folder = tmp_path / "parts"
    shutil.copytree(parts / "kl", folder / "kl")
    shutil.copytree(parts / "rae", folder / "rae")
    pipeline = write_pipeline(
        folder,
        transformer=transformer,
        vae=AutoencoderKL.from_pretrained(folder / "kl"),
        scheduler=repagen.sampler_preset("dit-ddpm" if architecture == "dit" else "repa-ode")[0],
    )
    words = ("max_steps=1", "micro_batch_size=null", *words)
    run = finetune(finetune_settings(pipeline, parts / "images", "lora"), tmp_path, *words)
    tuned = load(pipeline)
    tuned.load_lora_weights(run / "adapter")
    return draw(tuned, "bird")


def test_adapters_of_a_generator_that_counts_discrete_steps(parts: Path, tmp_path: Path) -> None:
    assert torch.isfinite(lora_of("dit", parts, tmp_path)).all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in TINY if name != "dit"])
def test_adapters_of_every_generator(parts: Path, tmp_path: Path, architecture: str) -> None:
    assert torch.isfinite(lora_of(architecture, parts, tmp_path)).all()


@pytest.mark.slow
def test_a_generator_with_a_class_token_needs_its_encoder(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"alignment.class_token: none, but .* one of width 16, .*set alignment"):
        lora_of("sit", parts, tmp_path / "without", class_token_dim=16)
    word = f"alignment.class_token.encoder={parts / 'encoder'}"
    assert torch.isfinite(lora_of("sit", parts, tmp_path / "with", word, class_token_dim=16)).all()


@pytest.mark.parametrize("mode", ["lora", "labels"])
def test_gradients_reach_what_is_trained_through_checkpointing(
    parts: Path, tmp_path: Path, finished: dict[str, Path], mode: str
) -> None:
    words = ["gradient_checkpointing=true", "prior.images_per_class=2"]
    run = finetune(settings(parts, mode), tmp_path, *words[: 2 if mode == "lora" else 1])
    ours, theirs = ([row["grad_norm"] for row in metric_rows(folder)] for folder in (run, finished[mode]))
    assert ours == pytest.approx(theirs, rel=1e-3)


# --- prior preservation --------------------------------------------------------------------------------------------


def test_prior_images_are_the_pipelines_own_of_the_classes_that_the_data_lacks(
    parts: Path, finished: dict[str, Path]
) -> None:
    folder = finished["lora"] / "prior"
    assert [len(list((folder / name).iterdir())) for name in ("000000", "000001")] == [2, 2]
    assert len(list(folder.iterdir())) == 3  # dog, fish (not cat, which is in the data), and what they are made of
    facts = json.loads((finished["lora"] / "adapter" / "training.json").read_text())
    assert (facts["dataset_images"], facts["prior_images"]) == (6, 4)


def test_interrupted_prior_images_go_on_and_are_the_same(
    parts: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = finished["lora"] / "prior"
    shutil.copytree(kept, tmp_path / "run" / "prior")
    lost = tmp_path / "run" / "prior" / "000001" / "000001.png"
    lost.unlink()
    calls: list[Any] = []
    call = ClassToImagePipeline.__call__
    monkeypatch.setattr(ClassToImagePipeline, "__call__", lambda *a, **k: calls.append(a) or call(*a, **k))
    words = ["prior.images_per_class=2", "prior.forward_batch_size=3"]
    again = finetune(settings(parts, "lora"), tmp_path, *words)
    prior, grid = (labels for _, labels in calls)
    assert prior == [2] and len(grid) > 1  # the batch that had lost one, alone; then the grid beside the release
    assert lost.read_bytes() == (kept / "000001" / "000001.png").read_bytes()
    assert result_bytes(again) == result_bytes(finished["lora"])


PRIOR_WORDS = ["prior.images_per_class=2", "prior.forward_batch_size=3"]


@pytest.mark.parametrize(
    ("word", "key"), [("seed=1", "seed"), ("prior.guidance_scale=2", "prior.guidance_scale"), ("", "scheduler")]
)
def test_prior_images_of_a_run_with_checkpoints_are_never_drawn_anew(
    parts: Path, finished: dict[str, Path], tmp_path: Path, word: str, key: str
) -> None:
    shutil.copytree(finished["lora"], tmp_path / "run")
    shutil.copytree(parts, tmp_path / "parts")
    if not word:
        path = tmp_path / "parts" / "pipeline" / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": 3.0}))
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "prior").rglob("*.*")}
    with pytest.raises(UserError, match=rf"{key}.* when the images in .*prior were drawn .*set it back"):
        finetune(settings(tmp_path / "parts", "lora"), tmp_path, *PRIOR_WORDS, *filter(None, [word]))
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "prior").rglob("*.*")} == before
    shutil.rmtree(tmp_path / "run" / "prior")
    with pytest.raises(UserError, match=r"prior.images_per_class: 2, but the run has checkpoints and no images"):
        finetune(settings(tmp_path / "parts", "lora"), tmp_path, *PRIOR_WORDS)


def test_changed_prior_images_are_refused_and_leftovers_swept(
    parts: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(finished["lora"], tmp_path / "run")
    image = tmp_path / "run" / "prior" / "000001" / "000001.png"
    drawn = image.read_bytes()
    image.write_bytes(image.with_name("000000.png").read_bytes())
    leftover = image.with_name(".tmp-1-000002.png")
    leftover.touch()
    with pytest.raises(
        UserError, match=r"prior: 1 of the images in .*prior are not those .*000001/000001.png.*delete"
    ):
        finetune(settings(parts, "lora"), tmp_path, *PRIOR_WORDS)
    assert not leftover.exists()
    image.unlink()
    finetune(settings(parts, "lora"), tmp_path, *PRIOR_WORDS)
    assert image.read_bytes() == drawn


# --- the same numbers however the work is cut ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_continued_run_is_equal_bit_for_bit(
    parts: Path, finished: dict[str, Path], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"full": ["labels.keep=[dog]"], "lora": ["prior.images_per_class=2", "prior.forward_batch_size=3"]}
    log = Run.log

    def log_and_stop(self: Run, step: int, row: Any) -> None:
        log(self, step, row)
        if step == 3:
            self._stop.requested = True

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        with pytest.raises(RunStopped, match="stopped after step 3 of 4"):
            finetune(settings(parts, mode), tmp_path, *words.get(mode, []))
    run = finetune(settings(parts, mode), tmp_path, *words.get(mode, []))
    assert metric_rows(run) == metric_rows(finished[mode])
    assert result_bytes(run) == result_bytes(finished[mode])


def test_dropout_and_sample_grids_change_no_number_of_a_continued_run(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(parts, "lora") | {"lora": {"rank": 2, "dropout": 0.3}}
    whole = finetune(values, tmp_path / "whole")
    log = Run.log

    def log_and_stop(self: Run, step: int, row: Any) -> None:
        log(self, step, row)
        self._stop.requested = step == 3

    grids = "sample.every_steps=1"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        with pytest.raises(RunStopped):
            finetune(values, tmp_path, grids)
    run = finetune(values, tmp_path, grids)
    assert metric_rows(run) == metric_rows(whole)
    assert result_bytes(run) == result_bytes(whole)
    grid, other = run / "samples" / "step-00000004.png", next(iter((run / "adapter").glob("*.png")))
    assert grid.read_bytes() == other.read_bytes()  # both without dropout


def test_the_trial_step_changes_nothing(parts: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    from repagen.training.rehearsal import Rehearsal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rehearsal, "__call__", lambda *arguments: None)
        untried = finetune(settings(parts, "full"), tmp_path, "labels.keep=[dog]")
    assert metric_rows(untried) == metric_rows(finished["full"])
    ours, theirs = result_bytes(untried), result_bytes(finished["full"])
    assert {name: ours[name] for name in theirs if "micro_batch" not in name} == {
        name: content for name, content in theirs.items() if "micro_batch" not in name
    }


def test_changed_weights_data_and_settings_are_refused_when_a_run_continues(
    parts: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(finished["labels"], tmp_path / "run")
    values = settings(parts, "labels")
    for word, key in {"labels.start_from.bird=dog": "labels", "optimizer.learning_rate=1": "learning_rate"}.items():
        with pytest.raises(UserError, match=rf"{key}.*cannot continue") as caught:
            finetune(values, tmp_path, word)
        assert key != "labels" or "but {'bird': 'dog'} now" in str(caught.value)
    shutil.copytree(parts, tmp_path / "moved")
    moved = copy.deepcopy(values) | {"pipeline": str(tmp_path / "moved" / "pipeline")}
    finetune(moved, tmp_path, "max_steps=5")  # the same weights elsewhere
    weights = tmp_path / "moved" / "pipeline" / "transformer"
    model = load(tmp_path / "moved" / "pipeline").transformer
    model.proj_out.weight.data += 1
    model.save_pretrained(weights)
    with pytest.raises(UserError, match=r"pretrained: .* cannot continue with other data or models"):
        finetune(moved, tmp_path, "max_steps=6")
    write_images(tmp_path / "images", count=4)
    moved = values | {"data": {"path": str(tmp_path / "images"), "image_size": 32}}
    with pytest.raises(UserError, match=r"data: .* cannot continue with other data or models"):
        finetune(moved, tmp_path, "max_steps=6")


# --- what is told, and what is found -------------------------------------------------------------------------------


def test_parameters_memory_and_time_are_told_before_the_first_step(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "repagen")
    monkeypatch.setattr(Run, "steps", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(settings(parts, "labels"), tmp_path)
    assert "parameters: 16 trained of " in caplog.text
    assert "memory: networks 0.00 GB, optimiser 0.00 GB, averages 0.00 GB; " in caplog.text
    assert "s a step in the trial, so about 0:00:0" in caplog.text and "for 4 steps" in caplog.text


def test_micro_batches_that_fit_are_found_kept_and_give_the_same_losses(
    parts: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repagen.training.generator_loop import GeneratorTraining

    tried: list[int] = []
    rehearse = GeneratorTraining.rehearse

    def with_memory_for_two(self: Any, batch: Any) -> None:
        tried.append(len(batch["label"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        rehearse(self, batch)

    monkeypatch.setattr(GeneratorTraining, "rehearse", with_memory_for_two)
    run = finetune(settings(parts, "full"), tmp_path, "labels.keep=[dog]")
    assert tried == [4, 2, 2]
    losses = [[row["loss"] for row in metric_rows(folder)] for folder in (run, finished["full"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    tried.clear()
    finetune(settings(parts, "full"), tmp_path, "labels.keep=[dog]", "max_steps=5")
    assert tried == [2, 2]  # as the checkpoint says
    monkeypatch.setattr(
        GeneratorTraining, "rehearse", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. "))
    )
    with pytest.raises(UserError, match="micro_batch_size: not even one sample fits"):
        finetune(settings(parts, "full"), tmp_path / "other")
    with pytest.raises(UserError, match="micro_batch_size: 2 samples do not fit"):
        finetune(settings(parts, "full"), tmp_path / "third", "micro_batch_size=2")


def test_micro_batches_are_found_for_the_decoder_too(
    parts: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repagen.training.decoder_step import DecoderStep

    tried: list[int] = []
    rehearse = DecoderStep.rehearse

    def with_memory_for_two(self: Any, batch: Any) -> None:
        tried.append(len(batch["label"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        rehearse(self, batch)

    monkeypatch.setattr(DecoderStep, "rehearse", with_memory_for_two)
    run = finetune(settings(parts, "decoder"), tmp_path)
    losses = [[row["loss"] for row in metric_rows(folder)] for folder in (run, finished["decoder"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    finetune(settings(parts, "decoder"), tmp_path, "max_steps=5")
    assert tried == [4, 2, 2, 2, 2]  # the continued run begins with what its checkpoint says


def test_eight_bit_states_train_and_continue(parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = ["optimizer.name=adamw8bit", "lora.rank=256"]  # matrices of 4096 values and more
    whole = finetune(settings(parts, "lora"), tmp_path / "whole", *words)
    newest = max((whole / "checkpoints").iterdir())
    assert torch.uint8 in {tensor.dtype for tensor in load_file(newest / "optimizer.safetensors").values()}
    shutil.copytree(whole, tmp_path / "again" / "run")
    shutil.rmtree(tmp_path / "again" / "run" / "checkpoints" / newest.name)
    again = finetune(settings(parts, "lora"), tmp_path / "again", *words)
    assert result_bytes(again) == result_bytes(whole)


# --- mistakes ------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, list[str], str]] = [
    ("full", ["pipeline=missing"], "pipeline: no such folder: missing; allowed: a folder or Hub id"),
    ("full", ["pipeline={parts}/rae"], "pipeline: .*rae holds no pipeline: it has no model_index.json"),
    ("full", ["pipeline={parts}/other"], "pipeline: .*DDPMPipeline"),
    ("full", ["data.path={parts}/flat"], "data.path: .* has no classes, but .* has 3"),
    ("full", ["data.image_size=64"], "data.image_size: 64 px, but the autoencoder is for images of 32 px"),
    ("full", ["labels.keep=[dgo]"], "labels.keep has 'dgo', which is no class of this pipeline; near names: dog"),
    ("full", ["labels.keep=[7]"], "labels.keep has class 7; this model's classes are 0 to 2"),
    ("full", ["labels.start_from.brid=dog"], "labels.start_from.brid: no new class of the data; did you mean 'bird'"),
    ("full", ["labels.start_from.bird=dgo"], "labels.start_from.bird has 'dgo', which is no class"),
    ("full", ["labels.start_from.bird=[1]"], "labels.start_from.bird: must be the name or id of a class"),
    ("full", ["num_classes=5"], "num_classes: 5 expected, but 1 classes stay and 1 are new; set num_classes=2"),
    ("full", ["lora.rank=4"], "lora.rank: 4 has no effect, mode=full trains no adapter"),
    ("full", ["labels.keep=none", "prior.images_per_class=1"], "labels.keep: must be another"),
    ("full", ["evaluation.every_images=8", "labels.keep=all"], "evaluation.reference: needed, since 4 classes"),
    ("full", ["optimizer.name=adam8bit"], "optimizer.name: expected one of adamw, adamw8bit, muon, auto"),
    ("full", ["alignment.class_token.encoder={parts}/encoder"], "alignment.class_token: one of width 16, but .* none"),
    ("lora", ["lora.rank=0"], "lora.rank: must be at least 1"),
    (
        "lora",
        ["lora.target_modules=[to_z]"],
        "lora.target_modules: to_z is the end of no linear layer's name; did you mean 'to_",
    ),
    ("lora", ["labels.keep=none"], "labels.keep: must be all: mode=lora changes no class"),
    ("lora", ["alignment.self_alignment={block: 1}"], "alignment.self_alignment: must be left out"),
    ("labels", ["data.path={parts}/known"], "mode: labels trains the rows of new classes, and .* knows all"),
    ("labels", ["prior.images_per_class=1"], "prior.images_per_class: 1 has no effect, mode=labels"),
    ("decoder", ["statistics=true"], "statistics: unknown key"),
    ("decoder", ["adversarial.weight=1"], "micro_batch_size: auto tries no step of the discriminator"),
    ("decoder", ["pipeline=''"], 'pipeline: must be a folder or Hub id .*, got ""'),
    ("full", ["pipeline=' '"], 'pipeline: must be a folder or Hub id .*, got " "'),
    ("full", ["prior.guidance_scale=2"], "prior.guidance_scale: 2.0 has no effect, prior.images_per_class=0 draws"),
    ("full", ["prior.images_per_class=1", "data.path={parts}/known", "labels.keep=[dog]"], "the data has every class"),
    (
        "full",
        ["labels.start_from.st.bernard=dog"],
        r"""labels.start_from.st: .*'labels.start_from=\{"st. bernard": dog""",
    ),
    (
        "full",
        ["labels.start_from.a bird=dog"],
        r"""not of the form section.key=value; .*'section=\{"a name": value\}'""",
    ),
    ("lora", ["pipeline={parts}/weaker"], "pipeline: .* guidance_transformer without the new classes .*save a copy"),
    ("labels", ["pipeline={parts}/weaker"], "pipeline: .* guidance_transformer without the new classes .*save a copy"),
    ("decoder", ["data.image_size=64"], "data.image_size: 64 px given, but the autoencoder decodes 32 px"),
    ("decoder", ["pipeline={parts}/kl/pipeline"], "mode: the autoencoder of .* is a AutoencoderKL"),
    ("lorra", [], "mode: expected one of full, lora, labels, decoder, got \"lorra\"; did you mean 'lora'"),
]


@pytest.fixture(scope="module")
def wrong_parts(parts: Path) -> Path:
    write_images(parts / "flat", classes=[])
    write_images(parts / "known", classes=["cat", "dog"])
    (parts / "other").mkdir()
    (parts / "other" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    pipeline = load(parts / "pipeline")
    pipeline.register_modules(guidance_transformer=load(parts / "pipeline").transformer)
    pipeline.save_pretrained(parts / "weaker")
    pipeline.register_modules(guidance_transformer=None)
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(parts / "kl"))
    pipeline.save_pretrained(parts / "kl" / "pipeline")
    return parts


@pytest.mark.parametrize(("mode", "words", "message"), WRONG, ids=[f"{mode} {words}" for mode, words, _ in WRONG])
def test_mistakes_are_one_line_before_anything_long(
    wrong_parts: Path, tmp_path: Path, mode: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "steps", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(UserError, match=message) as caught:
        finetune(settings(wrong_parts, mode), tmp_path, *(word.replace("{parts}", str(wrong_parts)) for word in words))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "prior").exists()


def test_without_bitsandbytes_auto_is_adamw_and_its_name_is_refused(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repagen.training import optimizer

    monkeypatch.setattr(optimizer, "_has_bitsandbytes", lambda: False)
    monkeypatch.setattr(Run, "__init__", lambda *arguments: pytest.fail("the run began"))
    with pytest.raises(UserError, match=r"optimizer.name: adamw8bit needs bitsandbytes, which is not installed"):
        finetune(settings(parts, "full"), tmp_path, "optimizer.name=adamw8bit")


@pytest.mark.parametrize(
    ("device", "gpu", "installed", "name"),
    [("auto", True, True, "adamw8bit"), ("auto", False, True, "adamw"), ("auto", True, False, "adamw"),
     ("cpu", True, True, "adamw")],
)  # fmt: skip
def test_auto_is_eight_bit_where_that_works(
    monkeypatch: pytest.MonkeyPatch, device: str, gpu: bool, installed: bool, name: str
) -> None:
    from repagen.training import optimizer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(optimizer, "_has_bitsandbytes", lambda: installed)
    assert optimizer.resolve_optimizer(optimizer.OptimizerConfig(name="auto"), device).name == name


def test_the_resolved_optimiser_is_what_the_run_keeps(finished: dict[str, Path]) -> None:
    from repagen.config import read_preset

    assert {read_preset(finished[mode] / "config.yaml")["optimizer"]["name"] for mode in MODES} == {"adamw"}
