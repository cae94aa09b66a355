"""A saved pipeline as a folder that carries its own code, for `trust_remote_code=True` where repagen is not installed.

diffusers copies a folder's Python files into one flat package, `diffusers_modules.local`, and executes them there:

- of the other files it copies those that the entry file itself imports, so that file names them all;
- a component's class comes from a file in the component's sub-folder, copied into the same package. Here that file is
  a door to a module that the entry file has imported, so that each class exists once and `isinstance` holds;
- repositories overwrite each other's files of the same name, so names end in a digest of all the code.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import repagen
from repagen.encoders.text_storage import TOKENIZER
from repagen.errors import UserError, refusing
from repagen.export.modules import (
    COMPONENTS,
    LEFT_OUT,
    LIBRARY,
    READING_PROMPTS,
    file_of,
    first_name,
    modules_needed,
    name_in_copy,
    narrowed_components,
    rewritten,
    source_of,
)
from repagen.files import replace_folder
from repagen.hub.folder_facts import PIPELINE_FILE
from repagen.pipelines.loading import PIPELINES

BRANCH = "remote-code"
"""Branch of a Hub repository for such a folder; `main` stays as it was saved, for users with the library."""


@dataclass(frozen=True)
class _Pipeline:
    """A saved pipeline.

    Attributes:
        index: content of its `model_index.json`.
        classes: component => name of its class, of the components that are set.
        own: component => full name of the module with its class, of the library's own.
    """

    index: dict[str, Any]
    classes: dict[str, str]
    own: dict[str, str]


def export_remote_code(model: str | os.PathLike[str], output: Path, revision: str | None = None) -> Path:
    """Write a pipeline with the source of everything that it samples with.

    Weights and configs are copied as they are, without a vision encoder's weights: nothing in the copy encodes images,
    so it samples and does not edit. A text encoder goes along, its tokenizers too. The same
    pipeline and the same version of the library give the same bytes.

    Args:
        model: folder or Hub id of a pipeline.
        output: folder to write; may be there if it is empty.
        revision: branch, tag or commit on the Hub.

    Returns:
        `output`.

    Raises:
        UserError: no such pipeline, one of a kind or with components that are not the library's or diffusers' own,
            weights in no safetensors file, or an output folder with files in it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: {output} is not empty; give a new folder")
    folder = _fetched(os.fspath(model), revision)
    pipeline = _read(folder)
    files = _code(pipeline)
    output.parent.mkdir(parents=True, exist_ok=True)

    def fill(target: Path) -> None:
        for component in pipeline.classes:
            _copy_component(folder / component, target / component)
        for name, text in files.items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_text(text, encoding="utf-8")

    replace_folder(output, fill)
    return output


def _fetched(model: str, revision: str | None) -> Path:
    from repagen.models.opening import refuse_missing_folder
    from repagen.pipelines.loading import saved_pipeline_class

    refuse_missing_folder(model, "MODEL", "a folder or Hub id of a pipeline")
    if Path(model).is_dir():
        return Path(model)
    with refusing(f"MODEL: {model} cannot be fetched"):
        return Path(saved_pipeline_class(model, revision).download(model, revision=revision))


def _read(folder: Path) -> _Pipeline:
    with refusing(f"MODEL: {folder / PIPELINE_FILE} cannot be read; give the folder or Hub id of a pipeline"):
        index = json.loads((folder / PIPELINE_FILE).read_text(encoding="utf-8"))
        kind = index["_class_name"]
    if isinstance(kind, list):
        raise UserError(f"MODEL: {folder} carries its own code already; give the pipeline that it was made from")
    if kind not in PIPELINES:
        raise UserError(f"MODEL: {folder} holds a {kind}; it must be one of {', '.join(PIPELINES)}")
    modules = _component_modules()
    entries = {key: value for key, value in index.items() if isinstance(value, list) and value[0] is not None}
    for component, (library, name) in entries.items():
        if library != modules.get(name, "").split(".")[0]:
            raise UserError(
                f"{folder / PIPELINE_FILE}:{component} is {library}.{name}; it must be one of "
                f"{', '.join(sorted(modules))}"
            )
    own = {component: modules[name] for component, (library, name) in entries.items() if library == LIBRARY}
    return _Pipeline(index, {component: name for component, (_, name) in entries.items()}, own)


def _component_modules() -> dict[str, str]:
    """Name of each class that a component may have => full name of its module."""
    components = importlib.import_module(COMPONENTS)
    unions = (components.Transformer, components.Autoencoder, components.Scheduler)
    found = {cls.__name__: cls.__module__ for union in unions for cls in get_args(union)}
    return {**found, "TextEncoder": "repagen.encoders.text"}


