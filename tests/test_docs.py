"""The guide against the code: its links, its Python, its commands, and the tables that repeat what the code says."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from repagen import cli
from repagen.config import preset_names
from repagen.conversion import FAMILIES as CONVERSION_FAMILIES
from repagen.conversion.recipes import OFFICIAL_FAMILIES
from repagen.data import DataConfig, data_config_from_words
from repagen.encoders import FAMILIES
from repagen.offline.recipes import PROGRAMS
from repagen.schedulers.presets import SAMPLER_PRESETS
from repagen.training.decoder_config import DecoderConfig
from repagen.training.end_to_end_config import EndToEndConfig
from repagen.training.generator_config import GeneratorConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

DOORS = {"reference": ["reference"]}  # scripts of eval/ that are no subject of `repagen evaluate`
SCHEMAS = (DecoderConfig, GeneratorConfig, EndToEndConfig)  # of docs/training.md


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)) + 1, match[1]


# --- links ---------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_the_index_lists_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index
    ] == []


# --- Python --------------------------------------------------------------------------------------------------------


class Names:
    """What the names of a block stand for, as far as they come from repagen."""

    def __init__(self, tree: ast.Module) -> None:
        self.values: dict[str, Any] = {}
        self.instances: dict[str, type] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "repagen":
                module = importlib.import_module(str(node.module))
                self.values |= {name.asname or name.name: getattr(module, name.name) for name in node.names}
            if isinstance(node, ast.Import):
                for name in node.names:
                    if name.name.split(".")[0] == "repagen":
                        importlib.import_module(name.name)
                        self.values["repagen"] = sys.modules["repagen"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and (kind := self.made_by(node.value)):
                self.instances |= {target.id: kind for target in node.targets if isinstance(target, ast.Name)}

    def made_by(self, node: ast.expr) -> type | None:
        """The class that a constructor, or a class method called `from_...`, makes an instance of."""
        if not isinstance(node, ast.Call):
            return None
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr.startswith("from_"):
            function = function.value
        found = self.value(function)
        return found if isinstance(found, type) else None

    def value(self, node: ast.expr) -> Any:
        """The object that an expression names; None where it cannot be told. Names that do not exist are errors."""
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        owner = self.value(node.value) if isinstance(node, ast.Attribute) else None
        return None if owner is None else getattr(owner, node.attr)  # type: ignore[attr-defined]

    def called(self, node: ast.Call) -> Callable[..., Any] | None:
        """What a call runs: a function, a class, an instance, or a method of one."""
        function = node.func
        owner = function.value if isinstance(function, ast.Attribute) else function
        kind = self.instances.get(owner.id) if isinstance(owner, ast.Name) else None
        if kind is None:
            return self.value(function)
        return getattr(kind, function.attr if isinstance(function, ast.Attribute) else "__call__")


def unknown_keywords(function: Callable[..., Any], call: ast.Call) -> list[str]:
    """Keyword arguments of a call that the function does not take."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [keyword.arg for keyword in call.keywords if keyword.arg is not None and keyword.arg not in parameters]


@every_page
def test_python_uses_what_exists(page: Path) -> None:
    for line, code in blocks(page, "python"):
        tree = ast.parse(code, f"{page.name}:{line}")
        names = Names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names.values:
                names.value(node)
            if isinstance(node, ast.Call) and (function := names.called(node)) is not None:
                wrong = unknown_keywords(function, node)
                assert not wrong, f"{page.name}:{line + node.lineno}: {ast.unparse(node.func)} takes no {wrong}"


# --- commands ------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Where each shell command of a page stands, and its words, environment and redirection left out."""
    for line, text in blocks(page, "bash"):
        for row in text.replace("\\\n", " ").splitlines():
            for part in row.split(" && "):
                words = shlex.split(part, comments=True)
                words = words[: words.index(">")] if ">" in words else words
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield f"{page.name}:{line}", [Path(words[0]).name, *words[1:]]


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """What a command starts, `repagen` or the module or script behind a launcher, and its own words."""
    if words[0] == "repagen":
        return "repagen", words[1:]
    if words[0] == "accelerate" and words[1] == "launch":
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(words[2:])
        return args.training_script, args.training_script_args
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    if words[0] == "python":
        first = 2 if words[1] == "-m" else 1
        return words[first], words[first + 1 :]
    return None


