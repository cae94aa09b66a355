"""Official generators: SiT, REPA's and iREPA's SiT, and RAE's DiT^DH.

Each family states how its constructor's arguments become ours and how our tensors are called in its files. The names
decide which tensors a file must have: those of our model, no more and no fewer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from repagen.alignment import AlignmentTarget, RepresentationAlignment
from repagen.conversion.checkpoint_file import read_state_dict
from repagen.errors import UserError
from repagen.models.transformer_ditdh import DiTDHTransformer2DModel
from repagen.models.transformer_sit import SiTTransformer2DModel

State = Mapping[str, torch.Tensor]
Generator = SiTTransformer2DModel | DiTDHTransformer2DModel

_SIT_ARGUMENTS = frozenset(
    {
        "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio",
        "class_dropout_prob", "num_classes", "learn_sigma",
    }
)  # fmt: skip
# path_type, use_cfg and fused_attn change nothing in the network; decoder_hidden_size must equal hidden_size.
_REPA_ARGUMENTS = (_SIT_ARGUMENTS - {"learn_sigma"}) | {
    "path_type", "decoder_hidden_size", "encoder_depth", "use_cfg", "z_dims", "projector_dim", "qk_norm", "fused_attn",
}  # fmt: skip
_IREPA_ARGUMENTS = _REPA_ARGUMENTS | {"projection_layer_type", "proj_kwargs_kernel_size"}
_DITDH_ARGUMENTS = (_SIT_ARGUMENTS - {"learn_sigma"}) | {
    "use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "use_pos_embed",
}  # fmt: skip

# Part of our name => part of the official one; the first that fits counts, then the next.
_BLOCK_NAMES = (
    (r"\.attn\.to_[qkv]\.", ".attn.qkv."),
    (r"\.attn\.to_out\.0\.", ".attn.proj."),
    (r"\.attn\.norm_([qk])\.", r".attn.\1_norm."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
)
_OUTER_NAMES = (
    (r"^label_embedder\.table\.", "y_embedder.embedding_table."),
    (r"^time_embedder\.frequencies$", "t_embedder.W"),
    (r"^time_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^norm_out\.", "final_layer.norm_final."),
    (r"^modulation_out\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
)
_GELU_NAMES = ((r"\.ff\.linear_in\.", ".mlp.fc1."), (r"\.ff\.linear_out\.", ".mlp.fc2."))
_SWIGLU_NAMES = ((r"\.ff\.linear_in\.", ".mlp.w12."), (r"\.ff\.linear_out\.", ".mlp.w3."))
_SIT_NAMES = (*_BLOCK_NAMES, *_OUTER_NAMES, *_GELU_NAMES, (r"^patch_embed\.", "x_embedder."))
_DITDH_NAMES = (
    *_BLOCK_NAMES,
    *_OUTER_NAMES,
    (r"^patch_embed\.", "s_embedder."),
    (r"^head_patch_embed\.", "x_embedder."),
    (r"^condition_proj\.", "s_projector."),
    (r"^rope\.(cos|sin)$", r"enc_feat_rope.freqs_\1"),
    (r"^head_rope\.(cos|sin)$", r"dec_feat_rope.freqs_\1"),
)


def convert_generator(
    family: str, path: Path, config: Mapping[str, Any] | None, with_projectors: bool
) -> Generator | tuple[Generator, RepresentationAlignment]:
    """Read an official generator; arguments, result and errors are those of `repagen.convert_checkpoint`."""
    kind = _FAMILIES[family]
    config = dict(config or {})
    if unknown := sorted(set(config) - kind.arguments):
        raise UserError(
            f"config: {family} has no argument {unknown[0]!r}; allowed are {', '.join(sorted(kind.arguments))}"
        )
    if with_projectors and not kind.has_projectors:
        raise UserError(f"with_projectors: a {family} checkpoint holds no projectors; leave it out")
    state = read_state_dict(path)
    state = {_modern_name(name, config): tensor for name, tensor in state.items()}
    source = _Source(path, state, config)
    with torch.device("meta"):
        model = kind.build(source)
    projectors = {name: tensor for name, tensor in state.items() if name.startswith("projectors.")}
    network = {name: tensor for name, tensor in state.items() if name not in projectors or not kind.has_projectors}
    _load(model, lambda name: kind.official_name(model, name), network, path)
    model.eval()
    if not with_projectors:
        return model
    with torch.device("meta"):
        alignment = _build_alignment(source, model.config.hidden_size)
    _load(alignment, lambda name: _official_projector_name(alignment, name, family), projectors, path)
    return model, alignment.eval()


class _Source:
    """A state dict and the arguments given with it: what a family reads its sizes from."""

    def __init__(self, path: Path, state: State, config: Mapping[str, Any]) -> None:
        self.path = path
        self.state = state
        self.config = config

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.state:
            raise UserError(f"{self.path}: the tensor {name} is missing; is the family right?")
        return self.state[name]

    def get(self, argument: str, inferred: Callable[[], Any]) -> Any:
        return self.config[argument] if argument in self.config else inferred()

    def need(self, argument: str, why: str) -> Any:
        if argument not in self.config:
            raise UserError(f"{self.path}: config needs {argument}, which the tensors do not tell: {why}")
        return self.config[argument]

    def count(self, prefix: str) -> int:
        numbers = [int(m[1]) for name in self.state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
        return max(numbers, default=-1) + 1

    def input_size(self, num_tokens: int, patch_size: int) -> int:
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise UserError(f"{self.path}: {num_tokens} positions form no square; official models are square")
        return side * patch_size

    def heads(self, width: int, block: int) -> int:
        """Heads of a block from its query norm, or those of the published model of that width."""
        query_norm = self.state.get(f"blocks.{block}.attn.q_norm.weight")
        if query_norm is not None:
            return width // query_norm.shape[0]
        published = {sizes["hidden_size"]: sizes["num_heads"] for sizes in SiTTransformer2DModel._sizes.values()}
        return (
            published[width] if width in published else self.need("num_heads", f"no published model is {width} wide")
        )

    def classes(self) -> dict[str, Any]:
        """num_classes and class_dropout_prob, which together make the rows of the class table."""
        rows = self.tensor("y_embedder.embedding_table.weight").shape[0]
        given = self.config.get("num_classes")
        dropout = self.get("class_dropout_prob", lambda: 0.0 if rows == given else 0.1)
        return {"num_classes": rows - (dropout > 0) if given is None else given, "class_dropout_prob": dropout}


def _build_sit(source: _Source, time_direction: str) -> SiTTransformer2DModel:
    width, channels, patch_size, _ = source.tensor("x_embedder.proj.weight").shape
    patch_size = source.get("patch_size", lambda: patch_size)
    channels = source.get("in_channels", lambda: channels)
    width = source.get("hidden_size", lambda: width)
    has_qk_norm = "blocks.0.attn.q_norm.weight" in source.state
    return SiTTransformer2DModel(
        sample_size=source.get(
            "input_size", lambda: source.input_size(source.tensor("pos_embed").shape[1], patch_size)
        ),
        patch_size=patch_size,
        in_channels=channels,
        hidden_size=width,
        depth=source.get("depth", lambda: source.count("blocks")),
        num_heads=source.get("num_heads", lambda: source.heads(width, block=0)),
        mlp_ratio=source.get("mlp_ratio", lambda: source.tensor("blocks.0.mlp.fc1.weight").shape[0] / width),
        # Not from the flag: official training and sampling scripts disagree about it.
        learn_sigma=source.tensor("final_layer.linear.weight").shape[0] == 2 * patch_size**2 * channels,
        qk_norm=source.get("qk_norm", lambda: has_qk_norm),
        time_direction=time_direction,
        **source.classes(),
    )


def _build_ditdh(source: _Source) -> DiTDHTransformer2DModel:
    if source.config.get("wo_shift", False):
        raise UserError("config: wo_shift=True is not supported; the official network cannot run it either")
    if any(size != 1 for size in _pair(source.get("patch_size", lambda: 1))):
        raise UserError("config: patch_size must be 1; the official network cannot run another")
    channels = source.tensor("s_embedder.proj.weight").shape[1]
    widths = _pair(
        source.get("hidden_size", lambda: [source.tensor(f"{e}_embedder.proj.weight").shape[0] for e in "sx"])
    )
    depths = source.get("depth", lambda: _ditdh_depths(source, widths))
    heads = _pair(source.get("num_heads", lambda: _ditdh_heads(source, widths, depths)))
    state = source.state
    return DiTDHTransformer2DModel(
        sample_size=source.get("input_size", lambda: source.input_size(_ditdh_tokens(source), 1)),
        in_channels=source.get("in_channels", lambda: channels),
        hidden_size=widths[0],
        depth=depths[0],
        num_heads=heads[0],
        head_hidden_size=widths[1],
        head_depth=depths[1],
        head_num_heads=heads[1],
        mlp_ratio=source.get("mlp_ratio", lambda: 4.0),
        qk_norm=source.get("use_qknorm", lambda: "blocks.0.attn.q_norm.weight" in state),
        use_swiglu=source.get("use_swiglu", lambda: "blocks.0.mlp.w12.weight" in state),
        use_rope=source.get("use_rope", lambda: "enc_feat_rope.freqs_cos" in state),
        use_rmsnorm=source.get("use_rmsnorm", lambda: "blocks.0.norm1.weight" in state),
        use_pos_embed=source.get("use_pos_embed", lambda: "pos_embed" in state),
        **source.classes(),
    )


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value, value]


def _ditdh_depths(source: _Source, widths: list[int]) -> list[int]:
    total = source.count("blocks")
    if widths[0] == widths[1]:
        return list(source.need("depth", "deep part and head have the same width"))
    deep = sum(source.tensor(f"blocks.{i}.attn.proj.weight").shape[0] == widths[0] for i in range(total))
    return [deep, total - deep]


def _ditdh_heads(source: _Source, widths: list[int], depths: list[int]) -> list[int]:
    tables = [source.state.get(f"{part}_feat_rope.freqs_cos") for part in ("enc", "dec")]
    return [
        source.heads(width, block) if table is None else width // table.shape[1]
        for width, block, table in zip(widths, (0, depths[0]), tables, strict=True)
    ]


def _ditdh_tokens(source: _Source) -> int:
    if "pos_embed" in source.state:
        return source.state["pos_embed"].shape[1]
    if "enc_feat_rope.freqs_cos" in source.state:
        return source.state["enc_feat_rope.freqs_cos"].shape[0]
    return source.need("input_size", "the file has no position table") ** 2


def _build_alignment(source: _Source, hidden_size: int) -> RepresentationAlignment:
    weights = [_last_weight(source, number) for number in range(source.count("projectors"))]
    if not weights:
        raise UserError(f"{source.path}: with_projectors, but the file holds no projectors.*")
    dims = source.get("z_dims", lambda: [weight.shape[0] for weight in weights])
    if 0 in dims:
        raise UserError(f"{source.path}: the projectors are empty; the model was trained without an encoder")
    is_irepa = any(".projection_layer." in name for name in source.state)
    # The MLP's first layer is layers 0 of a Sequential; a single layer has no number in its name.
    has_mlp = any(re.match(r"projectors\.0\.(projection_layer\.)?4\.", name) for name in source.state)
    inferred = "mlp" if has_mlp else "conv" if weights[0].ndim == 4 else "linear"
    projector = source.get("projection_layer_type", lambda: inferred)
    kernel_size = weights[0].shape[-1] if weights[0].ndim == 4 else 3
    block = source.need("encoder_depth", "the block after which the model was aligned")
    inner_dim = source.get("projector_dim", lambda: weights[0].shape[1] if has_mlp else 2048)
    return RepresentationAlignment(
        hidden_size,
        [
            AlignmentTarget(
                dim=dim,
                block=block,
                projector=projector,
                loss="spatial_cosine" if is_irepa else "cosine",
                projector_dim=inner_dim,
                kernel_size=source.get("proj_kwargs_kernel_size", lambda: kernel_size),
            )
            for dim in dims
        ],
    )


def _last_weight(source: _Source, number: int) -> torch.Tensor:
    names = [name for name in source.state if re.match(rf"projectors\.{number}\..*weight$", name)]
    return source.tensor(max(names, default=f"projectors.{number}.weight"))


def _modern_name(name: str, config: Mapping[str, Any]) -> str:
    """REPA's first releases split the blocks in two lists."""
    if match := re.match(r"decoder_blocks\.(\d+)\.(.*)", name):
        if "encoder_depth" not in config:
            raise UserError("config: this file has decoder_blocks.*; encoder_depth is needed to number them")
        return f"blocks.{int(match[1]) + config['encoder_depth']}.{match[2]}"
    return name


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for ours, official in table:
        name = re.sub(ours, official, name)
    return name


