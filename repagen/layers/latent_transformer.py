"""What the transformers over latents share: call and checks, time direction, final layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.hooks import FasterCacheConfig
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from repagen.errors import UserError
from repagen.hub.published import PublishedModelMixin
from repagen.hub.whole_models import WholeModelMixin
from repagen.layers.attention import AttentionBackendMixin
from repagen.layers.embeddings import LabelEmbedding, PatchEmbedding, unpatchify
from repagen.layers.lora import apply_lora_scale
from repagen.layers.modulated import modulate, modulation_parameters

logger = logging.getLogger(__name__)

TimeDirection = Literal["data_at_zero", "data_at_one"]
"""How the network itself counts time. The library's t = 0 is data; SiT's network was trained with t = 1 as data."""

DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
"""The sizes of DiT (Peebles & Xie 2023, table 1), which its descendants took over."""


_CONDITIONS = ("class_labels", "encoder_hidden_states", "encoder_attention_mask")


def grid_of(sample_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of tokens of a latent.

    Args:
        sample_size: height and width of the latent, or one number for a square.
        patch_size: side of a patch.

    Raises:
        UserError: the patch does not divide the latent.
    """
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if height % patch_size or width % patch_size:
        raise UserError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
    return height // patch_size, width // patch_size


def xavier_(linear: nn.Linear | nn.Conv2d) -> None:
    """Xavier-uniform weight, a convolution's taken as the matrix it applies to a patch; bias 0."""
    nn.init.xavier_uniform_(linear.weight.flatten(1) if isinstance(linear, nn.Conv2d) else linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def zero_(*layers: Any) -> None:
    """Weights and biases 0."""
    for linear in layers:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


class LatentTransformerMixin(PublishedModelMixin, WholeModelMixin, AttentionBackendMixin):
    """Shared part of the `ModelMixin` classes that map a noisy latent, a time and a condition to a prediction.

    The subclass has `config` with sample_size, patch_size, in_channels, prediction_type and time_direction,
    `token_grid`, the rows and columns of its tokens, `blocks`, and the modules annotated below. It states its network
    as `_network`, or, where its call has more arguments or results, writes a `forward` of its own.

    Attributes:
        any_size: latents of any size are taken, not only of that in the config; so by all models that take text.
        discrete_time: the timestep is an integer step of a DDPM instead of a time in [0, 1].
        has_base_head: the call takes `return_base`, which adds the prediction of an early head.
    """

    any_size: bool = False
    discrete_time: ClassVar[bool] = False
    has_base_head: ClassVar[bool] = False

    config: Any
    token_grid: tuple[int, int]
    blocks: nn.ModuleList
    patch_embed: PatchEmbedding
    time_embedder: Any
    label_embedder: LabelEmbedding | None
    norm_out: nn.Module
    modulation_out: nn.Linear
    proj_out: nn.Linear
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    _sizes: ClassVar[dict[str, dict[str, int]]]
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ModulatedBlock", "HeadBlock", "InContextBlock", "TextEmbedding"]
    _repeated_blocks: ClassVar[list[str]] = ["ModulatedBlock", "HeadBlock", "InContextBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "patch_embed",
        "time_embedder",
        "pos_embed",
        "rope",
        "norm",
    ]
    # Time embedding, norms and tables of positions stay float32 in a model that is loaded in half precision.
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "time_embedder", "pos_embed", "rope", "head_rope",
        "norm", "norm1", "norm2", "norm_q", "norm_k", "norm_out",
    ]  # fmt: skip

    @classmethod
    def config_for_size(cls, size: str, **overrides: Any) -> dict[str, Any]:
        """Constructor arguments of a published size, with overrides.

        Args:
            size: a published size, such as "XL".
            overrides: any other constructor argument, or another value for one of the size's own.

        Raises:
            UserError: no such size.
        """
        if size not in cls._sizes:
            raise UserError(f"{cls.__name__}: no size {size!r}; allowed are {', '.join(cls._sizes)}")
        return {**cls._sizes[size], **overrides}

    @property
    def takes_text(self) -> bool:
        """Whether the call takes text embeddings, `encoder_hidden_states`."""
        return bool(self.config.get("text_dim"))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of a latent, as the config has it."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.config.in_channels, height, width

    def choose_classes(self, kept: Sequence[int], new_rows: torch.Tensor | None = None) -> None:
        """Change the model's classes: ones of its own, in the given order, then new ones; the null class stays.

        Args:
            kept: ids of classes of the model, each at most once; they are numbered anew from 0.
            new_rows: embeddings (R, hidden_size) of further classes; None: none.

        Raises:
            UserError: a class that the model has not, rows of another width, or a model without a class embedding.
        """
        if self.label_embedder is None:
            raise UserError(f"this {type(self).__name__} has neither classes nor a null class, so none can be added")
        table = self.label_embedder.table.weight
        self.label_embedder.choose(kept, table.new_empty(0, table.shape[1]) if new_rows is None else new_rows)
        self.register_to_config(num_classes=self.label_embedder.num_classes)  # type: ignore[attr-defined]

    @torch.no_grad()
    def rebuilt(self, **changes: Any) -> Self:
        """A new network with other constructor arguments and, wherever tensors have the same shape, these weights.

        Of a class table with another number of rows the last one, the null class, is kept. What is new has the
        published initial weights.

        Args:
            changes: constructor arguments in place of the config's.
        """
        # The config's private notes would bring the defaults back in place of changes.
        arguments = {key: value for key, value in self.config.items() if not key.startswith("_")}
        new = type(self).from_config({**arguments, **changes})  # type: ignore[attr-defined]
        new.initialize_weights()
        own, drawn = self.state_dict(), new.state_dict()  # type: ignore[attr-defined]
        fresh = []
        for name, tensor in drawn.items():
            if name in own and own[name].shape == tensor.shape:
                tensor.copy_(own[name])
                continue
            fresh.append(name)
            if name in own and own[name].shape[1:] == tensor.shape[1:] and self.config.class_dropout_prob:
                tensor[-1] = own[name][-1]
        logger.info("drawn anew: %s", ", ".join(fresh))
        return new

    def enable_cache(self, config: Any) -> None:
        """Cache parts of the network between sampling steps, with one of diffusers' cache configs.

        FasterCache splits a doubled batch, and must be told that class labels or prompts are part of it.
        """
        if isinstance(config, FasterCacheConfig):
            names = config._unconditional_conditional_input_kwargs_identifiers
            config._unconditional_conditional_input_kwargs_identifiers = list(dict.fromkeys([*names, *_CONDITIONS]))
        super().enable_cache(config)  # type: ignore[misc]

    @apply_lora_scale
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict from a noisy latent.

        Args:
            hidden_states: x_t, (B, C, h, w).
            timestep: t in [0, 1], 0 = data, 1 = noise; (B,), or one number for all. Where `discrete_time`, whole
                DDPM steps.
            class_labels: (B,) integers in [0, num_classes), or num_classes for no class where there is a null row.
            attention_kwargs: {"scale": float} scales LoRA layers.
            return_dict: an output object, else a tuple.

        Returns:
            `sample` (B, C, h, w) in the dtype of `hidden_states`, in the prediction type of the config.

        Raises:
            UserError: (a ValueError) a latent of another size, a time or a class that is none.
        """
        self._check_latents(hidden_states)
        network_time = self._network_time(timestep, hidden_states.shape[0])
        tokens, conditioning = self._network(hidden_states, network_time, class_labels)
        sample = self._predict(tokens, conditioning, hidden_states)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _network(
        self, hidden_states: torch.Tensor, network_time: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All but the final layer: tokens (B, N, D) float32, and the conditioning of the final layer."""
        raise NotImplementedError

    def _initialize_embeddings(self, *patch_projections: nn.Conv2d) -> None:
        """Draw the published initial weights of given patch projections, of the time and of the class embedding."""
        for projection in patch_projections:
            xavier_(projection)
        for linear in (self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.label_embedder is not None:
            nn.init.normal_(self.label_embedder.table.weight, std=0.02)

    def _check_latents(self, latents: torch.Tensor) -> None:
        channels, patch_size = self.config.in_channels, self.config.patch_size
        height, width = (n * patch_size for n in self.token_grid)
        if self.any_size:
            if latents.ndim != 4 or latents.shape[1] != channels or any(n % patch_size for n in latents.shape[2:]):
                raise UserError(
                    f"hidden_states: this model takes latents of shape (batch, {channels}, h, w), "
                    f"h and w multiples of {patch_size}; got {tuple(latents.shape)}"
                )
        elif latents.ndim != 4 or tuple(latents.shape[1:]) != (channels, height, width):
            raise UserError(
                f"hidden_states: this model takes latents of shape (batch, {channels}, {height}, {width}), "
                f"got {tuple(latents.shape)}; its position table fits no other size"
            )

    def _network_time(self, timestep: torch.Tensor, batch_size: int) -> torch.Tensor:
        """The times (B,) float32 as the network counts them, from the library's (B,), (1,) or scalar timestep."""
        if not timestep.is_floating_point():
            raise UserError(f"timestep: expected float times in [0, 1] (0 = data, 1 = noise), got {timestep.dtype}")
        self._check_timestep_shape(timestep, batch_size)
        if timestep.device.type == "cpu" and not torch.compiler.is_compiling() and timestep.abs().max() > 1.001:
            raise UserError(
                f"timestep: times lie in [0, 1] (0 = data, 1 = noise), got {timestep.abs().max().item():g}; "
                "divide a scheduler's timesteps by its num_train_timesteps"
            )
        t = timestep.float().expand(batch_size)
        return 1 - t if self.config.time_direction == "data_at_one" else t

    @staticmethod
    def _check_timestep_shape(timestep: torch.Tensor, batch_size: int) -> None:
        if timestep.ndim > 1 or timestep.numel() not in (1, batch_size):
            raise UserError(
                f"timestep: expected shape ({batch_size},), one time per sample, got {tuple(timestep.shape)}"
            )

    @property
    def _matmul_dtype(self) -> torch.dtype:
        # The patch embedding is neither kept in float32 nor stored in eight bits. Autocast lowers this further.
        return self.patch_embed.proj.weight.dtype

    def _run_blocks(
        self,
        blocks: nn.ModuleList,
        tokens: torch.Tensor,
        conditioning: torch.Tensor | torch.dtype,
        rope: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pass tokens (B, N, D) float32 through blocks, under gradient checkpointing where it is on.

        Blocks without modulation take the dtype of their matrix products in place of a conditioning.
        """
        cos, sin = (None, None) if rope is None else rope()
        arguments = (conditioning, cos, sin, attention_mask, encoder_hidden_states)
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, *arguments)
            else:
                tokens = block(tokens, *arguments)
        return tokens

    def _predict(self, tokens: torch.Tensor, conditioning: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Final layer: tokens (B, N, D) => latent of the size and dtype of `like`, in the library's convention."""
        shift, scale = modulation_parameters(self.modulation_out, conditioning, 2)
        tokens = self.proj_out(modulate(self.norm_out(tokens), shift, scale).to(conditioning.dtype))
        return self._to_latents(tokens, like)

    @property
    def _predicted_channels(self) -> int:
        # What may follow is a learned variance that no flow uses.
        return self.config.in_channels

    def _to_latents(self, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Output tokens (B, N, p * p * C) => latent of the size and dtype of `like`, in the library's convention."""
        patch_size = self.config.patch_size
        grid = (like.shape[2] // patch_size, like.shape[3] // patch_size)
        latents = unpatchify(tokens, grid, patch_size)[:, : self._predicted_channels].to(like.dtype)
        return self._library_direction(latents)

    def _library_direction(self, prediction: torch.Tensor) -> torch.Tensor:
        """A network that counts time backwards predicts the velocity d x / d t with the other sign."""
        reversed_velocity = self.config.time_direction == "data_at_one" and self.config.prediction_type == "velocity"
        return -prediction if reversed_velocity else prediction