def check_training(program: str, words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(words)
    if args.config in preset_names():
        PROGRAMS[program](args.config, args.overrides)
    else:
        assert args.config.endswith(".yaml")


def check_repagen(words: list[str]) -> None:
    args = cli._parse(words)
    for given in (getattr(args, name, None) for name in ("data", "samples", "reference")):
        if given and given[0].startswith("data."):
            data_config_from_words(given)


def check(program: str, words: list[str]) -> None:
    """Parse a command as its program does, without running it."""
    programs = "decoder|generator|text_to_image|end_to_end|finetune"
    training = re.fullmatch(rf"(?:repagen\.training\.|train/)({programs})(?:\.py)?", program)
    if training:
        check_training(training[1], words)
    elif program in ("repagen", "repagen.cli"):
        check_repagen(words)
    elif door := re.fullmatch(r"eval/(\w+)\.py", program):
        check_repagen([*DOORS.get(door[1], ["evaluate", door[1]]), *words])
    else:
        assert not program.startswith("repagen") and (not program.endswith(".py") or (ROOT / program).exists())


@every_page
def test_commands_are_understood(page: Path) -> None:
    for place, words in commands(page):
        started = program_of(words)
        if started is None:
            continue
        try:
            check(*started)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"{place}: {shlex.join(words)}: {error}")


# --- tables --------------------------------------------------------------------------------------------------------


def rows(page: str) -> list[str]:
    return [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_families_is_that_of_the_code(name: str) -> None:
    family = FAMILIES[name]
    [row] = [row for row in rows("encoders.md") if row.startswith(f"| `{name}`")]
    _, checkpoint, licence, gated, stored, side = (cell.strip() for cell in row.strip("|").split("|"))
    assert (checkpoint, licence) == (f"`{family.default_id}`", family.licence)
    assert (gated == "yes", stored == "yes") == (family.gated, family.redistributable)
    assert side == {"grid16": "16 x 16 tokens", "native": "the checkpoint's"}[family.default_side]


@pytest.mark.parametrize("name", [name for name, family in OFFICIAL_FAMILIES.items() if family.recipes])
def test_the_table_of_recipes_is_that_of_the_code(name: str) -> None:
    official = OFFICIAL_FAMILIES[name]
    found = [row for row in rows("conversion.md") if re.match(rf"\| `{name}`.*\| {official.licence} \|$", row)]
    for row, recipe in zip(found, official.recipes, strict=True):
        _, sampler, guidance, _ = (cell.strip() for cell in row.strip("|").split("|"))
        assert sampler.split("`")[1] == recipe.preset
        assert ("shift of the latent" in sampler) == recipe.shift_by_latent
        options = recipe.guidance or recipe.autoguidance or {}
        values = [f"({v[0]:g}, {v[1]:g})" if isinstance(v, tuple) else str(v) for v in options.values()]
        assert (guidance == "none") == (not options)
        assert all(f"`{key}` {value}" in guidance for key, value in zip(options, values, strict=True))


@pytest.mark.parametrize("name", SAMPLER_PRESETS)
def test_the_table_of_samplers_is_that_of_the_code(name: str) -> None:
    preset = SAMPLER_PRESETS[name]
    [row] = [row for row in rows("sampling.md") if row.startswith(f"| `{name}`")]
    _, scheduler, steps, _, shift, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert scheduler.split("`")[1] == preset.scheduler.__name__
    assert int(steps.split()[0]) == preset.num_inference_steps
    assert shift == "-" if preset.shift is None else float(shift) == round(preset.shift, 2)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("conversion.md", list(CONVERSION_FAMILIES)),
        ("training.md", preset_names()),
        ("training.md", [field.name for schema in SCHEMAS for field in dataclasses.fields(schema)]),
        ("data.md", [field.name for field in dataclasses.fields(DataConfig) if field.name != "kind"]),
    ],
    ids=["families", "presets", "run keys", "data keys"],
)
def test_tables_name_everything(page: str, names: list[str]) -> None:
    table = "\n".join(rows(page))
    assert [name for name in names if not re.search(rf"`{name}[`.]", table)] == []
