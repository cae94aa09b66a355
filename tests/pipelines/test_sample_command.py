from __future__ import annotations

import json
import runpy
import shlex
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from lora_parts import FILE, make_adapter, rows
from PIL import Image
from tiny_pipelines import (
    ID2LABEL,
    NUM_CLASSES,
    PATCH,
    SIDE,
    PipelineMaker,
    any_size_autoencoder,
    tiny_pipeline,
    tiny_text_pipeline,
    tiny_transformer,
)

import repagen
from repagen import (
    ClassToImagePipeline,
    DiTDHTransformer2DModel,
    ELTTransformer2DModel,
    RAEv2Transformer2DModel,
    cli,
)
from repagen.errors import UserError
from repagen.pipelines.png import read_png_facts
from repagen.pipelines.provenance import TRAINING_FILE
from repagen.pipelines.sample_command import load_pipeline
from repagen.randomness import generator_for

DOOR = Path(__file__).parents[2] / "pipelines" / "class_to_image"
EDGE = SIDE * PATCH


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(id2label=ID2LABEL).save_pretrained(folder)
    return str(folder)


def sample(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["repagen", "sample", "--num-inference-steps", "2", *words])
    cli.main()


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted((folder / "images").glob("*.png"))}


def test_writes_images_and_grid(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    sample(monkeypatch, "--model", model, "--class-labels", "crane", "1", "tabby", "--output", str(out))
    assert "3 images are in" in capsys.readouterr().out
    images = pixels(out)
    assert list(images) == ["000000.png", "000001.png", "000002.png"]
    grid = np.asarray(Image.open(out / "grid.png")).astype(int)
    assert grid.shape == (2 * EDGE, 2 * EDGE, 3)
    np.testing.assert_array_equal(grid[:EDGE, EDGE:], images["000001.png"])
    assert not grid[EDGE:, EDGE:].any()


def test_an_image_depends_on_seed_and_number_only(model, tmp_path, monkeypatch):
    common = ("--model", model, "--number", "5", "--guidance-scale", "2")
    for name, options in {"a": ("--batch-size", "5"), "b": ("--batch-size", "2"), "c": ("--seed", "1")}.items():
        sample(monkeypatch, *common, *options, "--output", str(tmp_path / name))
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert all(np.abs(a[name] - b[name]).max() <= 1 for name in a)  # rounding of differently shaped products
    assert all(np.abs(a[name] - c[name]).max() > 1 for name in a)


def test_default_is_one_image_of_every_class(model, tmp_path, monkeypatch):
    sample(monkeypatch, "--model", model, "--output", str(tmp_path / "out"))
    assert len(pixels(tmp_path / "out")) == NUM_CLASSES


def test_the_pipelines_defaults_count_until_an_option_is_given(tmp_path, monkeypatch):
    defaults = {"num_inference_steps": 3, "guidance_scale": 4.0, "guidance_channels": 3, "zero_init_steps": 1}
    tiny_pipeline(sampling_defaults=defaults).save_pretrained(tmp_path / "recipe")
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    given = [
        "--num-inference-steps",
        "3",
        "--guidance-scale",
        "4",
        "--guidance-channels",
        "3",
        "--zero-init-steps",
        "1",
    ]
    runs = {"recipe": [], "plain": given, "recipe unguided": ["--guidance-scale", "1"]}
    for name, options in runs.items():
        words = ["--model", str(tmp_path / name.split()[0]), *options, "--output", str(tmp_path / f"{name}.out")]
        monkeypatch.setattr(sys, "argv", ["repagen", "sample", *words])
        cli.main()
    recipe, plain, unguided = (pixels(tmp_path / f"{name}.out") for name in runs)
    assert all(np.array_equal(recipe[name], plain[name]) for name in recipe)
    assert not all(np.array_equal(recipe[name], unguided[name]) for name in recipe)


def test_methods_and_loops_are_options(tmp_path, monkeypatch):
    tiny_pipeline(RAEv2Transformer2DModel).save_pretrained(tmp_path / "raev2")
    tiny_pipeline(ELTTransformer2DModel).save_pretrained(tmp_path / "elt")
    words = {"raev2": ["--guidance-method", "internal", "--guidance-scale", "2"], "elt": ["--num-loops", "1"]}
    for name, options in words.items():
        for output, given in ((f"{name}-plain", []), (f"{name}-with", options)):
            sample(monkeypatch, "--model", str(tmp_path / name), *given, "--output", str(tmp_path / output))
        plain, with_options = (pixels(tmp_path / f"{name}-{kind}") for kind in ("plain", "with"))
        assert not all(np.array_equal(plain[image], with_options[image]) for image in plain)


def test_unconditional_model(tmp_path, monkeypatch):
    tiny_pipeline(transformer=tiny_transformer(num_classes=0, class_dropout_prob=0.0)).save_pretrained(tmp_path / "m")
    sample(monkeypatch, "--model", str(tmp_path / "m"), "--number", "3", "--output", str(tmp_path / "out"))
    assert len(pixels(tmp_path / "out")) == 3


def test_a_name_made_of_digits_is_a_name(tmp_path, monkeypatch):
    names = {"0": "1", "1": "0", "2": "2", "3": "3"}
    tiny_pipeline(id2label=names).save_pretrained(tmp_path / "m")
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    sample(monkeypatch, "--model", str(tmp_path / "m"), "--class-labels", "1", "--output", str(tmp_path / "a"))
    sample(monkeypatch, "--model", str(tmp_path / "plain"), "--class-labels", "0", "--output", str(tmp_path / "b"))
    np.testing.assert_array_equal(pixels(tmp_path / "a")["000000.png"], pixels(tmp_path / "b")["000000.png"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--class-labels", "9"), "class 9; this model's classes are 0 to 3"),
        (("--class-labels", "gloden retriever"), "near names: golden retriever"),
        (("--number", "0"), "--number must be at least 1, got 0"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--guidance-interval", "1", "0"), "0 <= low <= high <= 1"),
        (("--num-loops", "2"), "the transformer is not looped"),
        (("--guidance-method", "internal", "--guidance-scale", "2"), "has no base head"),
        (("--revision", "v1"), "is a folder here, which has no revisions; leave it out, or name a Hub id"),
        (("--model", "no/such/folder"), "--model: pipeline 'no/such/folder': neither a folder"),
        (("--model", "org/absent"), "--model: pipeline 'org/absent': no such folder here, and not in the local cache"),
        (("--output", "."), "which is not of this command; name a new folder"),
        (
            ("--attention-backend", "eager"),
            "--attention-backend eager does not run on cpu in float32 (attention backe",
        ),
        (("--attention-backend", "_native_efficient"), "does not run on cpu in float32"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(model, tmp_path, monkeypatch, capsys, words, message):
    defaults = {"--model": model, "--output": str(tmp_path / "out")}
    given = [word for pair in defaults.items() if pair[0] not in words for word in pair]
    with pytest.raises(SystemExit) as exit_info:
        sample(monkeypatch, *given, *words)
    assert exit_info.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
    assert message in line


def test_an_image_says_how_it_came_about(tmp_path, monkeypatch):
    defaults = {"guidance_scale": 3.0, "guidance_interval": [0.1, 0.9]}
    model = tmp_path / "Größe of it"
    tiny_pipeline(id2label=ID2LABEL, sampling_defaults=defaults).save_pretrained(model)
    (model / TRAINING_FILE).write_text(json.dumps({"step": 1200, "recipe": "a tiny one", "images": 9}))
    words = ["--model", str(model), "--class-labels", "3", "tabby", "--seed", "7"]
    sample(monkeypatch, *words, "--output", str(tmp_path / "out"))
    with Image.open(tmp_path / "out/images/000001.png") as image:
        assert image.info["Software"] == f"repagen {repagen.__version__}"
        assert image.info["Description"] == (
            "class 0 (tabby, tabby cat), seed 7, image 1, 2 steps, guidance 3, recipe a tiny one, step 1200"
        )
        facts = json.loads(image.info["repagen"])
    expected = {
        "kind": "sample", "index": 1, "seed": 7, "class_label": 0, "class_name": "tabby, tabby cat",
        "num_inference_steps": 2, "guidance_scale": 3.0, "guidance_interval": [0.1, 0.9], "guidance_method": "cfg",
        "zero_init_steps": 0, "batch_size": 8, "adapters": [], "recipe": "a tiny one", "training_step": 1200,
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert (facts["scheduler"]["class"], facts["scheduler"]["shift"]) == ("FlowMatchEulerDiscreteScheduler", 2.0)
    assert facts["model"]["path"] == str(model) and len(facts["model"]["sha256"]) == 64


def test_the_backend_of_the_environment_is_a_fact(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    sample(monkeypatch, "--model", model, "--number", "1", "--output", str(tmp_path))
    facts = read_png_facts(tmp_path / "images/000000.png")
    assert facts["attention_backend"] == "_native_math"
    assert "--attention-backend _native_math" in facts["command"]


def test_the_command_in_the_metadata_draws_the_same_files(tmp_path, monkeypatch):
    tiny_pipeline(id2label=ID2LABEL).save_pretrained(tmp_path / "a model")
    options = [
        "--class-labels",
        "golden retriever",
        "2",
        "--number",
        "5",
        "--batch-size",
        "2",
        "--guidance-scale",
        "2",
    ]
    options += ["--guidance-interval", "0.1", "0.95", "--dtype", "bfloat16", "--attention-backend", "_native_math"]
    sample(monkeypatch, "--model", str(tmp_path / "a model"), *options, "--output", str(tmp_path / "a"))
    program, *words = shlex.split(read_png_facts(tmp_path / "a/images/000004.png")["command"])
    assert program == "repagen" and "--num-inference-steps" in words
    monkeypatch.setattr(sys, "argv", [program, *words, "--output", str(tmp_path / "b")])
    cli.main()
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / out / "images").iterdir()} for out in "ab")
    assert len(first) == 5 and first == second
    assert (tmp_path / "a/grid.png").read_bytes() == (tmp_path / "b/grid.png").read_bytes()


def test_an_interrupted_command_continues(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["--model", model, "--number", "5", "--batch-size", "2", "--output", str(out)]
    sample(monkeypatch, *words)
    whole = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    (out / "grid.png").unlink()
    (out / "images/000003.png").unlink()
    for leftover in ("images/.tmp-1-000003.png", ".tmp-1-grid.png"):
        (out / leftover).write_bytes(b"half")
    kept = (out / "images/000002.png").stat().st_mtime_ns
    capsys.readouterr()
    sample(monkeypatch, *words)
    assert "(4 of them were there already)" in capsys.readouterr().out
    assert {name: (out / "images" / name).read_bytes() for name in whole} == whole
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "images"]
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(whole)
    assert (out / "images/000002.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "000000.png was made with other values of command, seed; name a new folder"),
        (["--number", "5"], "000000.png was made with other values of command; name a new folder"),
    ],
)
def test_images_of_another_command_are_not_mixed_in(model, tmp_path, monkeypatch, capsys, change, message):
    words = ["--model", model, "--output", str(tmp_path)]
    sample(monkeypatch, *words)
    with pytest.raises(SystemExit):
        sample(monkeypatch, *words, *change)
    assert message in capsys.readouterr().err


def test_a_foreign_image_is_not_mixed_in(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/holiday.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        sample(monkeypatch, "--model", model, "--output", str(tmp_path))
    assert "images holds holiday.png, which is not of this command; name a new folder" in capsys.readouterr().err


def test_a_damaged_image_is_not_kept_in_silence(model, tmp_path, monkeypatch, capsys):
    words = ["--model", model, "--output", str(tmp_path)]
    sample(monkeypatch, *words)
    path = tmp_path / "images/000001.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(SystemExit):
        sample(monkeypatch, *words)
    assert f"{path}: no PNG with metadata of repagen" in capsys.readouterr().err


def test_the_bar_shows_the_step(model, tmp_path, monkeypatch, capsys):
    sample(monkeypatch, "--model", model, "--output", str(tmp_path / "out"))
    assert "step 2/2" in capsys.readouterr().err


def test_adapters_with_weights_and_their_classes(tmp_path, monkeypatch):
    model, a, b = (str(tmp_path / name) for name in ("model", "a=1", "b"))
    tiny_pipeline(id2label=ID2LABEL).save_pretrained(model)
    make_adapter(tiny_pipeline, Path(a), label_rows=rows("heron"), seed=1)
    make_adapter(tiny_pipeline, Path(b), seed=2)
    words = ["--model", model, "--class-labels", "heron", "0", "--seed", "3"]
    sample(monkeypatch, *words, "--lora", a, f"{b}=0.5", "--output", str(tmp_path / "out"))
    facts = read_png_facts(tmp_path / "out/images/000000.png")
    assert (facts["class_label"], facts["class_name"]) == (NUM_CLASSES, "heron")
    assert [(one["path"], one["weight"]) for one in facts["adapters"]] == [(a, 1.0), (b, 0.5)]
    assert facts["adapters"][0]["sha256"] == sha256((Path(a) / FILE).read_bytes()).hexdigest()

    pipe = ClassToImagePipeline.from_pretrained(model)
    pipe.load_lora_weights(a, adapter_name="first")
    pipe.load_lora_weights(b, adapter_name="second")
    pipe.set_adapters(["first", "second"], [1.0, 0.5])
    generators = [generator_for(3, "sample", index) for index in range(2)]
    expected = pipe(["heron", 0], num_inference_steps=2, generator=generators).images
    for index, image in enumerate(pixels(tmp_path / "out").values()):
        np.testing.assert_array_equal(image, np.asarray(expected[index]).astype(int))

    monkeypatch.setattr(sys, "argv", [*shlex.split(facts["command"]), "--output", str(tmp_path / "again")])
    cli.main()
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / out / "images").iterdir()} for out in ("out", "again")
    )
    assert first == second


def test_adapters_that_cannot_be_used_are_named(model, tmp_path, monkeypatch, capsys):
    pipe = tiny_pipeline()
    pipe.save_lora_weights(tmp_path / "rows", label_rows=rows("heron"))
    make_adapter(PipelineMaker(DiTDHTransformer2DModel), tmp_path / "foreign")
    for word, message in (
        (f"{tmp_path}/none", "none: adapter"),
        (f"{tmp_path}/rows=0.5", "holds classes only, which take no weight"),
        (f"{tmp_path}/rows=half", "'half' is no finite number; give PATH or PATH=WEIGHT"),
        (f"{tmp_path}/foreign=nan", "'nan' is no finite number; give PATH or PATH=WEIGHT"),
        (f"{tmp_path}/foreign=-inf", "'-inf' is no finite number; give PATH or PATH=WEIGHT"),
        (str(tmp_path), f"--lora {tmp_path}: {tmp_path}: no adapter file"),
        (f"{tmp_path}/foreign", "foreign: adapter 'adapter_0' does not fit this SiTTransformer2DModel"),
    ):
        with pytest.raises(SystemExit):
            sample(monkeypatch, "--model", model, "--lora", word, "--output", str(tmp_path / "out"))
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
        assert message in line
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_another_kind_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(SystemExit):
        sample(monkeypatch, "--model", str(tmp_path), "--output", str(tmp_path / "out"))
    assert "holds a FluxPipeline" in capsys.readouterr().err


def test_door_writes_one_grid(model, tmp_path, monkeypatch, capsys):
    grid = tmp_path / "grid.png"
    words = ["--model", model, "--class-labels", "0", "Golden Retriever", "--num-inference-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words, "--output", str(grid)])
    runpy.run_path(str(DOOR / "sample.py"), run_name="__main__")
    with Image.open(grid) as picture:
        assert picture.size == (2 * EDGE, EDGE)


@pytest.mark.parametrize("damage", ["truncated", "missing weights", "missing component", "wrong config"])
def test_a_damaged_pipeline_is_one_line(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "missing component":
        shutil.rmtree(folder / "scheduler")
    else:
        config = folder / "transformer" / "config.json"
        config.write_text(config.read_text().replace('"hidden_size": ', '"hidden_size": 1'))
    with pytest.raises(UserError, match=r"cannot be loaded|the file is damaged|belong to different models"):
        load_pipeline(str(folder), "cpu", "float32")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text_model")
    tiny_text_pipeline(vae=any_size_autoencoder()).save_pretrained(folder)
    return str(folder)


class TestPrompts:
    def test_one_image_per_prompt_with_its_facts(self, text_model, tmp_path, monkeypatch):
        words = ["--prompt", "a red cube", "ein *blauer* Ball", "--negative-prompt", "grey", "--guidance-scale", "2"]
        sample(monkeypatch, "--model", text_model, *words, "--output", str(tmp_path / "a"))
        assert len(pixels(tmp_path / "a")) == 2
        facts = read_png_facts(tmp_path / "a/images/000001.png")
        expected = {"prompt": "ein *blauer* Ball", "negative_prompt": "grey", "seed": 0, "index": 1}
        assert {name: facts[name] for name in expected} == expected and "class_label" not in facts
        with Image.open(tmp_path / "a/images/000001.png") as image:
            assert image.info["Description"].startswith("prompt 'ein *blauer* Ball', seed 0, image 1, 2 steps")
        program, *again = shlex.split(facts["command"])
        monkeypatch.setattr(sys, "argv", [program, *again, "--output", str(tmp_path / "b")])
        cli.main()
        first, second = ({p.name: p.read_bytes() for p in (tmp_path / out / "images").iterdir()} for out in "ab")
        assert first == second

    def test_a_file_of_prompts_a_number_and_a_size(self, text_model, tmp_path, monkeypatch):
        (tmp_path / "prompts.txt").write_text("a red cube\n\n  赤い立方体  \n", encoding="utf-8")
        words = ["--prompts-file", str(tmp_path / "prompts.txt"), "--number", "3", "--height", "12", "--width", "8"]
        sample(monkeypatch, "--model", text_model, *words, "--output", str(tmp_path / "out"))
        images = pixels(tmp_path / "out")
        assert len(images) == 3 and {image.shape for image in images.values()} == {(12, 8, 3)}
        prompts = [read_png_facts(tmp_path / f"out/images/{i:06d}.png")["prompt"] for i in range(3)]
        assert prompts == ["a red cube", "赤い立方体", "a red cube"]

    def test_the_prompt_decides_the_picture(self, text_model, tmp_path, monkeypatch):
        for name, prompt in {"a": "a red cube", "b": "two blue balls"}.items():
            sample(monkeypatch, "--model", text_model, "--prompt", prompt, "--output", str(tmp_path / name))
        a, b = (pixels(tmp_path / name)["000000.png"] for name in "ab")
        assert not np.array_equal(a, b)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "give either --prompt with one or more texts, or --prompts-file"),
            (("--prompt", "a", "--prompts-file", "b"), "give either --prompt"),
            (("--class-labels", "1"), "--class-labels was given, but the model draws prompts"),
            (("--prompts-file", "no/such"), "--prompts-file no/such cannot be read"),
            (("--prompt", "a", "--height", "9"), "--height is 9; give a positive multiple of 2 px"),
            (("--prompt", "a", "--guidance-method", "internal"), "has no base head"),
        ],
    )
    def test_a_mistake_is_one_line(self, text_model, tmp_path, monkeypatch, capsys, words, message):
        with pytest.raises(SystemExit) as exit_info:
            sample(monkeypatch, "--model", text_model, "--output", str(tmp_path / "out"), *words)
        assert exit_info.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repagen: error")]
        assert message in line

    def test_prompts_are_no_classes(self, model, tmp_path, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            sample(monkeypatch, "--model", model, "--prompt", "a", "--output", str(tmp_path / "out"))
        assert "--prompt was given, but the model draws classes" in capsys.readouterr().err

    def test_the_script_of_a_repository(self, text_model, tmp_path, monkeypatch, capsys):
        output = tmp_path / "grid.png"
        words = ["--model", text_model, "--prompt", "a", "b", "--num-inference-steps", "2", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        runpy.run_path(str(DOOR.with_name("text_to_image") / "sample.py"), run_name="__main__")
        with Image.open(output) as grid:
            assert grid.size == (16, 8)
        assert "wrote" in capsys.readouterr().out
