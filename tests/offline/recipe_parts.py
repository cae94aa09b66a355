"""Tiny repositories for the stand-in Hub, and recipes that name them by their Hub ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_stand_in import COMMIT, StandInHub
from huggingface_hub import constants
from pipelines.tiny_pipelines import tiny_pipeline
from training import decoder_parts, generator_parts

ENCODER, RAE, PIPELINE, DINO, GATED = "org/encoder", "org/rae", "org/pipeline", "org/dino", "org/gated"


def write_repositories(folder: Path) -> dict[str, Path]:
    """Write an encoder, an autoencoder that refers to it by commit, a pipeline and DINO; => Hub id => folder."""
    generator_parts.write_parts(folder)
    (folder / "encoder" / "tf_model.h5").write_bytes(b"of another framework")
    (folder / "encoder" / "pytorch_model.bin").write_bytes(b"the same in an older format")
    config = json.loads((folder / "rae" / "config.json").read_text())
    shutil.rmtree(folder / "rae" / "encoder.frozen")
    config["encoder"] |= {"name_or_path": ENCODER, "revision": COMMIT}
    config["encoder_stored"] = False
    (folder / "rae" / "config.json").write_text(json.dumps(config))
    tiny_pipeline().save_pretrained(folder / "pipeline")
    (folder / "pipeline" / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "pipeline" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    decoder_parts.tiny_vit().save_pretrained(folder / "dino")
    return {ENCODER: folder / "encoder", RAE: folder / "rae", PIPELINE: folder / "pipeline", DINO: folder / "dino"}


def generator_recipe(folder: Path) -> Path:
    """A recipe of two steps, with an evaluation in the encoder's space at the end."""
    values = generator_parts.settings(folder, folder / "run")
    values |= {
        "max_steps": 2,
        "autoencoder": {"path": RAE},
        "alignment": {"targets": [{"encoder": ENCODER, "block": 1, "projector_dim": 16}]},
        "evaluation": {
            "every_images": 1000, "extractor": ENCODER, "metrics": ["fd"], "num_samples": 20,
            "forward_batch_size": 20,
        },
    }  # fmt: skip
    return generator_parts.write_settings(values, folder / "recipe.yaml")


@contextmanager
def turned_to(endpoint: str) -> Iterator[None]:
    """Let huggingface_hub in this process ask a stand-in Hub."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    values: dict[str, Any] = {
        "ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }  # fmt: skip
    huggingface_hub.close_session()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(constants, name, value)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        patch.setenv("NO_PROXY", "*")
        patch.delenv("HF_TOKEN", raising=False)
        yield
    huggingface_hub.close_session()


def serve(hub: StandInHub, repositories: dict[str, Path]) -> None:
    for repo_id, folder in repositories.items():
        hub.add(repo_id, folder, COMMIT)


def run_command(*words: str) -> str:
    """Run `repagen download` in this process."""
    from repagen.errors import OneLineParser
    from repagen.offline import download_command

    parser = OneLineParser(prog="repagen download")
    download_command.add_arguments(parser)
    return download_command.run(parser.parse_args(words))
