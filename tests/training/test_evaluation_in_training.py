"""Evaluation during training: when, of which weights, in which row; that training does not notice; restarts."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_parts import (
    finish,
    fork,
    join,
    metric_rows,
    settings,
    start,
    stop_after,
    train_settings,
    training_state,
    write_parts,
    write_settings,
)

import repagen.evaluation as evaluation_package
import repagen.training.evaluation as evaluation_module
from repagen.config import load_config
from repagen.errors import UserError
from repagen.evaluation import PipelineImages
from repagen.evaluation.generation import evaluate_generation, open_extractors
from repagen.evaluation.protocol import encoder_protocol
from repagen.evaluation.reference import open_reference
from repagen.pipelines.class_to_image import ClassToImagePipeline
from repagen.pipelines.provenance import TRAINING_FILE
from repagen.training.evaluation import KEYS, TrainingEvaluation
from repagen.training.evaluation_config import EvaluationConfig
from repagen.training.generator_config import GeneratorConfig
from repagen.training.run import Run

REFERENCE = ["data.kind=digits", "data.subset=validation", "data.image_size=32"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def evaluated_settings(parts: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """The tiny configuration, evaluated after every 20 images, that is after steps 3, 5 and 6 of 8 images."""
    values = settings(parts, folder / "run")
    values["evaluation"] = {
        "every_images": 20,
        "num_samples": 40,
        "extractor": str(parts / "encoder"),
        "reference": REFERENCE,
        **keys,
    }
    return values


def evaluated(parts: Path, folder: Path, *words: str, **keys: Any) -> Path:
    return train_settings(evaluated_settings(parts, folder, **keys), folder, *words)


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(parts, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return train_settings(settings(parts, folder / "run"), folder)


def results(run: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((run / "evaluation").glob("*.json"))}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "wall_time_s"}


def evaluation_columns(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("evaluation/")}


# --- when, and what is left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every_images", "global_batch_size", "max_steps"), [(100, 64, 9), (64, 64, 4), (1, 8, 3), (1000, 8, 5), (0, 8, 5)]
)
def test_due_after_the_step_that_reaches_a_multiple_and_at_the_end(
    every_images: int, global_batch_size: int, max_steps: int
) -> None:
    config = EvaluationConfig(every_images)
    due = [step for step in range(1, max_steps + 1) if config.due(step, global_batch_size, max_steps)]
    multiples = range(every_images, max_steps * global_batch_size + 1, every_images) if every_images else []
    expected = {-(-multiple // global_batch_size) for multiple in multiples}
    assert due == sorted(expected | {max_steps}) if every_images else due == []


def test_rows_hold_the_figures_of_the_result_files(whole: Path) -> None:
    found = results(whole)
    assert list(found) == ["step-00000003", "step-00000005", "step-00000006"]
    for row in metric_rows(whole):
        record = found.get(f"step-{row['step']:08d}")
        expected = {f"evaluation/{name}": value for name, value in record["metrics"].items()} if record else {}
        assert evaluation_columns(row) == expected
        assert not record or expected.keys() == {
            f"evaluation/{name}" for name in ("fd_encoder", "precision_encoder", "recall_encoder")
        }


def test_results_say_what_the_model_has_seen(whole: Path) -> None:
    record = results(whole)["step-00000005"]
    expected = {"step": 5, "images": 40, "dataset_images": 1797, "global_batch_size": 8, "program": "generator"}
    assert expected.items() <= record["training"].items()
    assert (record["num_samples"], record["num_reference"]) == (40, 355)
    assert record["samples"]["guidance_scale"] == 1.0 and record["samples"]["num_inference_steps"] == 2


def test_the_last_figures_are_those_of_the_released_pipeline(parts: Path, whole: Path) -> None:
    """The weights that are evaluated are the EMA's, and nothing of the training is left on the way to the figure."""
    pipeline = ClassToImagePipeline.from_pretrained(whole / "pipeline")
    protocol = encoder_protocol(str(parts / "encoder"))
    samples = PipelineImages(pipeline, 40, guidance_scale=1.0)
    alone = evaluate_generation(samples, open_reference(REFERENCE), protocol, open_extractors(protocol)).as_dict()
    during = results(whole)["step-00000006"]
    assert alone["samples"]["pixels_sha256"] == during["samples"]["pixels_sha256"]
    assert alone["metrics"] == during["metrics"]
    assert alone["training"].items() <= during["training"].items() and alone["training"]["images"] == 48


