"""A protocol in plain words must mention everything that the protocol fixes."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repagen import cli
from repagen.config import save_config
from repagen.errors import UserError
from repagen.evaluation.extractor import ExtractorRule
from repagen.evaluation.protocol import (
    EvaluationProtocol,
    MetricName,
    NeighbourRule,
    SpaceRule,
    load_protocol,
    protocol_names,
)
from repagen.evaluation.show import explain
from repagen.evaluation.show_command import measured

DOCS = Path(__file__).parents[2] / "docs" / "evaluation_protocols.md"


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["repagen", "evaluate", "show", *words])
        cli.main()
        return capsys.readouterr().out

    return run


def full_protocol() -> EvaluationProtocol:
    """With every metric, so that every setting is of consequence."""
    rule = ExtractorRule("timm", "model-of-timm", size_px=224)
    everywhere: list[MetricName] = ["fd", "kid", "precision_recall", "density_coverage", "mind", "cmmd", "fdr"]
    inception = SpaceRule("inception", ExtractorRule(), [*everywhere, "sfid", "inception_score"])
    return EvaluationProtocol(
        title="a title", source="a source", explanation="words", image_size=64, num_samples=5000, label_mode="random",
        spaces=[SpaceRule("own", rule, everywhere), inception],
    )  # fmt: skip


def other_value(key: str, value: Any, kind: Any) -> Any:
    choices = [choice for part in (kind, *typing.get_args(kind)) for choice in typing.get_args(part)]
    choices = [choice for choice in choices if isinstance(choice, str) and choice not in (value, "inception")]
    if choices:
        return choices[0]
    return value + 7 if isinstance(value, int) else f"{value}other"


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of the values of a schema, those of the first space standing for all spaces."""
    if dataclasses.is_dataclass(tree):
        names = [field.name for field in dataclasses.fields(tree)]
        return [leaf for name in names for leaf in leaves(getattr(tree, name), (*path, name))]
    return leaves(tree[0], (*path, 0)) if path == ("spaces",) else [path]


