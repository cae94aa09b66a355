"""The rules of CONTRIBUTING.md that a machine can hold."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "repagen").rglob("*.py"))
SCRIPTS = sorted(
    path
    for folder in ("train", "eval", "examples", "pipelines", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
LONGEST_FILE, LONGEST_MODEL_FILE = 500, 700
LONGEST_FUNCTION, LONGEST_LOOP = 80, 150
P90_FUNCTION = 35

Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_of(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, Function))


def length(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def calls_of(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call in a file with the dotted name of what is called."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_files_are_short() -> None:
    long = []
    for path in LIBRARY:
        limit = LONGEST_MODEL_FILE if path.parent.name in ("models", "pipelines") else LONGEST_FILE
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}")
    assert not long, "\n".join(long)


def test_nine_of_ten_functions_are_short() -> None:
    lengths = [length(function) for path in LIBRARY for function in functions_of(path)]
    assert statistics.quantiles(lengths, n=10)[-1] <= P90_FUNCTION


def test_no_function_is_long() -> None:
    """A model's constructor, a pipeline's call and a training loop may be longer."""
    long = []
    for path in LIBRARY:
        for function in functions_of(path):
            is_loop = function.name in ("__init__", "__call__", "train")
            limit = LONGEST_LOOP if is_loop else LONGEST_FUNCTION
            if length(function) > limit:
                long.append(f"{place(path, function)}: {function.name} has {length(function)} lines, at most {limit}")
    assert not long, "\n".join(long)


def test_the_library_does_not_print() -> None:
    """Only the command line prints; programs write errors to stderr in `errors.run_as_program`."""
    wrong = [
        place(path, call)
        for path in LIBRARY
        for call, name in calls_of(path)
        if name in ("print", "sys.stdout.write") and path.name != "cli.py"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_uses_torch_hub() -> None:
    """torch.hub runs code from the network, and its caches carry no hashes."""
    used = [
        place(path, node)
        for path in (*LIBRARY, *SCRIPTS)
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.hub")
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.hub"))
        or (isinstance(node, ast.ImportFrom) and node.module == "torch" and any(n.name == "hub" for n in node.names))
        or (isinstance(node, ast.Import) and any(name.name.startswith("torch.hub") for name in node.names))
    ]
    assert not used, "\n".join(used)


def unsafe_load(call: ast.Call, name: str) -> bool:
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load":
        return options.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return options.get("allow_pickle") != "False"
    if name == "yaml.load":
        return "Safe" not in options.get("Loader", "")
    return name in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "eval", "exec", "torch.jit.load", "joblib.load")


def test_nothing_loads_code_from_files() -> None:
    """Weights are tensors. Each load says so itself: a default of a library may change."""
    wrong = [
        place(path, call) for path in (*LIBRARY, *SCRIPTS) for call, name in calls_of(path) if unsafe_load(call, name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("pickle.loads(content)", True),
        ("json.loads(content)", False),
    ],
)
def test_unsafe_loads_are_recognised(source: str, unsafe: bool) -> None:
    call = ast.parse(source).body[0].value  # type: ignore[attr-defined]
    assert unsafe_load(call, ast.unparse(call.func)) is unsafe


def test_every_module_with_code_postpones_its_annotations() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in LIBRARY
        if any(functions_of(path)) and "from __future__ import annotations" not in path.read_text(encoding="utf-8")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_bare_except() -> None:
    wrong = [
        place(path, node)
        for path in (*LIBRARY, *SCRIPTS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not wrong, "\n".join(wrong)


def test_all_arguments_and_results_are_typed() -> None:
    wrong = []
    for path in LIBRARY:
        for function in functions_of(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            extra = [one for one in (function.args.vararg, function.args.kwarg) if one is not None]
            untyped = [one.arg for one in (*arguments, *extra) if one.annotation is None]
            missing = [name for name in untyped if name not in ("self", "cls")]
            if missing or function.returns is None:
                wrong.append(f"{place(path, function)}: {function.name}: {', '.join(missing) or 'result'}")
    assert not wrong, "\n".join(wrong)
