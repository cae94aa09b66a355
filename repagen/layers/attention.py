"""Attention through diffusers' dispatcher, and the choice of its backend.

Every attention of the library passes `dispatch_attention_fn` in (B, L, heads, head_dim), so that
`set_attention_backend`, `attention_backend(...)`, `DIFFUSERS_ATTN_BACKEND` and context parallelism apply to it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from torch import nn

from repagen.errors import UserError
from repagen.layers.caching import cacheable_processor
from repagen.layers.norms import LayerNorm, RMSNorm
from repagen.layers.rope import apply_rotary

logger = logging.getLogger(__name__)

QKNorm = Literal["layer", "rms"]
"""Norm of queries and keys per head: affine LayerNorm (eps 1e-5) or RMSNorm (eps 1e-6)."""

# Start of a backend's name => package it is imported from. The longest start that fits counts.
_PACKAGES = {
    "xformers": "xformers",
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "_sage": "sageattention",
    "_native_npu": "torch_npu",
    "_native_xla": "torch_xla",
}
# These run wherever PyTorch runs, or on a device of their own.
_WITHOUT_CUDA = ("native", "flex", "_native_flash", "_native_math", "_native_npu", "_native_xla")
# These leave out keys; all others refuse a mask.
_WITH_MASK = (
    "native", "flex", "xformers", "_native_cudnn", "_native_efficient", "_native_math", "_native_npu",
    "flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub", "sage_varlen",
)  # fmt: skip


def _package_of(backend: str) -> str | None:
    if backend.endswith("_hub"):
        return "kernels"
    return next((package for start, package in _PACKAGES.items() if backend.startswith(start)), None)


def check_attention_backend(backend: str) -> None:
    """Refuse an attention backend that cannot run on this machine, before any forward pass.

    Raises:
        UserError: (a ValueError) no backend of that name, it needs CUDA and there is none, or its package is too old.
        ModuleNotFoundError: its package is not installed.
    """
    names = sorted(member.value for member in AttentionBackendName)
    if backend not in names:
        raise UserError(f"attention backend {backend!r} does not exist; allowed are auto, {', '.join(names)}")
    package = _package_of(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"attention backend {backend!r} needs the package {package}, which is not installed; "
            "install it, or use 'native' or 'auto'",
            name=package,
        )
    if backend not in _WITHOUT_CUDA and not torch.cuda.is_available():
        raise UserError(
            f"attention backend {backend!r} runs on CUDA only, and torch.cuda.is_available() is False; "
            "use 'native' or 'auto'"
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
    except RuntimeError as error:
        raise UserError(f"attention backend {backend!r}: {error}") from error


def _usable_mask(attention_mask: torch.Tensor, backend: AttentionBackendName | None) -> torch.Tensor | None:
    """The mask (B, 1, 1, keys) in the form that the backend takes.

    Raises:
        UserError: a key is left out, and the backend can leave out none.
    """
    name = (backend or _AttentionBackendRegistry.get_active_backend()[0]).value
    if name == "xformers":
        return attention_mask[:, 0, 0]  # diffusers would add a boolean mask of four dimensions to the logits
    if name in _WITH_MASK:
        return attention_mask
    if not attention_mask.all():
        raise UserError(
            f"attention backend {name!r} cannot leave out padding; give prompts of one length, without padding and "
            f"each with a text, or take one of: {', '.join(_WITH_MASK)}"
        )
    return None


@cacheable_processor
class AttentionProcessor:
    """Computes an `Attention`; holds the backend that diffusers sets."""

    _attention_backend: AttentionBackendName | None = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        rotary_cos: torch.Tensor | None = None,
        rotary_sin: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend: (B, L, dim) => (B, L, dim); the further arguments as of `Attention.forward`."""
        query, key, value = attn.project(hidden_states, rotary_cos, rotary_sin, encoder_hidden_states)
        if attention_mask is not None:
            attention_mask = _usable_mask(attention_mask, self._attention_backend)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2, 3).to(value.dtype)))


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention, scale head_dim^-0.5: (B, L, dim) => (B, L, dim).

    Args:
        dim: width of a token.
        heads: number of heads; divides dim.
        bias: whether the projections to queries, keys and values have a bias (the output projection has one always).
        qk_norm: norm of queries and keys per head, before the rotary positions.
        is_cross_attention: keys and values come from other tokens, of the same width, than the queries.

    Raises:
        UserError: dim is not a multiple of heads.
    """

    _default_processor_cls: Any = AttentionProcessor
    _available_processors: Any = (AttentionProcessor,)
    processor: Any

    def __init__(
        self,
        dim: int,
        heads: int,
        bias: bool = True,
        qk_norm: QKNorm | None = None,
        is_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError(f"attention: the width {dim} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.head_dim = dim // heads
        self.use_bias = bias
        self.is_cross_attention = is_cross_attention
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q = self._head_norm(qk_norm)
        self.norm_k = self._head_norm(qk_norm)
        self.processor = AttentionProcessor()

    def _head_norm(self, qk_norm: QKNorm | None) -> nn.Module | None:
        if qk_norm is None:
            return None
        return RMSNorm(self.head_dim) if qk_norm == "rms" else LayerNorm(self.head_dim, eps=1e-5)

    def project(
        self,
        hidden_states: torch.Tensor,
        rotary_cos: torch.Tensor | None = None,
        rotary_sin: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values as they are attended with: (B, L, dim) => (B, L, heads, head_dim) each.

        In cross-attention keys and values are of `encoder_hidden_states` (B, K, dim).
        """
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not self.fused_projections:
            query, key, value = self.to_q(hidden_states), self.to_k(source), self.to_v(source)
        elif self.is_cross_attention:
            query, (key, value) = self.to_q(hidden_states), self.to_kv(source).chunk(2, dim=-1)
        else:
            query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        # The number of heads is inferred, so that it may be sharded.
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        if rotary_cos is not None and rotary_sin is not None:
            query, key = apply_rotary(query, rotary_cos, rotary_sin), apply_rotary(key, rotary_cos, rotary_sin)
        return query.to(value.dtype), key.to(value.dtype), value

    def set_use_memory_efficient_attention_xformers(
        self, use_memory_efficient_attention_xformers: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Turn xformers on or off; diffusers calls it for `enable_/disable_xformers_memory_efficient_attention`.

        Raises:
            UserError: (a ValueError) no CUDA here, or an `attention_op` was given: the dispatcher chooses it.
            ModuleNotFoundError: xformers is not installed.
        """
        if not use_memory_efficient_attention_xformers:
            self.processor._attention_backend = None
            return
        if attention_op is not None:
            raise UserError("attention_op: not supported, xformers chooses the operator; leave it out")
        check_attention_backend("xformers")
        self.set_attention_backend("xformers")

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_cos: torch.Tensor | None = None,
        rotary_sin: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over tokens.

        Args:
            hidden_states: (B, L, dim).
            rotary_cos: of `rotary_table`, (L, head_dim), or None for no positions.
            rotary_sin: likewise.
            attention_mask: (B, 1, 1, keys) bool, the keys that are attended to; None: all.
            encoder_hidden_states: (B, keys, dim), of which keys and values are made in cross-attention.

        Raises:
            UserError: a key is left out, and the backend can leave out none.
        """
        return self.processor(
            self,
            hidden_states,
            rotary_cos,
            rotary_sin,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )


class AttentionBackendMixin:
    """Choice of the attention backend of a `ModelMixin`; stands before it among the bases."""

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention backend of this model, and of this model only.

        Args:
            backend: a name that diffusers knows ("native", "xformers", "flash" ...), which is refused at once where
                it cannot run; or "auto": xformers if it can run here, else "native" with one warning.

        Raises:
            UserError: (a ValueError) no backend of that name, or it needs CUDA and there is none.
            ModuleNotFoundError: its package is not installed.
        """
        backend = self._usable_backend() if backend == "auto" else backend.lower()
        check_attention_backend(backend)
        # diffusers would make the choice of one model the default of the whole process.
        default = _AttentionBackendRegistry._active_backend
        try:
            super().set_attention_backend(backend)  # type: ignore[misc]
        finally:
            _AttentionBackendRegistry.set_active_backend(default)

    @staticmethod
    def _usable_backend() -> str:
        try:
            check_attention_backend("xformers")
        except (UserError, ModuleNotFoundError) as error:
            logger.warning("attention backend 'auto' takes 'native': %s", error)
            return "native"
        return "xformers"
