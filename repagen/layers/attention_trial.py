"""Whether an attention backend works here, found out by running it: some are accepted and fail at the forward pass."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from repagen.errors import one_line
from repagen.layers.attention import check_attention_backend

# Largest error against attention in float64 that rounding explains, relative to the largest value.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_BATCH, _TOKENS, _HEADS = 2, 128, 2


@dataclass(frozen=True)
class AttentionTrial:
    """What came of running a backend once, forward and backward.

    Attributes:
        error: largest error of the output against float64, relative to its largest value; None: the forward pass
            was refused.
        gradient_error: the same of the gradients; None: the backward pass was refused.
        tolerance: what rounding explains of both.
        reason: why a pass was refused, in one line.
    """

    error: float | None
    gradient_error: float | None
    tolerance: float
    reason: str | None = None

    @property
    def runs(self) -> bool:
        """Whether the forward pass gives attention."""
        return self.error is not None and self.error <= self.tolerance

    @property
    def trains(self) -> bool:
        """Whether the backward pass gives its gradients, too."""
        return self.runs and self.gradient_error is not None and self.gradient_error <= self.tolerance

    @property
    def is_wrong(self) -> bool:
        """Whether a pass ran and its values are not those of attention."""
        errors = [error for error in (self.error, self.gradient_error) if error is not None]
        return not all(error <= self.tolerance for error in errors)  # also where one is not a number


def try_attention(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> AttentionTrial:
    """Run a small attention through diffusers' dispatcher and compare it with attention in float64.

    Args:
        backend: a name that diffusers knows. One of a kernel from the Hub must have been loaded.
        device: where it runs.
        dtype: float32, bfloat16 or float16, of queries, keys and values.
        head_dim: channels of a head.
    """
    tolerance = _TOLERANCE[dtype]
    try:
        check_attention_backend(backend)
    except (ValueError, ImportError) as error:
        return AttentionTrial(None, None, tolerance, one_line(error))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, _BATCH, _TOKENS, _HEADS, head_dim, generator=generator).to(dtype)
    expected = _forward("native", drawn.double())
    expected_gradients = _gradients("native", drawn.double())
    drawn = drawn.to(device)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # kernels complain beside their errors
        warnings.simplefilter("ignore")
        try:
            forward_error = _relative_error(_forward(backend, drawn), expected)
        except Exception as refusal:  # a foreign kernel may raise anything
            return AttentionTrial(None, None, tolerance, one_line(refusal))
        try:
            gradient_error = _relative_error(_gradients(backend, drawn), expected_gradients)
        except Exception as refusal:
            return AttentionTrial(forward_error, None, tolerance, one_line(refusal))
    return AttentionTrial(forward_error, gradient_error, tolerance)


@torch.no_grad()
def _forward(backend: str, drawn: torch.Tensor) -> torch.Tensor:
    """Attend with the first three of `drawn` (4, B, L, heads, head_dim), as a sampler does."""
    return dispatch_attention_fn(*drawn[:3], backend=AttentionBackendName(backend))


def _gradients(backend: str, drawn: torch.Tensor) -> torch.Tensor:
    """Gradients (3, B, L, heads, head_dim) of query, key, value, where that of the output is the last of `drawn`."""
    leaves = [part.clone().requires_grad_() for part in drawn[:3]]
    output = dispatch_attention_fn(*leaves, backend=AttentionBackendName(backend))
    return torch.stack(torch.autograd.grad(output, leaves, drawn[3]))


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double().cpu() - expected).abs().max() / expected.abs().max()).item()
