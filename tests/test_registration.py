"""Saved components load by name, from a folder and from a Hub, with nothing but `import repagen`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from hub_stand_in import serve_repository

import repagen
from repagen import registration
from repagen.schedulers.heun import FlowMatchHeunScheduler

# What a user's program does: import repagen, then only diffusers' own names.
USER_PROGRAM = """
import json, sys
import repagen
assert "transformers" not in sys.modules, "import repagen imports transformers"
import importlib.util
importlib.util.find_spec("diffusers.pipelines.pipeline_loading_utils")  # looking must not use the registration up
from diffusers import AutoModel, DiffusionPipeline

def names(pipe):
    return {name: type(part).__name__ for name, part in pipe.components.items()}

def picture(pipe):
    import torch
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    return images.images.double().sum().item()

report = {}
for place in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(place)
    report[place] = {
        "pipeline": type(pipe).__name__,
        "components": names(pipe),
        "picture": picture(pipe),
        "own class": picture(repagen.ClassToImagePipeline.from_pretrained(place)),
        "auto transformer": type(AutoModel.from_pretrained(place, subfolder="transformer")).__name__,
        "auto vae": type(AutoModel.from_pretrained(place, subfolder="vae")).__name__,
    }
report["bare"] = type(AutoModel.from_pretrained(sys.argv[1] + "/transformer")).__name__
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    from pipelines.tiny_pipelines import tiny_pipeline

    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(scheduler=FlowMatchHeunScheduler(shift=2.0)).save_pretrained(folder)
    return folder


def test_components_are_saved_by_library_and_class_alone(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "ClassToImagePipeline"
    assert index["transformer"] == ["repagen", "SiTTransformer2DModel"]
    assert index["vae"] == ["repagen", "RepresentationAutoencoder"]
    assert index["scheduler"] == ["repagen", "FlowMatchHeunScheduler"]
    assert not list(saved.rglob("*.py"))


def test_loads_from_folder_and_hub_in_a_fresh_process(saved, tmp_path):
    with serve_repository("org/tiny", saved) as endpoint:
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "*",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        process = subprocess.run(
            [sys.executable, "-c", USER_PROGRAM, str(saved), "org/tiny"],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    for place in (str(saved), "org/tiny"):
        found = report[place]
        assert found["pipeline"] == "ClassToImagePipeline"
        assert found["components"] == {
            "transformer": "SiTTransformer2DModel",
            "vae": "RepresentationAutoencoder",
            "scheduler": "FlowMatchHeunScheduler",
        }
        assert found["picture"] == found["own class"] == report[str(saved)]["picture"]
        assert found["auto transformer"] == "SiTTransformer2DModel"
        assert found["auto vae"] == "RepresentationAutoencoder"
    assert report["bare"] == "SiTTransformer2DModel"


def test_registered_names_are_public_and_not_taken_by_diffusers():
    lazy = vars(diffusers).pop("__getattr__")
    try:
        taken = {name for name in registration.SAVED_CLASSES if hasattr(diffusers, name)}
    finally:
        vars(diffusers)["__getattr__"] = lazy
    assert not taken
    for name in registration.SAVED_CLASSES:
        assert name in repagen.__all__
        assert getattr(diffusers, name) is getattr(repagen, name)


def test_every_saved_class_is_registered():
    """A public class that can be saved must be loadable by name."""
    savable = (diffusers.ModelMixin, diffusers.SchedulerMixin, diffusers.DiffusionPipeline)
    public = {name: getattr(repagen, name) for name in repagen.__all__}
    found = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, savable)}
    assert found == registration.SAVED_CLASSES


def test_diffusers_still_refuses_unknown_names():
    with pytest.raises(AttributeError, match="NoSuchModel"):
        _ = diffusers.NoSuchModel
    assert diffusers.DDPMScheduler.__name__ == "DDPMScheduler"


def test_other_libraries_that_answer_for_diffusers_keep_their_say(monkeypatch):
    monkeypatch.setitem(vars(diffusers), "__getattr__", {"TheirModel": int}.__getitem__)
    registration._answer_for(diffusers)
    assert diffusers.TheirModel is int
    assert diffusers.SiTTransformer2DModel is repagen.SiTTransformer2DModel


def test_saved_folder_loads_without_the_private_dict(monkeypatch, saved):
    loading_module = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
    monkeypatch.delitem(loading_module.LOADABLE_CLASSES, "repagen")
    pipe = repagen.ClassToImagePipeline.from_pretrained(saved)
    assert torch.is_tensor(pipe.transformer.proj_out.weight)
