from __future__ import annotations

import runpy
import shutil
import string
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import ID2LABEL, NUM_CLASSES, PATCH, SIDE, tiny_pipeline, tiny_transformer

from repagen import ELTTransformer2DModel, RAEv2Transformer2DModel, cli
from repagen.errors import UserError
from repagen.pipelines.sample_command import load_pipeline

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
        (("--number", "0"), "--number is 0"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--guidance-interval", "1", "0"), "0 <= low <= high <= 1"),
        (("--num-loops", "2"), "the transformer is not looped"),
        (("--guidance-method", "internal", "--guidance-scale", "2"), "has no base head"),
        (("--model", "no/such/folder"), "--model no/such/folder: no pipeline folder"),
        (("--model", "org/absent"), "--model org/absent: no pipeline folder"),
        (("--output", "."), "is no empty folder"),
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


def test_entry_file_loads_as_a_custom_pipeline(model):
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(
        model, custom_pipeline=str(DOOR / "pipeline.py"), trust_remote_code=True
    )
    assert type(loaded).__name__ == "ClassToImagePipeline"


def test_model_card_names_the_library_and_the_import():
    import yaml

    template = (DOOR / "model_card.md").read_text()
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    _, front_matter, text = template.format(**dict.fromkeys(fields, "x")).split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert metadata["library_name"] == "repagen" and "diffusers" in metadata["tags"]
    assert "import repagen" in text and "trust_remote_code=True" not in text


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
    with pytest.raises(UserError, match=r"cannot be loaded|the file is damaged"):
        load_pipeline(str(folder), "cpu", "float32")