def _code(pipeline: _Pipeline) -> dict[str, str]:
    """Path within the folder => text, of all that is not copied."""
    kind = pipeline.index["_class_name"]
    left_out = LEFT_OUT - READING_PROMPTS if "text_encoder" in pipeline.own else LEFT_OUT
    modules = modules_needed([PIPELINES[kind], *pipeline.own.values()], left_out)
    sources = {module: source_of(module) for module in modules}
    sources[COMPONENTS] = narrowed_components(modules)
    texts = {
        name_in_copy(module): _header(f"{file_of(module)} of repagen {repagen.__version__}, {_change(module)}")
        + rewritten(source, left_out)
        for module, source in sources.items()
    }
    tag = hashlib.sha256(json.dumps([texts, pipeline.classes], sort_keys=True).encode()).hexdigest()[:8]
    package = f"{LIBRARY}_{tag}"
    names = {name_in_copy(module): first_name(source) for module, source in sources.items()}
    doors = {
        component: _door(component, pipeline.classes[component], f"{package}.{name_in_copy(module)}")
        for component, module in pipeline.own.items()
    }
    index = {
        **pipeline.index,
        "_class_name": [f"pipeline_{tag}", kind],
        **{component: [f"{component}_{tag}", pipeline.classes[component]] for component in doors},
    }
    return {
        PIPELINE_FILE: json.dumps(index, indent=2, sort_keys=True) + "\n",
        "README.md": _readme(package, len(texts), takes_prompts="text_encoder" in pipeline.own),
        f"pipeline_{tag}.py": _entry(package, {**names, name_in_copy(PIPELINES[kind]): kind}),
        **{f"{package}/{name}.py": text for name, text in texts.items()},
        **{f"{component}/{component}_{tag}.py": text for component, text in doors.items()},
    }


def _change(module: str) -> str:
    if module == COMPONENTS:
        return "without the classes that are not in this folder"
    return "with only its imports rewritten"


def _entry(package: str, names: Mapping[str, str]) -> str:
    """The file that `_class_name` names; diffusers copies what it imports beside it, and nothing else."""
    imports = "".join(f"from .{package}.{module} import {name}\n" for module, name in sorted(names.items()))
    about = "The pipeline. diffusers copies the files that this one imports, so it imports from each."
    return _header("The entry file of this folder") + f'"""{about}"""\n\n{imports}'


def _door(component: str, class_name: str, module: str) -> str:
    about = f"The class of the {component}, from a module that the pipeline's entry file has imported."
    package = module.split(".")[0]
    return (
        _header(f"The entry file of the {component}")
        + f'"""{about}"""\n\nfrom . import {package}\n\n{class_name} = {module}.{class_name}\n'
    )


def _header(origin: str) -> str:
    return (
        f"# {origin}.\n"
        "# Copyright 2026 the repagen authors. SPDX-License-Identifier: Apache-2.0\n"
        "# Written by `repagen export --remote-code`; changes belong into the library.\n\n"
    )


def _readme(package: str, count: int, *, takes_prompts: bool) -> str:
    reading = "transformers for the text encoder; " if takes_prompts else ""
    return f"""---
library_name: diffusers
---

# A pipeline with its own code

This branch holds a pipeline and the part of repagen {repagen.__version__} that samples it, for users who have not
installed the library. It needs torch, diffusers, accelerate, huggingface_hub, safetensors, numpy and Pillow;
{reading}torchvision where the autoencoder is SVG's, and peft for LoRA:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("ORG/NAME", revision="{BRANCH}", trust_remote_code=True)
```

That executes the {count} Python files in `{package}`, which short entry files import: read them before you do.
Each is the library's source with only its imports rewritten, and `{name_in_copy(COMPONENTS)}.py` without the
classes that are not in this folder, under Apache-2.0; the weights are under the licence of the branch `main`. With
repagen installed, use `main`, which needs no trust.
"""


def _copy_component(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    with refusing(f"MODEL: {source} cannot be read"):
        paths = sorted(path for path in source.iterdir() if path.suffix in (".json", ".safetensors"))
        config = (
            json.loads((source / "config.json").read_text(encoding="utf-8"))
            if (source / "config.json") in paths
            else {}
        )
    by_reference = not config.get("encoders_stored", True)
    if config and not by_reference and not any(path.suffix == ".safetensors" for path in paths):
        raise UserError(f"MODEL: {source} has no weights in safetensors; save the pipeline again by save_pretrained")
    for path in paths:
        shutil.copyfile(path, target / path.name)
    for tokenizer in sorted(source.glob(TOKENIZER.format("*"))):
        shutil.copytree(tokenizer, target / tokenizer.name)