def reached(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        tree = tree[step] if isinstance(step, int) else getattr(tree, step)
    return tree


@pytest.mark.parametrize("path", leaves(full_protocol()), ids=lambda path: ".".join(map(str, path)))
def test_every_setting_is_mentioned(path: tuple[Any, ...], tmp_path: Path, show: Callable[..., str]) -> None:
    before, after = full_protocol(), full_protocol()
    owner = reached(after, path[:-1])
    kind = typing.get_type_hints(type(owner))[path[-1]]
    value = getattr(owner, path[-1])
    changed = ["fd", "kid"] if path[-1] == "metrics" else other_value(path[-1], value, kind)
    setattr(owner, path[-1], changed)
    assert changed != value
    for protocol, file in ((before, "one.yaml"), (after, "two.yaml")):
        save_config(protocol, tmp_path / file)
    texts = [show(str(tmp_path / file)).replace(file, "") for file in ("one.yaml", "two.yaml")]
    # The last fact compares settings by their keys; a sentence must mention them too.
    texts = [text[: text.index("not to be compared")] for text in texts]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("name", protocol_names())
def test_values_stand_in_the_text(name: str, show: Callable[..., str]) -> None:
    protocol, text = load_protocol(name), " ".join(show(name).split())
    assert text.startswith(
        f"{name}: {protocol.title} source: {protocol.source} {' '.join(protocol.explanation.split())}"
    )
    assert f"repagen evaluate generation --protocol {name} " in text
    if protocol.num_samples:
        assert f"{protocol.num_samples:,} generated images" in text
    for space in protocol.spaces:
        assert space.extractor.model in text and space.extractor.kernel in text
    assert protocol.reference.description in text


@pytest.mark.parametrize("name", protocol_names())
def test_the_command_is_understood(name: str) -> None:
    words = shlex.split(explain(name).command)
    assert words[0] == "repagen"
    args = cli._parse(words[1:])
    assert (args.protocol, args.subject) == (name, "generation")
    assert (args.normalisers is not None) == any("fdr" in space.metrics for space in load_protocol(name).spaces)
    assert load_protocol(name).num_samples or args.num_samples


def test_metrics_that_are_not_measured_are_not_explained(show: Callable[..., str]) -> None:
    text = show("edm2-dinov2")
    assert "Inception Score" not in text and "KID" not in text and "neighbour" not in text


def test_other_protocols_are_told_apart() -> None:
    unlike = dict(explain("rae").facts)["not to be compared"]
    assert "repa (differs in label_mode)" in unlike
    assert "adm256 (differs in label_mode, rounding, sampling_dtype)" in unlike
    assert " rae (" not in unlike


def test_memory() -> None:
    # 50,000 x 2048 float32 and two float64 covariances (2048 and 2023 wide, whose rows for the distance are kept too).
    pool, spatial = 4 * 50_000 * 2048 + 8 * 2048**2, 4 * 2023 * 2023 + 8 * 2023**2
    memory = explain("adm256").memory_mb
    assert memory["samples"] == pytest.approx((pool + spatial) / 1e6)
    # Of 10,000 reference images precision and recall hold all.
    assert memory["samples"] - memory["reference images"] == pytest.approx(4 * 40_000 * 2048 / 1e6)


MEASURING = """
import sys
import torch
import torch_fidelity.metric_kid
from repagen.evaluation.measures import Side, measure, needs_of
from repagen.evaluation.moments import Statistics
from repagen.evaluation.protocol import load_protocol

def memory(key):
    [line] = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(line.split()[1]) * 1024

def side(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(min(needs.kept[name], count), width, generator=generator)
    statistics = {}
    for name_of_moments in needs.moments:
        root = torch.randn(width, width, generator=generator, dtype=torch.float64)
        statistics[name_of_moments] = Statistics(torch.zeros(width).double(), root @ root.T, count)
    return Side(statistics, {name: features})

protocol, name, width, count = load_protocol(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
space, feature = name.split(".")
needs = needs_of(protocol, {space: {feature: width}})
before = memory("VmRSS")
figures = measure(protocol, side(0), side(1))
assert not figures.left_out, figures.left_out
print((memory("VmHWM") - before) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak memory")
@pytest.mark.parametrize(
    ("space", "metrics", "count"),
    [
        ("inception", ["fd", "precision_recall"], 4000),
        ("own", ["fd", "precision_recall", "density_coverage", "kid", "mind", "cmmd"], 3000),
        ("own", ["mind"], 20_000),
        ("own", ["cmmd"], 3000),
        ("own", ["density_coverage"], 3000),
    ],
)
def test_the_memory_told_is_the_memory_taken(space: str, metrics: Any, count: int, tmp_path: Path) -> None:
    rule = ExtractorRule() if space == "inception" else ExtractorRule("timm", "model-of-timm", size_px=224)
    near = NeighbourRule(3, num_samples=count, num_reference=count)
    protocol = EvaluationProtocol(
        title="a title", source="a source", image_size=64, num_samples=count, num_kept=count, precision_recall=near,
        density_coverage=near, spaces=[SpaceRule(space, rule, metrics)],
    )  # fmt: skip
    save_config(protocol, tmp_path / "mine.yaml")
    feature, width = ("inception.pool", 2048) if space == "inception" else ("own.features", 1024)
    words = [str(tmp_path / "mine.yaml"), feature, str(width), str(count)]
    told = sum(explain(words[0]).memory_mb.values())
    run = subprocess.run([sys.executable, "-c", MEASURING, *words], capture_output=True, text=True, check=True)
    taken = float(run.stdout)
    assert told / 1.5 < taken < told * 1.5, (told, taken)


def test_all_protocols_are_listed(show: Callable[..., str]) -> None:
    text = show()
    for name in protocol_names():
        assert re.search(rf"^{re.escape(name)} +{re.escape(load_protocol(name).title)}$", text, re.MULTILINE)
    assert "N 50,000, labels balanced: fid, inception_score, fd_convnext" in text and ", fdr\n" in text


def test_json(show: Callable[..., str]) -> None:
    one = json.loads(show("adm256", "--json"))
    assert one["protocol"] == dataclasses.asdict(load_protocol("adm256"))
    assert one["command"].startswith("repagen evaluate generation") and one["memory_mb"]["samples"] > 0
    assert json.loads(show("--json")).keys() == set(protocol_names())


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(UserError, match=r"no protocol 'adm255'.*adm256"):
        explain("adm255")


def test_a_protocol_of_ones_own(tmp_path: Path, show: Callable[..., str]) -> None:
    protocol = copy.deepcopy(load_protocol("clean"))
    protocol.num_samples = 1234
    save_config(protocol, tmp_path / "mine.yaml")
    assert "1,234 generated images" in show(str(tmp_path / "mine.yaml"))


def test_the_guide_lists_the_protocols() -> None:
    table = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    listed = {row[0].strip("`"): row[1:] for row in cells if row[0].strip("`") in protocol_names()}
    assert list(listed) == protocol_names()
    for name, (kernels, count, labels, rounding, reference, metrics) in listed.items():
        protocol = load_protocol(name)
        used = dict.fromkeys(f"`{space.extractor.kernel}`" for space in protocol.spaces)
        assert kernels == ", ".join(used)
        assert count == (f"{protocol.num_samples:,}" if protocol.num_samples else "any")
        assert (labels, rounding) == (protocol.label_mode or "any", protocol.rounding)
        assert (reference, metrics) == (protocol.reference.kind, ", ".join(measured(protocol)))