def _official_sit_name(model: Any, name: str) -> str:
    return _renamed(name, _SIT_NAMES)


def _official_ditdh_name(model: Any, name: str) -> str:
    if match := re.match(r"head_blocks\.(\d+)\.(.*)", name):
        name = f"blocks.{int(match[1]) + model.config.depth}.{match[2]}"
    return _renamed(name, (*_DITDH_NAMES, *(_SWIGLU_NAMES if model.config.use_swiglu else _GELU_NAMES)))


def _official_projector_name(alignment: RepresentationAlignment, name: str, family: str) -> str:
    infix = "projection_layer." if family == "irepa" else ""
    single = r"(layers\.0|conv)\." if alignment.targets[0].projector != "mlp" else r"layers\."
    return re.sub(rf"^projectors\.(\d+)\.{single}", rf"projectors.\1.{infix}", name)


def _load(module: torch.nn.Module, official_name: Callable[[str], str], state: State, path: Path) -> None:
    """Load a module built on the meta device from exactly the official tensors that belong to it."""
    parts: dict[str, list[str]] = {}
    for name in module.state_dict():
        parts.setdefault(official_name(name), []).append(name)
    if missing := sorted(parts.keys() - state.keys()):
        raise UserError(f"{path}: {_listed(missing)} missing; the file does not fit the family or its config")
    if left_over := sorted(state.keys() - parts.keys()):
        raise UserError(f"{path}: {_listed(left_over)} left over; the file does not fit the family or its config")
    loaded = {}
    for official, names in parts.items():
        shape = list(module.state_dict()[names[0]].shape)
        expected = [shape[0] * len(names), *shape[1:]]  # queries, keys and values are packed in this order
        if list(state[official].shape) != expected:
            raise UserError(
                f"{path}: {official} has shape {list(state[official].shape)}, the config asks for {expected}"
            )
        chunks = state[official].float().chunk(len(names))
        loaded.update({name: chunk.clone() for name, chunk in zip(names, chunks, strict=True)})
    module.load_state_dict(loaded, assign=True)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"tensor{'s' if len(names) > 1 else ''} {shown}"


class _Family(NamedTuple):
    arguments: frozenset[str]
    build: Callable[[_Source], Generator]
    official_name: Callable[[Any, str], str]
    has_projectors: bool


_FAMILIES = {
    "sit": _Family(_SIT_ARGUMENTS, lambda s: _build_sit(s, "data_at_one"), _official_sit_name, False),
    "sit_repa": _Family(_REPA_ARGUMENTS, lambda s: _build_sit(s, "data_at_zero"), _official_sit_name, True),
    "irepa": _Family(_IREPA_ARGUMENTS, lambda s: _build_sit(s, "data_at_zero"), _official_sit_name, True),
    "ditdh": _Family(_DITDH_ARGUMENTS, _build_ditdh, _official_ditdh_name, False),
}
