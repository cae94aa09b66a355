"""Makes diffusers know repagen's classes, so that saved components load by name without `trust_remote_code`.

On disk a component is `["repagen", "ClassName"]`, whatever module of repagen holds it. Two doors are opened, neither
of which imports anything by itself:

- `diffusers.ClassName` resolves to ours (a module `__getattr__`, PEP 562), which `DiffusionPipeline.from_pretrained`
  and `AutoModel.from_pretrained` use to find a class by its bare name; and so does `diffusers.pipelines.ClassName`, in
  which diffusers' tests look for the source of a pipeline's `encode_prompt`;
- repagen joins `LOADABLE_CLASSES`, the libraries that diffusers loads components from, once diffusers has imported the
  module that holds it. That dict is private; where it is gone, `ClassToImagePipeline.download` still works on public
  API, and so does everything from a local folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LIBRARY = "repagen"
_LOADING_MODULE = "diffusers.pipelines.pipeline_loading_utils"

# Classes that a saved folder may name.
SAVED_CLASSES = frozenset(
    {
        "ClassToImagePipeline",
        "DDPMDiTTransformer2DModel",
        "DDTTransformer2DModel",
        "DiTDHTransformer2DModel",
        "ELTTransformer2DModel",
        "FlowMatchEulerMaruyamaScheduler",
        "FlowMatchEulerTruncatedScheduler",
        "FlowMatchHeunScheduler",
        "LightningDiTTransformer2DModel",
        "PixelAutoencoder",
        "RAEv2Transformer2DModel",
        "RepresentationAutoencoder",
        "SVGAutoencoder",
        "TextEncoder",
        "SiTTransformer2DModel",
        "TextToImagePipeline",
    }
)
# Bases that diffusers' loader looks up in our package to tell how a class is saved and loaded.
LOADER_BASES = ("ModelMixin", "SchedulerMixin", "DiffusionPipeline")


def register() -> None:
    """Open both doors. Called once, by `import repagen`."""
    import diffusers

    _answer_for(diffusers)
    if _LOADING_MODULE in sys.modules:
        _after_loading_module(sys.modules[_LOADING_MODULE])
    else:
        sys.meta_path.insert(0, _AfterImport())


def is_loadable_library() -> bool:
    """Whether diffusers downloads repositories of ours, that is, still keeps its libraries where we joined them."""
    loading_module = importlib.import_module(_LOADING_MODULE)
    return LIBRARY in getattr(loading_module, "LOADABLE_CLASSES", {})


def _answer_for(module: ModuleType) -> None:
    other_library = vars(module).get("__getattr__")

    def resolve(name: str) -> Any:
        if name in SAVED_CLASSES:
            return getattr(importlib.import_module(LIBRARY), name)
        if other_library is not None:
            return other_library(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    vars(module)["__getattr__"] = resolve


def _after_loading_module(loading_module: ModuleType) -> None:
    _join_loadable_libraries(loading_module)
    _answer_for(sys.modules[loading_module.__name__.rpartition(".")[0]])


def _join_loadable_libraries(loading_module: ModuleType) -> None:
    libraries = getattr(loading_module, "LOADABLE_CLASSES", None)
    if libraries is not None:
        libraries[LIBRARY] = {base: ["save_pretrained", "from_pretrained"] for base in LOADER_BASES}


class _AfterImport(MetaPathFinder):
    """Joins the loadable libraries right after diffusers imports them, then steps aside.

    Importing that module ourselves would import transformers, which `import repagen` should not cost.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LOADING_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_join(module: ModuleType) -> None:
            execute(module)
            _after_loading_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_join  # type: ignore[method-assign]
        return spec
