from __future__ import annotations

from pathlib import Path

import pytest

from repagen.errors import UserError
from repagen.evaluation import load_protocol, protocol_names
from repagen.evaluation.extraction import Needs
from repagen.evaluation.measures import needs_of
from repagen.evaluation.protocol import metric_names

INCEPTION = {"pool": 2048, "spatial": 2023, "logits": 1008}


@pytest.mark.parametrize("name", protocol_names())
def test_every_protocol_says_where_it_comes_from(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.title and protocol.source and protocol.explanation


def test_the_published_protocols_are_there() -> None:
    published = {"adm256", "adm512", "rae", "repa", "raev2", "torch-fidelity", "clean", "edm2-dinov2"}
    assert published <= set(protocol_names())


def test_what_separates_the_imagenet_protocols() -> None:
    """reference: labels, rounding and sampling precision, as the published code has them."""
    facts = {
        name: (protocol.num_samples, protocol.label_mode, protocol.rounding, protocol.sampling_dtype)
        for name, protocol in ((name, load_protocol(name)) for name in ("adm256", "rae", "repa", "raev2"))
    }
    assert facts == {
        "adm256": (50_000, "random", "round", None),
        "rae": (50_000, "balanced", "truncate", "float32"),
        "repa": (50_000, "random", "truncate", "float32"),
        "raev2": (50_000, "balanced", "truncate", "bfloat16"),
    }


def test_adm_keeps_what_its_metrics_need_and_no_more() -> None:
    protocol = load_protocol("adm256")
    assert needs_of(protocol, {"inception": INCEPTION}) == Needs(
        moments=("inception.pool", "inception.spatial"),
        kept={"inception.pool": 50_000, "inception.spatial": 2023},
        scored=("inception.logits", 10, "file"),
    )
    assert needs_of(protocol, {"inception": INCEPTION}, reference=True) == Needs(
        moments=("inception.pool", "inception.spatial"),
        kept={"inception.pool": 10_000, "inception.spatial": 2023},
    )


@pytest.mark.parametrize(
    ("metric", "space", "names"),
    [
        ("fd", "inception", ("fid",)),
        ("fd", "dinov2", ("fd_dinov2",)),
        ("sfid", "inception", ("sfid",)),
        ("inception_score", "inception", ("inception_score", "inception_score_std")),
        ("kid", "inception", ("kid", "kid_std")),
        ("kid", "dinov2", ("kid_dinov2", "kid_std_dinov2")),
        ("precision_recall", "inception", ("precision", "recall")),
        ("precision_recall", "clip", ("precision_clip", "recall_clip")),
        ("cmmd", "clip", ("cmmd_clip",)),
    ],
)
def test_names_of_figures(metric: str, space: str, names: tuple[str, ...]) -> None:
    assert metric_names(metric, space) == names  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title: t", "titel: t"), "unknown key; did you mean 'title'"),
        (
            ("kernel: pillow-bicubic", "kernel: lanczos"),
            r"spaces\.0\.extractor\.kernel: expected one of tensorflow1-bil",
        ),
        (("[fd]", "[fid]"), r"spaces\.0\.metrics\.0: expected one of fd, sfid"),
        (("[fd]", "[sfid]"), r"spaces\.0\.metrics: must be without sfid, inception_score, which are Inception's"),
        (("[fd]", "[]"), r"spaces\.0\.metrics: must be at least one metric, each once"),
        (("[fd]", "[fd, fd]"), r"spaces\.0\.metrics: must be at least one metric, each once"),
        (("name: mine", "name: inception"), r"spaces\.0\.name: must be inception for extractors of that kind"),
        (("title: t", "inception_score: {splits: 0}\ntitle: t"), r"inception_score\.splits: must be at least 1"),
        (("title: t", "kernel: {subsets: 0}\ntitle: t"), r"kernel\.subsets: must be at least 1"),
        (
            ("title: t", "precision_recall: {neighbours: 3, num_samples: -5}\ntitle: t"),
            r"precision_recall\.num_samples: must be above neighbours=3",
        ),
        (("[fd]", "[fdr]"), r"spaces\.0\.metrics: must be with fd, which fdr divides"),
        (("model: org/name", "model: ''"), r"spaces\.0\.extractor\.model: must be a folder, Hub id or name"),
        (("num_samples: 9", "num_samples: 0"), "num_samples: must be at least 1"),
    ],
)
def test_a_protocol_of_ones_own_is_read_strictly(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = """title: t
source: s
num_samples: 9
spaces:
  - name: mine
    extractor: {kind: encoder, model: org/name, kernel: pillow-bicubic}
    metrics: [fd]
"""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert load_protocol(path).spaces[0].extractor.model == "org/name"
    path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=message):
        load_protocol(path)


def test_an_unknown_protocol_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no protocol 'adm': .* one of adm256, adm512, clean.*repagen evaluate show"):
        load_protocol("adm")
