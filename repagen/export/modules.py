"""The library's modules as source text: which of them a class needs, and the same text with its imports rewritten.

Nothing is imported or executed here. A statement `from repagen.a.b import c` needs the module `repagen.a.b`, wherever
in a file it stands. Two kinds of them need nothing: those for type checkers alone, and those within functions that ask
for a module that is left out; elsewhere such a module is an error of ours, but for names that have a stand-in.

Functions take `left_out`, the modules that a copy does not hold: `LEFT_OUT`, or fewer.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "repagen"
LEFT_OUT = frozenset(
    {
        "repagen.encoders",
        "repagen.encoders.backbones",
        "repagen.encoders.families",
        "repagen.encoders.files",
        "repagen.encoders.vision",
        "repagen.encoders.weights",
        "repagen.hub.card",
        "repagen.hub.folder_facts",
        "repagen.hub.published",
        "repagen.hub.publishing",
        "repagen.hub.saved_models",
        "repagen.models.diffusers_rae",
        "repagen.pipelines.loading",
    }
)
"""Modules that a copy does not hold: sampling needs no vision encoder, and a copy leaves it to diffusers to load it
from the Hub."""

READING_PROMPTS = frozenset(
    {
        "repagen.encoders.backbones",
        "repagen.encoders.families",
        "repagen.encoders.files",
        "repagen.encoders.weights",
    }
)
"""Those of them that a text encoder needs: a copy of a pipeline with one holds them."""

STAND_INS = "repagen.export.stand_ins"
"""What this module defines is taken from it by a copy, in place of what has the same name in `LEFT_OUT`."""

COMPONENTS = "repagen.pipelines.components"
"""The module that names every class a component may have; a copy's names those that are in it."""

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class _Import:
    """A name that a file takes from the library.

    Attributes:
        statement: it is part of.
        module: a copy takes it from, or which it is.
        name: in that module; empty where it is the module itself.
        bound: the name that it gets.
        for_typing: whether only type checkers see it.
    """

    statement: ast.ImportFrom
    module: str
    name: str
    bound: str
    for_typing: bool


def source_of(module: str) -> str:
    """Return a module's source; `module` is its full name."""
    path = _path_of(module)
    assert path is not None, f"{module} is no module of the library"
    return path.read_text(encoding="utf-8")


def file_of(module: str) -> str:
    """Return a module's path within the library, for example `repagen/layers/norms.py`."""
    path = _path_of(module)
    assert path is not None, f"{module} is no module of the library"
    return (LIBRARY / path.relative_to(_ROOT)).as_posix()


def modules_needed(start: Iterable[str], left_out: Collection[str] = LEFT_OUT) -> list[str]:
    """Return modules and all that they import in turn, sorted, without those left out.

    `COMPONENTS` is among them where it is needed, but not what only it imports.
    """
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        if module != COMPONENTS:
            waiting += [item.module for item in _needed_imports(module, left_out)]
    return sorted(found)


def name_in_copy(module: str) -> str:
    """Return a module's name in a copy, where all lie in one folder: `layers_norms` for `repagen.layers.norms`."""
    return module.removeprefix(f"{LIBRARY}.").replace(".", "_")


def rewritten(source: str, left_out: Collection[str] = LEFT_OUT) -> str:
    """Return a module's source with its imports of the library made relative, and nothing else changed.

    `from repagen.a.b import c` becomes `from . import a_b` and `c = a_b.c`: a form that diffusers does not follow. It
    would ask the Hub again for every path that leads from file to file, hundreds of times. An import for type checkers
    becomes `pass`, one of a module that is left out raises `ImportError`.
    """
    lines = source.splitlines()
    grouped: dict[ast.ImportFrom, list[_Import]] = {}
    for item in _own_imports(source, left_out):
        grouped.setdefault(item.statement, []).append(item)
    for statement, items in sorted(grouped.items(), key=lambda pair: -pair[0].lineno):
        assert statement.end_lineno is not None
        indent = " " * statement.col_offset
        lines[statement.lineno - 1 : statement.end_lineno] = [
            indent + line for line in _replacement(ast.unparse(statement), items, left_out)
        ]
    return "\n".join(lines) + "\n"


def narrowed_components(held: Iterable[str]) -> str:
    """Return the source of `COMPONENTS` without the classes of modules that are not `held`."""
    kept = set(held)
    tree = ast.parse(source_of(COMPONENTS))
    absent = {item.bound for item in _own_imports(source_of(COMPONENTS), LEFT_OUT) if item.module not in kept}
    return ast.unparse(_Narrowing(absent).visit(tree)) + "\n"


def first_name(source: str) -> str:
    """Return the first public class or function that a module defines, or its first annotated constant."""
    body = ast.parse(source).body
    defined = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    constants = [ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)]
    return next(name for name in [*defined, *constants] if not name.startswith("_"))


class _Narrowing(ast.NodeTransformer):
    """Drops names from imports and from unions."""

    def __init__(self, absent: set[str]) -> None:
        self.absent = absent

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        node.names = [alias for alias in node.names if alias.name not in self.absent]
        return node if node.names else None

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        sides: list[ast.expr] = [self.visit(side) for side in (node.left, node.right)]
        kept = [side for side in sides if not (isinstance(side, ast.Name) and side.id in self.absent)]
        if len(kept) == 2:
            node.left, node.right = kept
            return node
        return kept[0] if kept else sides[0]  # an absent name, for the union around this one to drop


def _path_of(module: str) -> Path | None:
    base = _ROOT.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _needed_imports(module: str, left_out: Collection[str]) -> Iterator[_Import]:
    for item in _own_imports(source_of(module), left_out):
        if item.for_typing:
            continue
        if item.module in left_out:
            within = item.statement.col_offset > 0
            assert within, f"{module}:{item.statement.lineno} needs {item.module} to be imported, which no copy holds"
            continue
        yield item


def _own_imports(source: str, left_out: Collection[str]) -> Iterator[_Import]:
    tree = ast.parse(source)
    typing_blocks = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    for_typing = {child for block in typing_blocks for part in block.body for child in ast.walk(part)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] == LIBRARY for name in names), "write `from repagen.module import name`"
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != LIBRARY:
            continue
        for alias in node.names:
            module, name = str(node.module), alias.name
            if _path_of(f"{module}.{name}") is not None:
                module, name = f"{module}.{name}", ""
            elif module in left_out and name in _stand_ins():
                module = STAND_INS
            yield _Import(node, module, name, alias.asname or alias.name, node in for_typing)


def _replacement(statement: str, items: list[_Import], left_out: Collection[str]) -> list[str]:
    """Lines in place of an import statement."""
    if items[0].for_typing:
        return [f"pass  # {statement}"]
    if any(item.module in left_out for item in items):
        return [
            "raise ImportError(",
            f'    "{statement}: not in this self-contained copy, which only samples; "',
            '    "install repagen and load the revision main"',
            ")",
        ]
    lines: list[str] = []
    for item in items:
        copy = name_in_copy(item.module)
        if f"from . import {copy}" not in lines:
            lines.append(f"from . import {copy}")
        lines.append(f"{item.bound} = {copy}" + (f".{item.name}" if item.name else ""))
    return lines


@functools.cache
def _stand_ins() -> frozenset[str]:
    body = ast.parse(source_of(STAND_INS)).body
    return frozenset(node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef))
