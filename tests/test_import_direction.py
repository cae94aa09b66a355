"""Imports run one way: what a part may import is written here, once, and everything else is an error."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "repagen"
DOORS = ("train", "eval", "examples", "pipelines", "benchmarks", "scripts")

BASE = {"config", "errors", "files", "hub", "randomness"}
# Part => the parts of repagen it may import beside itself. `cli`, `quickstart` and `__init__` stand on top.
ALLOWED = {
    "errors": set[str](),
    "config": {"errors"},
    "files": set[str](),
    "hub": {"config", "errors", "files"},
    "randomness": set[str](),
    "flow": BASE,
    "layers": BASE,
    "encoders": {*BASE, "flow", "layers"},
    "data": BASE,
    "schedulers": {*BASE, "flow", "layers", "encoders"},
    "models": {*BASE, "flow", "layers", "encoders"},
    "alignment": {*BASE, "flow", "layers", "encoders"},
    "registration": set[str](),  # names classes by strings and imports none of them
    "conversion": {*BASE, "flow", "layers", "encoders", "models", "alignment", "schedulers", "pipelines"},
    "pipelines": {*BASE, "registration", "flow", "layers", "encoders", "models", "alignment", "schedulers"},
    "app": {*BASE, "flow", "models", "schedulers", "pipelines"},
    "export": {*BASE, "encoders", "models", "pipelines"},
    "evaluation": {*BASE, "flow", "layers", "encoders", "models", "alignment", "schedulers", "pipelines", "data"},
    "doctor": {*BASE, "layers", "encoders", "models", "pipelines", "data"},
    "training": {
        *BASE,
        *("flow", "layers", "encoders", "models", "alignment", "schedulers", "pipelines", "evaluation", "data"),
    },
    "offline": {*BASE, "encoders", "data", "evaluation", "training"},  # knows what every recipe names
}
TOP = {"__init__", "__main__", "cli", "quickstart"}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every module a file imports, wherever in the file, with its line; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write repagen.… in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def library_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_its_arrows() -> None:
    parts = {part_of(path) for path in library_files()} - {"configs"}
    assert parts <= ALLOWED.keys() | TOP, "a new part of repagen: say in this file what it may import"


def test_imports_run_one_way() -> None:
    wrong = []
    for path in library_files():
        part = part_of(path)
        if part in TOP:
            continue
        for line, module in imports_of(path):
            package, _, rest = module.partition(".")
            target = rest.split(".")[0]
            # `from repagen import X` reaches into the top, whatever X is; `import repagen` is for its version.
            known = module == "repagen" or target in ALLOWED[part] | {part}
            if package == "repagen" and not known:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} may not import {module}")
    assert not wrong, "\n".join(wrong)


def test_below_the_top_only_the_version_is_taken_from_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: repagen.{node.attr}"
        for path in library_files()
        if part_of(path) not in TOP
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "repagen" and node.attr != "__version__"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_in_the_library_imports_the_doors() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in library_files()
        for line, module in imports_of(path)
        if module.split(".")[0] in {*DOORS, "tests"}
    ]
    assert not wrong, "\n".join(wrong)


def test_doors_import_no_other_door() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for door in DOORS
        for path in (ROOT / door).rglob("*.py")
        for line, module in imports_of(path)
        if module.split(".")[0] in {*DOORS, "tests"}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_folder_bears_the_name_of_a_pipeline_of_diffusers() -> None:
    """diffusers writes such a folder's name into model_index.json, and would look for our class in its own module."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.submodule_search_locations is not None
    theirs = {module.name for module in pkgutil.iter_modules([f"{spec.submodule_search_locations[0]}/pipelines"])}
    assert {"dit", "flux", "sana"} <= theirs
    ours = {folder.name for folder in PACKAGE.rglob("*") if folder.is_dir()}
    ours |= {path.stem for path in library_files()}
    assert not ours & theirs


@pytest.mark.parametrize(("source", "expected"), [("import a.b", ["a.b"]), ("from a import b", ["a.b"])])
def test_imports_are_found(tmp_path: Path, source: str, expected: list[str]) -> None:
    (tmp_path / "module.py").write_text(f"def function():\n    {source}\n")
    assert [module for _, module in imports_of(tmp_path / "module.py")] == expected
