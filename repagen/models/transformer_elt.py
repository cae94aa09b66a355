"""Elastic Looped Transformer (ELT, Goyal et al. 2026, arXiv 2604.09168): few blocks, passed several times."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.faster_cache import FasterCacheBlockHook
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin

from repagen.errors import UserError
from repagen.layers.embeddings import SinusoidalTimeEmbedding
from repagen.layers.latent_transformer import TimeDirection
from repagen.layers.lora import apply_lora_scale
from repagen.layers.modulated import ModulatedBlock
from repagen.layers.single_stack import SingleStackMixin

_CACHES_BY_CONTEXT = (FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig)
_CACHES_OF_ATTENTION = (PyramidAttentionBroadcastConfig, FasterCacheConfig)
"""Their hooks have a single state, whatever the context."""


class _StateOfLoops:
    """A state for each loop in place of the single one of a hook: reads and writes go to the loop that runs."""

    def __init__(self, kind: Callable[[], Any], running_loop: Callable[[], int]) -> None:
        vars(self).update(_states=collections.defaultdict(kind), _running_loop=running_loop)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # else a copy, made before there are states, would look for them here
            raise AttributeError(name)
        return getattr(self._states[self._running_loop()], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._states[self._running_loop()], name, value)

    def reset(self) -> None:
        """Forget all loops."""
        self._states.clear()


@dataclass
class ELTTransformerOutput(Transformer2DModelOutput):
    """Predictions (B, C, h, w) of the last loop and, in the order asked for, of earlier ones."""

    loop_samples: tuple[torch.Tensor, ...] | None = None


class ELTTransformer2DModel(  # type: ignore[misc]  # diffusers' own bases disagree about attributes
    SingleStackMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """SiT whose `depth` blocks are passed `num_loops` times: the compute of a deep network in a small one's memory.

    From the paper: N unique blocks, the same weights in every loop, any number of loops in sampling (`num_loops` of
    the call), and intra-loop self-distillation in training, where one pass gives the teacher (all loops) and a student
    that leaves after a random loop m < num_loops:

        out = model(x_t, t, labels, return_loops=[m])
        student, teacher = out.loop_samples[0], out.sample
        loss = L(teacher) + w * L(student) + (1 - w) * loop_distillation_loss(student, teacher)

    L being the ordinary loss, w falling linearly from 1 to 0 over training and the teacher detached in the last term
    (`repagen.flow.distillation`). There is no released code. Ours are the choices that published notes on the paper
    leave open: the blocks and the output layer are SiT's, nothing tells the block which loop it is in, the latent
    enters before the first loop only, and the distillation loss is the plain mean square in the type of the
    prediction. With one loop the network is `SiTTransformer2DModel` with the same weights.

    Call `initialize_weights` before training from scratch. The residual stream, norms and time embedding are float32
    in every precision.

    Args:
        sample_size: height and width of the latent, one number for a square. Fixed: the model has one position table.
        patch_size: side of a patch.
        in_channels: channels C of the latent.
        hidden_size: width of a token.
        depth: unique blocks N; the parameters do not depend on the loops.
        num_loops: loops L in training, and the default and the most in sampling.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the feed-forward part over `hidden_size`.
        num_classes: classes; 0 for an unconditional model, which ignores `class_labels`.
        class_dropout_prob: share of training labels the trainer replaces by the null label `num_classes`; above 0 the
            class table has a null row, and the model can be guided. The model itself drops nothing.
        qk_norm: affine LayerNorm of queries and keys.
        prediction_type: what the output is: "velocity" (noise - data), "sample" or "epsilon".
        time_direction: how the network inside counts time; the outside is always t = 0 for data (see `TimeDirection`).

    Raises:
        UserError: `num_loops` below 1.
    """

    # Widths and loops of the paper's masked generators, 8 x 3 loops of size L and 7 x 4 of XL; ours have modulation.
    _sizes: ClassVar[dict[str, dict[str, int]]] = {
        "L": {"hidden_size": 1024, "depth": 8, "num_loops": 3, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 7, "num_loops": 4, "num_heads": 16},
    }
    _cache_context: tuple[str, dict[str, Any]] | None = None
    _loop = 1  # that runs, as long as a cache is enabled

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 7,
        num_loops: int = 4,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        prediction_type: Literal["velocity", "sample", "epsilon"] = "velocity",
        time_direction: TimeDirection = "data_at_zero",
    ) -> None:
        super().__init__()
        if num_loops < 1:
            raise UserError(f"num_loops: at least 1, got {num_loops}")
        self._build_stack(
            SinusoidalTimeEmbedding(hidden_size),
            (
                ModulatedBlock(hidden_size, num_heads, mlp_ratio, qk_norm="layer" if qk_norm else None)
                for _ in range(depth)
            ),
            out_channels=in_channels,
        )

    @apply_lora_scale
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        num_loops: int | None = None,
        return_loops: Sequence[int] | None = None,
    ) -> ELTTransformerOutput | tuple[Any, ...]:
        """Predict from a noisy latent.

        Args:
            hidden_states: x_t, (B, C, h, w).
            timestep: t in [0, 1], 0 = data, 1 = noise; (B,), or one number for all.
            class_labels: (B,) integers in [0, num_classes), or num_classes for no class where there is a null row.
            attention_kwargs: {"scale": float} scales LoRA layers.
            return_dict: an output object, else a tuple.
            num_loops: loops, 1 to the config's `num_loops`, which None stands for.
            return_loops: loops (the first is 1) whose predictions are returned beside the last one's.

        Returns:
            `sample` (B, C, h, w) after the last loop and, with `return_loops`, `loop_samples`, one prediction for each
            of them, in the dtype of `hidden_states` and the prediction type of the config.

        Raises:
            UserError: (a ValueError) a latent of another size, a time or a class that is none, loops out of range.
        """
        self._check_latents(hidden_states)
        num_loops = self.config.num_loops if num_loops is None else num_loops
        self._check_loops("num_loops", [num_loops], self.config.num_loops)
        self._check_loops("return_loops", return_loops or (), num_loops)
        network_time = self._network_time(timestep, hidden_states.shape[0])
        tokens, conditioning = self._embed(hidden_states, network_time, class_labels)
        predictions = self._predictions(tokens, conditioning, hidden_states, {num_loops, *(return_loops or ())})
        sample = predictions[num_loops]
        loop_samples = None if return_loops is None else tuple(predictions[loop] for loop in return_loops)
        if return_dict:
            return ELTTransformerOutput(sample=sample, loop_samples=loop_samples)
        return (sample,) if loop_samples is None else (sample, loop_samples)

    @staticmethod
    def _check_loops(name: str, loops: Sequence[int], most: int) -> None:
        wrong = [loop for loop in loops if not isinstance(loop, int) or not 1 <= loop <= most]
        if wrong:
            raise UserError(f"{name}: {wrong[0]!r} is out of range; allowed are 1..{most}")

    def _predictions(
        self, tokens: torch.Tensor, conditioning: torch.Tensor, hidden_states: torch.Tensor, loops: set[int]
    ) -> dict[int, torch.Tensor]:
        """What is predicted after some loops, from tokens (B, N, D)."""
        predictions = {}
        for loop in range(1, max(loops) + 1):
            with self._context_of_loop(loop):
                tokens = self._run_blocks(self.blocks, tokens, conditioning)
                if loop in loops:
                    predictions[loop] = self._predict(tokens, conditioning, hidden_states)
        return predictions

    # Caches of diffusers remember a block's last call; a block of ours is called once per loop.

    def enable_cache(self, config: Any) -> None:
        """Cache parts of the network between sampling steps, each loop apart from the others.

        Raises:
            UserError: a cache that cannot tell the loops apart.
        """
        if not isinstance(config, _CACHES_BY_CONTEXT + _CACHES_OF_ATTENTION):
            allowed = ", ".join(kind.__name__ for kind in _CACHES_BY_CONTEXT + _CACHES_OF_ATTENTION)
            raise UserError(
                f"enable_cache: {type(config).__name__} would mix the loops of this generator up; allowed: {allowed}"
            )
        super().enable_cache(config)
        for module in self.blocks.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry else ():
                if isinstance(hook, PyramidAttentionBroadcastHook | FasterCacheBlockHook):
                    hook.state = _StateOfLoops(type(hook.state), lambda: self._loop)  # type: ignore[assignment]

    @contextlib.contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """As diffusers', but remembered, so that every loop gets a context of its own."""
        outer, self._cache_context = self._cache_context, (name, where)
        try:
            with super().cache_context(name, **where):
                yield
        finally:
            self._cache_context = outer

    def _context_of_loop(self, loop: int) -> contextlib.AbstractContextManager[None]:
        if not self.is_cache_enabled:
            return contextlib.nullcontext()
        self._loop = loop
        if self._cache_context is None:
            return contextlib.nullcontext()
        name, where = self._cache_context
        return super().cache_context(f"{name}, loop {loop}", **where)
