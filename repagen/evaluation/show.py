"""A protocol in plain words: every sentence follows from its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from repagen.evaluation.comparison.likeness import protocol_facts
from repagen.evaluation.encoder_extractors import FEATURE
from repagen.evaluation.inception import InceptionExtractor
from repagen.evaluation.memory import kept_bytes, working_bytes
from repagen.evaluation.protocol import (
    EvaluationProtocol,
    MetricName,
    NeighbourRule,
    SpaceRule,
    load_protocol,
    metric_names,
    protocol_names,
)
from repagen.evaluation.resize import KERNELS

_ASSUMED_WIDTH = 1024  # of an encoder, which is known only once it is opened; DINOv2-L's
_MEGABYTE = 1e6

_LABELS = {
    "balanced": "Image i is of class i mod num_classes, so every class comes equally often. RAE's authors see an FID "
    "about 0.1 lower than with random classes.",
    "random": "The class of each image is drawn uniformly, so some classes come more often than others.",
    None: "Classes are not fixed: balanced or random, and the result says which.",
}
_ROUNDING = {
    "round": "A sampled pixel in [0, 1] becomes 8-bit by rounding 255 x to the nearest whole number.",
    "truncate": "A sampled pixel in [0, 1] becomes 8-bit by cutting off the decimals of 255 x, which darkens pictures "
    "by half a grey level on average.",
}
_REFERENCES = {
    "statistics": "A file of means and covariances (npz)",
    "images": "Images (a folder, npz or dataset)",
    "any": "Images, or a file of means and covariances",
}
_PORTS = {
    "inception": "the Inception network of 2015, whose weights the FID literature shares, in torch-fidelity's port",
    "encoder": "the vision encoder {model} in transformers' port, {pooling}",
    "clip": "the projected image embedding of {model} in transformers' port",
    "timm": "the model {model} of timm in its port, {pooling}",
}
_POOLING = {
    "mean": "the mean of its tokens",
    "cls": "its class token",
    "attention": "its own attention pooling",
}
_PRECISION = {"float32": "float32 without TF32", "bfloat16": "bfloat16 under autocast"}
# Metric => (title, what it is).
_METRICS: dict[MetricName, tuple[str, str]] = {
    "fd": ("Frechet distance", "between Gaussians fitted to the features of all images. Lower is better."),
    "sfid": ("sFID", "the same over Inception's spatial features, which see where things are. Lower is better."),
    "inception_score": (
        "Inception Score",
        "how sure Inception is of an image's class and how varied the classes are; no reference takes part. Higher is "
        "better.",
    ),
    "kid": ("KID", "distance by a polynomial kernel, unbiased in N. Lower is better."),
    "precision_recall": (
        "precision, recall",
        "share of the samples that lie among real images, and of real images among samples. Higher is better.",
    ),
    "density_coverage": ("density, coverage", "the same questions, less moved by outliers. Higher is better."),
    "mind": ("MIND", "sliced Wasserstein distance, made for few images. Lower is better."),
    "cmmd": ("CMMD", "1000 x distance of normalised embeddings by a Gaussian kernel. Lower is better."),
    "fdr": (
        "FDr",
        "mean over these spaces of the Frechet distance divided by that of held-out real images, given as a table. "
        "Lower is better, 1 is as close as held-out images.",
    ),
}
_ORDERS = {
    "file": "consecutive chunks in the order of the files, so that images sorted by class score lower",
    "torch-fidelity": "chunks after torch-fidelity's shuffle, so that the order of files does not matter",
    "seeded": "chunks after a permutation of seed 0, so that the order of files matters little",
}
# Setting => metrics that it moves; every other setting moves them all.
_MOVES: dict[str, tuple[MetricName, ...]] = {
    "inception_score": ("inception_score",),
    "precision_recall": ("precision_recall",),
    "density_coverage": ("density_coverage",),
    "kernel": ("kid",),
    "num_kept": ("kid", "mind", "cmmd"),
}


@dataclass(frozen=True)
class Explanation:
    """A protocol in words.

    Attributes:
        name: of the protocol, or the file it was read from.
        protocol: its settings.
        facts: (title, sentences) of everything it fixes.
        memory_mb: megabytes that are taken, at most and as far as widths are known: `samples` and `reference images`
            by features and covariances that are kept, `metrics` on top while they are computed.
        command: to measure it.
    """

    name: str
    protocol: EvaluationProtocol
    facts: list[tuple[str, str]]
    memory_mb: dict[str, float]
    command: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        settings = {"name": self.name, "protocol": asdict(self.protocol), "memory_mb": self.memory_mb}
        return {**settings, "facts": self.facts, "command": self.command}


def explain(name: str) -> Explanation:
    """Explain a protocol.

    Args:
        name: of a protocol, or path of a YAML file.

    Raises:
        UserError: for an unknown name, key or value.
    """
    protocol = load_protocol(name)
    facts = [*_drawing(protocol), *_measuring(protocol), ("not to be compared", _unlike(name, protocol))]
    return Explanation(name, protocol, facts, _memory(protocol), _command(name, protocol))


def _drawing(protocol: EvaluationProtocol) -> Iterator[tuple[str, str]]:
    size, count = protocol.image_size, protocol.num_samples
    yield "images", f"Samples are {size} x {size} px." if size else "Samples may have any size, one for all."
    yield (
        "number",
        (f"{count:,} generated images stand behind a figure" if count else "All samples that are given count")
        + "; by another number it is another figure.",
    )
    yield "labels", _LABELS[protocol.label_mode]
    yield "8 bits", _ROUNDING[protocol.rounding]
    dtype = protocol.sampling_dtype
    sampling = (
        f"The generator samples in {dtype}" if dtype else "The generator samples in any precision, told in the result"
    )
    yield "precision", f"{sampling}. Samples given as files are taken as they are."
    reference = protocol.reference
    named = f": {reference.description}" if reference.description else ", of your choice"
    layout = f" A file of another layout than {reference.layout}'s is a deviation." if reference.layout else ""
    yield "reference", f"{_REFERENCES[reference.kind]}{named}. The hash of it stands in the result.{layout}"


def _measuring(protocol: EvaluationProtocol) -> Iterator[tuple[str, str]]:
    for space in protocol.spaces:
        yield f"space {space.name}", _space(space)
    for metric, (title, meaning) in _METRICS.items():
        spaces = [space for space in protocol.spaces if metric in space.metrics]
        if spaces:
            names = ", ".join(key for space in spaces for key in _keys(metric, space))
            names = f"fdr (spaces {', '.join(space.name for space in spaces)})" if metric == "fdr" else names
            yield title, f"{names}: {meaning} {_settings_of(metric, protocol)}".rstrip()
    yield "memory", _memory_sentence(protocol)


def _space(space: SpaceRule) -> str:
    rule = space.extractor
    port = _PORTS[rule.kind].format(model=rule.model, pooling=_POOLING[rule.pooling])
    side = f"{rule.size_px} px" if rule.size_px else "the side that the network was made for"
    kernel = f"Images reach {side} by {KERNELS[rule.kernel]}"
    return f"Features of {port}. {kernel}; its name here is {rule.kernel}. It runs in {_PRECISION[rule.precision]}."


def _settings_of(metric: MetricName, protocol: EvaluationProtocol) -> str:
    """What the protocol fixes for one metric."""
    first = f"The first {protocol.num_kept:,} images of each side count, where there are more."
    match metric:
        case "fd":
            return "It lies too high by an amount in proportion to 1/N, which depends on the model."
        case "inception_score":
            return f"The mean over {protocol.inception_score.splits} parts: {_ORDERS[protocol.inception_score.order]}."
        case "precision_recall":
            return _neighbours(protocol.precision_recall)
        case "density_coverage":
            return _neighbours(protocol.density_coverage)
        case "kid":
            rule = protocol.kernel
            drawn = f"The mean over {rule.subsets:,} random subsets of {rule.subset_size:,} images of each side"
            return f"{drawn}; fewer images, and it is left out. {first}"
        case "mind" | "cmmd":
            return first
    return ""


def _keys(metric: MetricName, space: SpaceRule) -> tuple[str, ...]:
    return metric_names(metric, space.name) or (metric,)


def _neighbours(rule: NeighbourRule) -> str:
    return (
        f"A ball around each image reaches to its neighbour number {rule.neighbours} (k). The first "
        f"{rule.num_samples:,} samples and {rule.num_reference:,} reference images count, where there are more; a "
        "reference of statistics alone leaves these two out."
    )


def _dimensions(protocol: EvaluationProtocol) -> dict[str, dict[str, int]]:
    """Space => feature => width."""
    return {
        space.name: InceptionExtractor.dimensions if space.extractor.kind == "inception" else {FEATURE: _ASSUMED_WIDTH}
        for space in protocol.spaces
    }


def _memory(protocol: EvaluationProtocol) -> dict[str, float]:
    """Megabytes of what is kept of each side, and of what the metrics take on top."""
    dimensions = _dimensions(protocol)
    taken = {
        "samples": kept_bytes(protocol, dimensions, reference=False),
        "reference images": kept_bytes(protocol, dimensions, reference=True),
        "metrics": working_bytes(protocol, dimensions),
    }
    return {title: size / _MEGABYTE for title, size in taken.items()}


def _memory_sentence(protocol: EvaluationProtocol) -> str:
    samples, reference, metrics = (f"{size:,.0f} MB" for size in _memory(protocol).values())
    stored = 4 * sum(width for widths in _dimensions(protocol).values() for width in widths.values()) / 1000
    encoders = any(space.extractor.kind != "inception" for space in protocol.spaces)
    assumed = f", an encoder taken for {_ASSUMED_WIDTH:,} features wide" if encoders else ""
    return (
        f"Features that are compared one by one, and covariances, take up to {samples} for samples and {reference} "
        f"for reference images{assumed}; computing the metrics takes about {metrics} on top. On disk are {stored:.0f} "
        "kB of features an image while it runs."
    )


def _unlike(name: str, protocol: EvaluationProtocol) -> str:
    """Every other protocol with a figure of the same name, and what moves that figure."""
    sentences = []
    for other_name in protocol_names():
        other = load_protocol(other_name)
        shared = _shared(protocol, other)
        if other_name != name and shared:
            keys = _differing(protocol, other, shared)
            why = f"differs in {', '.join(keys)}" if keys else "alike in what moves them, but another protocol"
            sentences.append(f"{other_name} ({why})")
    return f"Figures of the same names by {'; '.join(sentences) or 'other protocols'}. `repagen compare` refuses them."


def _shared(protocol: EvaluationProtocol, other: EvaluationProtocol) -> set[tuple[str, MetricName]]:
    """(space, metric) that both measure."""
    first, second = (
        {(space.name, metric) for space in one.spaces for metric in space.metrics} for one in (protocol, other)
    )
    return first & second


def _differing(
    protocol: EvaluationProtocol, other: EvaluationProtocol, shared: set[tuple[str, MetricName]]
) -> list[str]:
    first, second = (protocol_facts(asdict(one)) for one in (protocol, other))
    metrics, spaces = {metric for _, metric in shared}, {space for space, _ in shared}
    keys = []
    for key in dict.fromkeys([*first, *second]):
        section, _, rest = key.partition(".")
        moves = (
            rest.partition(".")[0] in spaces and ".extractor." in key
            if section == "spaces"
            else bool(metrics & set(_MOVES.get(section, metrics)))
        )
        if moves and first.get(key) != second.get(key):
            keys.append(key)
    return keys


def _command(name: str, protocol: EvaluationProtocol) -> str:
    words = ["repagen evaluate generation --protocol", name, "--model PIPELINE"]
    if protocol.num_samples is None:
        words.append("--num-samples 50000")
    words.append("--reference " + ("FOLDER_OR_NPZ" if protocol.reference.kind != "statistics" else "STATISTICS.npz"))
    if any("fdr" in space.metrics for space in protocol.spaces):
        words.append("--normalisers TABLE.json")
    return " ".join([*words, "--output result.json"])
