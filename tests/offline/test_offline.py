"""A fresh process with HF_HUB_OFFLINE=1 and no sockets: a bundle is enough, and what it lacks is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import COMMIT
from recipe_parts import DINO, ENCODER, PIPELINE

pytestmark = pytest.mark.slow

DECODER = [
    "decoder", "--config", "digits_decoder", f"autoencoder.encoder={ENCODER}", "max_steps=2", "global_batch_size=4",
    "progress_bar=false", "checkpoint.every_steps=1000", "sample.every_steps=0", "ema.decay=0.5",
]  # fmt: skip
DISCRIMINATOR = ["adversarial.weight=0.5", f"adversarial.backbone={DINO}", "adversarial.blocks=[0]"]
EVALUATE = ["repagen", "evaluate", "generation", "--model", PIPELINE, "--num-samples", "20"]
DIGITS = ["--reference", "data.kind=digits", "data.image_size=16"]


def stored(repo_id: str, file: str = "") -> str:
    folder = f"hub/models--{repo_id.replace('/', '--')}"
    return f"{folder}/snapshots/{COMMIT}/{file}" if file else folder


def programs(folder: Path) -> dict[str, list[str]]:
    """Name => a command line that the bundle is enough for."""

    def new(name: str) -> str:
        return str(folder / name)

    recipe = ["generator", "--config", str(folder / "recipe.yaml")]
    return {
        "train": [*recipe, f"output_dir={new('run')}"],
        "decoder": [*DECODER, *DISCRIMINATOR, f"output_dir={new('decoder')}"],
        "sample": ["repagen", "sample", "--model", PIPELINE, "--number", "2", "--num-inference-steps", "2",
                   "--output", new("images")],
        "evaluate": [*EVALUATE, "--extractor", ENCODER, "--metrics", "fd", *DIGITS, "--output", new("a.json")],
    }  # fmt: skip


# What is missing => the program that needs it, further words, the files, and the command that must be named.
MISSING: dict[str, tuple[str, list[str], list[str], str]] = {
    "autoencoder": ("train", [], [stored("org/rae")], "repagen download org/rae"),
    "autoencoder's weights": (
        "train", [], [stored("org/rae", "diffusion_pytorch_model.safetensors")], "repagen download org/rae"
    ),
    "autoencoder's config": ("train", [], [stored("org/rae", "config.json")], "repagen download org/rae"),
    "encoder": ("train", [], [stored(ENCODER)], "repagen download org/encoder"),
    "encoder's weights": ("train", [], [stored(ENCODER, "model.safetensors")], "repagen download org/encoder"),
    "extractor": ("evaluate", [], [stored(ENCODER)], "repagen download org/encoder"),
    "encoder of the decoder": ("decoder", [], [stored(ENCODER)], "repagen download org/encoder"),
    "discriminator": ("decoder", [], [stored(DINO)], "repagen download org/dino"),
    "discriminator's weights": ("decoder", [], [stored(DINO, "model.safetensors")], "repagen download org/dino"),
    "LPIPS": ("decoder", ["lpips.weight=1"], [], "repagen download lpips-vgg"),
    "generator": ("train", ["transformer.pretrained=org/absent", "transformer.architecture=null",
                            "transformer.prediction=null", "transformer.overrides={}"], [],
                  "repagen download org/absent"),
    "dataset": ("train", ["data.kind=datasets", "data.path=org/photos"], [],
                "repagen download org/photos --with-data"),
    "pipeline": ("sample", [], [stored(PIPELINE)], "repagen download org/pipeline"),
    "pipeline's weights": (
        "sample", [], [stored(PIPELINE, "transformer/diffusion_pytorch_model.safetensors")],
        "repagen download org/pipeline",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def answers(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case => exit code and stderr, from one fresh process."""
    folder = tmp_path_factory.mktemp("offline")
    shutil.copy(filled / "recipe.yaml", folder)
    bundle = Path(shutil.copytree(filled / "bundle", folder / "bundle"))
    whole = programs(folder)
    cases = [{"name": name, "words": words, "missing": []} for name, words in whole.items()]
    for name, (program, words, missing, _) in MISSING.items():
        given = [word.replace(str(folder), str(folder / "of missing")) for word in whole[program]]
        given = [word if "recipe.yaml" not in word else str(folder / "recipe.yaml") for word in given]
        paths = [str(bundle / path) for path in missing]
        cases.append({"name": name, "words": [*given, *words], "missing": paths})
    cases += [
        {"name": "Inception", "words": [*EVALUATE, "--protocol", "torch-fidelity", *DIGITS, "--output",
                                        str(folder / "b.json")], "missing": []},
        {"name": "statistics", "words": [*EVALUATE, "--extractor", ENCODER, "--metrics", "fd", "--reference",
                                         "absent.npz", "--output", str(folder / "c.json")], "missing": []},
    ]  # fmt: skip
    (folder / "of missing").mkdir()
    environment = {
        **os.environ,
        **{"HF_HUB_CACHE": str(bundle / "hub"), "TORCH_HOME": str(bundle / "torch"), "HF_HUB_OFFLINE": "1"},
        "HF_DATASETS_CACHE": str(folder / "tables"),
        "OMP_NUM_THREADS": "1",
    }
    program = [sys.executable, str(Path(__file__).with_name("offline_programs.py")), str(folder / "answers.json")]
    subprocess.run(program, input=json.dumps(cases), text=True, env=environment, check=True, timeout=500)
    return {"bundle": bundle, **json.loads((folder / "answers.json").read_text())}


@pytest.mark.parametrize("program", ["train", "decoder", "sample", "evaluate"])
def test_a_bundle_is_enough(program: str, answers: dict[str, Any]) -> None:
    code, errors = answers[program]
    assert code == 0, errors


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_named_with_its_command(what: str, answers: dict[str, Any]) -> None:
    code, errors = answers[what]
    line = errors.strip().splitlines()[-1]
    command = MISSING[what][3]
    assert (code, line.startswith("repagen: error: ")) == (2, True), errors
    assert f"`{command}" in line
    assert f" --to {answers['bundle']}`" in line


def test_missing_published_files_and_statistics_are_named_too(answers: dict[str, Any]) -> None:
    code, errors = answers["Inception"]
    assert code == 2
    assert f"`repagen download inception --to {answers['bundle']}`" in errors.splitlines()[-1]
    code, errors = answers["statistics"]
    assert code == 2
    assert "`repagen download PROTOCOL --to DIR`" in errors.splitlines()[-1]