def test_a_release_says_what_its_model_has_seen_and_diffusers_loads_it(plain: Path) -> None:
    from diffusers import DiffusionPipeline

    facts = json.loads((plain / "pipeline" / TRAINING_FILE).read_text())
    assert facts == {
        "step": 6,
        "images": 48,
        "dataset_images": 1797,
        "global_batch_size": 8,
        "program": "generator",
        "recipe": "",
    }
    loaded = DiffusionPipeline.from_pretrained(plain / "pipeline")
    assert type(loaded) is ClassToImagePipeline
    assert PipelineImages(loaded, 2).training == facts


def test_a_pipeline_from_nowhere_has_no_training(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `training.json` that happens to lie in the working folder is not its own."""
    loaded = ClassToImagePipeline.from_pretrained(plain / "pipeline")
    made = ClassToImagePipeline(loaded.transformer, loaded.vae, loaded.scheduler)
    (tmp_path / TRAINING_FILE).write_text('{"images": 1}')
    monkeypatch.chdir(tmp_path)
    assert PipelineImages(made, 2).training == {}


def test_the_training_images_are_the_reference_by_default(parts: Path, tmp_path: Path) -> None:
    run = evaluated(parts, tmp_path, "data.subset=train", reference=None, every_images=1000, metrics=["fd"])
    [record] = results(run).values()
    assert record["num_reference"] == 1442 and record["reference"]["subset"] == "train"
    assert list(record["metrics"]) == ["fd_encoder"]


def test_statistics_of_a_file_serve_as_reference(parts: Path, tmp_path: Path, whole: Path) -> None:
    from repagen.evaluation.reference import save_statistics

    protocol = encoder_protocol(str(parts / "encoder"))
    extractors = open_extractors(protocol)
    digits = open_reference(REFERENCE)
    result = evaluate_generation(digits, digits, protocol, extractors)  # type: ignore[arg-type]
    save_statistics(tmp_path / "digits.npz", result.reference_statistics, result.spaces, result.reference)
    keys: dict[str, Any] = {"reference": str(tmp_path / "digits.npz"), "every_images": 1000}
    with pytest.raises(UserError, match=r"^evaluation.reference: precision_recall .* statistics alone"):
        evaluated(parts, tmp_path, **keys)
    [record] = results(evaluated(parts, tmp_path, **keys, metrics=["fd"])).values()
    expected = results(whole)["step-00000006"]["metrics"]["fd_encoder"]
    assert record["metrics"] == {"fd_encoder": pytest.approx(expected, rel=1e-6)}


def test_figures_follow_the_samplers_options_and_the_seed(parts: Path, tmp_path: Path) -> None:
    hashes = set()
    cases: list[dict[str, Any]] = [{}, {"seed": 1}, {"num_inference_steps": 3}, {"guidance_scale": 5.0}]
    for number, keys in enumerate(cases):
        word = "optimizer.learning_rate=0.1"  # so that guidance finds classes to tell apart
        run = evaluated(parts, tmp_path / str(number), word, every_images=1000, metrics=["fd"], **keys)
        hashes.add(results(run)["step-00000006"]["samples"]["pixels_sha256"])
    assert len(hashes) == len(cases)


@pytest.mark.parametrize("shown", [False, True])
def test_progress_is_shown_where_the_configuration_says_so(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: bool
) -> None:
    evaluated(parts, tmp_path, f"progress_bar={str(shown).lower()}", "max_steps=1", metrics=["fd"])
    errors = capsys.readouterr().err
    assert [name in errors for name in ("reference:", "samples:")] == [shown, shown]


def test_trackers_get_the_figures(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator

    logged: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.update({step: values}))
    run = evaluated(parts, tmp_path, "log_with=[tensorboard]", metrics=["fd"])
    rows = {row["step"]: evaluation_columns(row) for row in metric_rows(run)}
    assert {step: evaluation_columns(values) for step, values in logged.items()} == rows


# --- training does not notice --------------------------------------------------------------------------------------


def test_losses_and_weights_are_those_without_evaluation(plain: Path, whole: Path) -> None:
    own = [
        {key: value for key, value in row.items() if not key.startswith("evaluation/")} for row in metric_rows(whole)
    ]
    assert own == metric_rows(plain)
    assert training_state(whole) == training_state(plain)


@pytest.mark.parametrize(
    "words",
    [
        ["alignment.self_alignment={block: 1, teacher_block: 2}"],
        ["precision=bf16", "num_workers=1", "micro_batch_size=4"],
    ],
    ids=["teacher", "bf16"],
)
def test_losses_are_those_without_evaluation_whatever_is_trained(
    parts: Path, tmp_path: Path, words: list[str]
) -> None:
    values = evaluated_settings(parts, tmp_path, every_images=8, metrics=["fd"])
    busy = train_settings(values, tmp_path / "busy", *words)
    quiet = train_settings(values, tmp_path / "quiet", *words, "evaluation.every_images=0")
    assert all(evaluation_columns(row) for row in metric_rows(busy))
    assert [row["loss"] for row in metric_rows(busy)] == [row["loss"] for row in metric_rows(quiet)]
    assert training_state(busy) == training_state(quiet)


def test_everything_that_runs_on_is_as_before(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = TrainingEvaluation.__call__

    def state(evaluation: TrainingEvaluation) -> dict[str, Any]:
        pipeline = evaluation.samples.pipeline
        modules = [*pipeline.transformer.modules(), *pipeline.vae.modules()]
        scheduler = pipeline.scheduler
        return {
            "random": torch.get_rng_state().tolist(),
            "modes": [module.training for module in modules],
            "gradients": [parameter.requires_grad for module in modules for parameter in module.parameters(False)],
            "scheduler": (id(scheduler), repr(sorted((name, str(value)) for name, value in vars(scheduler).items()))),
            "precision": torch.get_float32_matmul_precision(),
            "cudnn": [
                getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
            ],
            "autocast": torch.is_autocast_enabled("cpu"),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "grad": torch.is_grad_enabled(),
        }

    inside: list[tuple[bool, str]] = []
    evaluate = evaluation_module.evaluate_generation

    def watched(samples: Any, *arguments: Any, **options: Any) -> Any:
        inside.append((samples.pipeline.transformer.training, torch.get_float32_matmul_precision()))
        torch.rand(3)  # whatever a sampler may draw
        return evaluate(samples, *arguments, **options)

    def compared(self: TrainingEvaluation, step: int) -> dict[str, float]:
        before = state(self)
        row = call(self, step)
        assert state(self) == before
        assert any(before["modes"]) and before["precision"] == "high"
        return row

    monkeypatch.setattr(evaluation_module, "evaluate_generation", watched)
    monkeypatch.setattr(TrainingEvaluation, "__call__", compared)
    evaluated(parts, tmp_path, "precision=tf32", metrics=["fd"])
    assert inside == [(False, "highest")] * 3


def test_an_evaluation_that_fails_puts_everything_back_and_names_the_step(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise UserError("sample 3 has pixels that are not finite")

    monkeypatch.setattr(evaluation_module, "evaluate_generation", failing)
    with pytest.raises(UserError, match=r"^evaluation: after 3 steps: sample 3 has pixels that are not finite"):
        evaluated(parts, tmp_path)
    assert len(metric_rows(tmp_path / "run")) == 2


def test_the_clock_of_the_rows_stands_still(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from time import sleep

    from repagen.training.log import read_metrics

    evaluate = evaluation_module.evaluate_generation

    def slow(*arguments: Any, **options: Any) -> Any:
        sleep(2)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluation_module, "evaluate_generation", slow)
    run = evaluated(parts, tmp_path, every_images=1000, metrics=["fd"])
    assert read_metrics(run / "metrics.jsonl")[-1]["time_s"] < 2


# --- restarts ------------------------------------------------------------------------------------------------------


def compare_runs(run: Path, whole: Path) -> None:
    assert metric_rows(run) == metric_rows(whole)
    assert training_state(run) == training_state(whole)
    old, new = results(whole), results(run)
    assert {step: without_times(record) for step, record in new.items()} == {
        step: without_times(record) for step, record in old.items()
    }
    assert not list(run.rglob("*.partial")) and not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_continued_run_is_equal_and_evaluates_nothing_twice(
    parts: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    stop_after(evaluated_settings(parts, tmp_path), tmp_path, steps)
    made = {step: path.stat().st_mtime_ns for step, path in paths(tmp_path / "run").items()}
    monkeypatch.setattr(
        "repagen.evaluation.extraction_file.extract", lambda *arguments, **options: pytest.fail("looked again")
    )
    run = evaluated(parts, tmp_path)
    compare_runs(run, whole)
    assert made.items() <= {step: path.stat().st_mtime_ns for step, path in paths(run).items()}.items()


def paths(run: Path) -> dict[str, Path]:
    return {path.stem: path for path in (run / "evaluation").glob("*.json")}


def test_a_replayed_step_takes_its_result_unless_it_is_missing_damaged_or_of_other_weights(
    parts: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 5 and 6 are done again from checkpoint 4."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    steps: list[int] = []
    evaluate = TrainingEvaluation._evaluate

    def counted(self: TrainingEvaluation, step: int, *arguments: Any) -> dict[str, Any]:
        steps.append(step)
        return evaluate(self, step, *arguments)

    monkeypatch.setattr(TrainingEvaluation, "_evaluate", counted)

    def again(change: Callable[[Path], Any]) -> list[int]:
        steps.clear()
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        change(tmp_path / "run" / "evaluation" / "step-00000005.json")
        for leftover in ("other.partial", "reference/other.partial"):  # of settings that were changed after a kill
            (tmp_path / "run" / "evaluation" / leftover).mkdir()
        compare_runs(evaluated(parts, tmp_path), whole)
        return steps

    def other_weights(path: Path) -> None:
        record = json.loads(path.read_text())
        record["training"]["evaluation_sha256"] = "0" * 64
        path.write_text(json.dumps(record))

    assert again(lambda path: None) == []
    assert again(Path.unlink) == [5]
    assert again(lambda path: path.write_text(path.read_text()[:100])) == [5]
    assert again(other_weights) == [5]


@pytest.mark.parametrize(
    "word", ["every_images=8", "num_samples=50", "seed=3", "guidance_scale=2", "metrics=[fd]", "reference=null"]
)
def test_a_run_may_continue_with_other_evaluations(
    parts: Path, tmp_path: Path, whole: Path, plain: Path, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "repagen")
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run = evaluated(parts, tmp_path, f"evaluation.{word}")
    assert f"continuing with evaluation.{word.split('=')[0]}" in caplog.text
    assert [row["loss"] for row in metric_rows(run)] == [row["loss"] for row in metric_rows(plain)]
    assert evaluation_columns(metric_rows(run)[-1])


def die_at(target: int, count: Path) -> None:
    """End this process like a kill at its file operation number `target` within an evaluation; write their count."""
    points, inside = 0, False
    descriptor = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal points
            if inside:
                points += 1
                if points == target:
                    os._exit(9)
                os.write(descriptor, b".")
            return function(*arguments, **options)

        return call

    def entered(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            inside = True
            try:
                return function(*arguments, **options)
            finally:
                inside = False

        return call

    os.replace = watched(os.replace)
    Path.rename = watched(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = watched(shutil.rmtree)
    TrainingEvaluation.__call__ = entered(TrainingEvaluation.__call__)  # type: ignore[method-assign]
    module: Any = evaluation_module
    module.look_at_reference = entered(module.look_at_reference)
    log = Run.log

    def last(self: Run, *arguments: Any) -> None:
        entered(watched(log))(self, *arguments)  # between the result and its row

    Run.log = last  # type: ignore[method-assign]


def killed_at(parts: Path, folder: Path, target: int) -> int | None:
    folder.mkdir(exist_ok=True)
    config = write_settings(evaluated_settings(parts, folder), folder / "config.yaml")
    return join(fork(config, prepare=partial(die_at, target, folder / "count")))


def kill_test(parts: Path, folder: Path, whole: Path, every: int) -> None:
    assert killed_at(parts, folder / "count", -1) == 0
    total = (folder / "count" / "count").stat().st_size
    assert total > 40
    for target in range(1, total + 1, every):
        assert killed_at(parts, folder / str(target), target) == 9
        assert killed_at(parts, folder / str(target), -1) == 0, target
        compare_runs(folder / str(target) / "run", whole)


def test_killed_within_evaluations_ends_with_the_same_rows_and_bytes(parts: Path, tmp_path: Path, whole: Path) -> None:
    kill_test(parts, tmp_path, whole, every=55)


@pytest.mark.slow
def test_killed_at_every_file_operation_of_evaluations(parts: Path, tmp_path: Path, whole: Path) -> None:
    kill_test(parts, tmp_path, whole, every=1)


def test_features_of_a_killed_evaluation_are_used_again(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    load = PipelineImages.load

    def interrupted(self: PipelineImages, indices: Any) -> Any:
        if len(drawn) == 64:
            raise UserError("killed")
        drawn.extend(indices)
        return load(self, indices)

    monkeypatch.setattr(PipelineImages, "load", interrupted)
    with pytest.raises(UserError, match="killed"):
        evaluated(parts, tmp_path, num_samples=100, every_images=1000)
    assert drawn == list(range(64))
    monkeypatch.setattr(PipelineImages, "load", lambda self, indices: [drawn.extend(indices), load(self, indices)][1])
    evaluated(parts, tmp_path, num_samples=100, every_images=1000)
    assert drawn == list(range(100))


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(parts: Path, tmp_path: Path) -> None:
    """With a learning rate that moves no weight, the samples are the same to the bit."""
    words = ["optimizer.learning_rate=1e-30", "max_steps=3", "checkpoint.every_steps=3"]
    values = evaluated_settings(parts, tmp_path / "two", num_samples=150)
    (tmp_path / "two").mkdir()
    code, errors = finish(start(write_settings(values, tmp_path / "two.yaml"), *words, processes=2))
    assert code == 0, errors
    one = results(evaluated(parts, tmp_path / "one", *words, num_samples=150))
    two = results(tmp_path / "two" / "run")
    assert list(one) == list(two) == ["step-00000003"]
    first, second = one["step-00000003"], two["step-00000003"]
    assert first["samples"] == second["samples"] and first["reference"] == second["reference"]
    assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-9)
    rows = metric_rows(tmp_path / "two" / "run")
    assert evaluation_columns(rows[-1]) == {f"evaluation/{name}": value for name, value in second["metrics"].items()}
    assert not list((tmp_path / "two").rglob("*.partial"))


@pytest.mark.slow
def test_two_processes_continue_and_refuse_together(parts: Path, tmp_path: Path) -> None:
    stop_after(evaluated_settings(parts, tmp_path), tmp_path, 4)
    code, errors = finish(start(tmp_path / "config.yaml", processes=2))
    assert code == 0, errors
    assert list(results(tmp_path / "run")) == ["step-00000003", "step-00000005", "step-00000006"]
    code, errors = finish(start(tmp_path / "config.yaml", "evaluation.reference=/no/such", processes=2))
    assert code != 0
    assert "repagen: error: evaluation.reference: no such folder" in errors


# --- end to end ----------------------------------------------------------------------------------------------------


def test_end_to_end_training_is_evaluated_with_the_autoencoder_of_the_step(parts: Path, tmp_path: Path) -> None:
    from repagen.training.end_to_end import train
    from repagen.training.end_to_end_config import EndToEndConfig

    values = evaluated_settings(parts, tmp_path, every_images=16, metrics=["fd"])
    values |= {"output_dir": str(tmp_path / "run"), "max_steps": 3, "autoencoder": {"path": str(parts / "kl")}}
    values["transformer"] = {"architecture": "sit", "overrides": {"hidden_size": 16, "depth": 2, "num_heads": 2}}
    values["autoencoder_training"] = {"lpips": {"weight": 0.0}, "adversarial": {"weight": 0.0}}
    train(load_config(EndToEndConfig, write_settings(values, tmp_path / "config.yaml")))
    found = results(tmp_path / "run")
    assert list(found) == ["step-00000002", "step-00000003"]
    assert [bool(evaluation_columns(row)) for row in metric_rows(tmp_path / "run")] == [False, True, True]
    pipeline = ClassToImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    protocol = encoder_protocol(str(parts / "encoder"), metrics=["fd"])
    samples = PipelineImages(pipeline, 40, guidance_scale=1.0)
    alone = evaluate_generation(samples, open_reference(REFERENCE), protocol, open_extractors(protocol)).as_dict()
    assert alone["metrics"] == found["step-00000003"]["metrics"]
    assert alone["training"]["program"] == "end_to_end"


# --- wrong input ---------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reference": "/no/such"}, "^evaluation.reference: no such folder of images: /no/such"),
    ({"reference": ["data.kind=digit"]}, "^evaluation.reference: .*data.kind=digit"),
    ({"reference": ["data.kind=digits", "data.image_size=16"]}, "^evaluation.reference: its images are 16x16 px, the"),
    ({"extractor": "/no/such"}, "^evaluation.extractor: .*/no/such"),
    ({"extractor": None, "num_samples": 1000}, "^evaluation.extractor_weights: .*give evaluation.extractor_weights"),
    ({"extractor": None, "protocol": "adm256", "metrics": ["fd"]}, "^evaluation.extractor_weights: Inception weights"),
    ({"guidance_scale": 2.0, "label_dropout": 0}, "^evaluation.guidance_scale: is 2.0, but .* null class"),
]


def test_every_option_that_becomes_a_key_is_spoken_of() -> None:
    """Messages come from the evaluation, which knows options; each that is rewritten is still in one."""
    folder = Path(evaluation_package.__file__).parent
    library = [path for path in folder.glob("*.py") if not path.stem.endswith("command")]
    texts = [
        node.value
        for path in library
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for option in KEYS:
        assert any(re.search(rf"{option}(?![a-z-])", text) for text in texts), option


def test_whole_options_become_keys() -> None:
    message = "give --extractor-weights FILE, another --extractor, or --extractors; --max-bad 1"
    expected = (
        "here: give evaluation.extractor_weights FILE, another evaluation.extractor, or --extractors; "
        "data.max_bad_images 1"
    )
    with pytest.raises(UserError) as caught, evaluation_module._naming("here"):
        raise UserError(message)
    assert str(caught.value) == expected


@pytest.mark.parametrize(("keys", "message"), WRONG, ids=[" ".join(keys) for keys, _ in WRONG])
def test_wrong_input_is_named_before_training(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    monkeypatch.setattr(Run, "steps", lambda *arguments: pytest.fail("training began"))
    dropout = keys.pop("label_dropout", 0.1)
    with pytest.raises(UserError, match=message) as caught:
        evaluated(parts, tmp_path, f"label_dropout={dropout}", **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"metrics": ["kid"], "num_samples": 999}, "num_samples: kid needs at least 1000 samples, got 999"),
    ({"num_samples": 3}, "num_samples: precision_recall needs at least 4 samples, got 3"),
    ({"metrics": ["fd"], "num_samples": 1}, "num_samples: must be at least 2"),
    ({"metrics": ["sfid"]}, "metrics: must be without sfid, inception_score"),
    ({"metrics": []}, "metrics: must be at least one metric"),
    ({"metrics": ["fid"]}, "metrics.0: expected one of"),
    ({"extractor": None, "protocol": "torch-fidelity"}, "num_samples: inception_score|num_samples: kid needs"),
    ({"extractor": None, "protocol": "nosuch"}, "protocol: no protocol 'nosuch'"),
    ({"extractor": None, "protocol": "adm256", "metrics": ["cmmd"]}, "metrics: must be among those of the protocol"),
    ({"extractor": None, "protocol": "raev2"}, "metrics: fdr needs a table of normalisers"),
    ({"protocol": "adm256"}, "protocol: must be left out beside evaluation.extractor"),
    ({"extractor_weights": "file"}, "extractor_weights: must be left out"),
    ({"guidance_scale": 0.5}, "guidance_scale: must be at least 1"),
    ({"every_images": -1}, "every_images: must be at least 0"),
    ({"num_inference_steps": 1}, "num_inference_steps: must be at least 2"),
    ({"forward_batch_size": 0}, "forward_batch_size: must be at least 1"),
    ({"reference": ""}, "reference: must be a path or words"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message[:25] for _, message in REFUSED])
def test_what_the_configuration_alone_tells_is_refused_when_it_is_read(
    parts: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    config = write_settings(evaluated_settings(parts, tmp_path, **keys), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=rf"config.yaml:evaluation\.({message})"):
        load_config(GeneratorConfig, config)


def test_cached_latents_need_a_reference(parts: Path, tmp_path: Path) -> None:
    values = evaluated_settings(parts, tmp_path, reference=None)
    values["data"] = {"kind": "latents", "path": "somewhere"}
    with pytest.raises(UserError, match=r"config.yaml:evaluation.reference: needed, since data.kind=latents"):
        load_config(GeneratorConfig, write_settings(values, tmp_path / "config.yaml"))


def test_too_few_reference_images_are_refused_before_training(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "steps", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(UserError, match=r"^evaluation.reference: kid .* at least 1000 reference images, got 355"):
        evaluated(parts, tmp_path, metrics=["kid"], num_samples=1000)


def test_unreadable_training_images_count_as_in_training(parts: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (32, 32), (number * 20, 0, 0)).save(tmp_path / "images" / f"{number:02d}.png")
    (tmp_path / "images" / "05.png").write_bytes(b"no image")
    words = ["data.kind=folder", f"data.path={tmp_path / 'images'}"]
    keys: dict[str, Any] = {"reference": None, "every_images": 1000, "metrics": ["fd"]}
    with pytest.raises(UserError, match=r"^evaluation.reference: 1 unreadable .* out with data.max_bad_images 1"):
        evaluated(parts, tmp_path / "none", *words, **keys)
    [record] = results(evaluated(parts, tmp_path / "one", *words, "data.max_bad_images=1", **keys)).values()
    assert record["num_reference"] == 11 and record["reference"]["left_out"][0].endswith("05.png")
