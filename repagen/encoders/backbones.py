"""Two adapters, transformers and timm, that give the block outputs of a vision transformer before its final norm."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repagen.encoders.families import EncoderFamily, TransformersFamily
from repagen.errors import UserError

# The name under which a saved autoencoder keeps its encoder's weights (`model.frozen.safetensors`). diffusers
# downloads every `model.safetensors` together with a pipeline; sampling must not download an encoder.
FROZEN_VARIANT = "frozen"
_MOST_LAYERS = 1000


class Backbone(nn.Module):
    """A vision transformer as a source of token states.

    Attributes:
        model: the wrapped transformers or timm module.
        hidden_size, patch_size, num_layers, prefix_tokens: its widths and counts; prefix tokens are all tokens in
            front of the patches (class and registers).
        cls_tokens: how many of them, the first ones, are class tokens.
        native_side: input side of the model's own config, in pixels.
        final_norm: the last norm; None where the model has none.
        normalises_patches: whether the model itself applies that norm to its patch tokens.
        architecture: the JSON-able description it was built from.
    """

    model: Any
    hidden_size: int
    patch_size: int
    num_layers: int
    prefix_tokens: int
    cls_tokens: int
    native_side: int
    final_norm: nn.Module | None
    normalises_patches: bool
    architecture: dict[str, Any]

    def states(self, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """Return the outputs (B, prefix + N, D) of the blocks `layers` (0-based, ascending) before the final norm."""
        raise NotImplementedError

    def recording_attention(self, layers: Sequence[int]) -> contextlib.AbstractContextManager[dict[int, torch.Tensor]]:
        """Keep attention (B, heads, prefix + N, prefix + N), rows summing to 1, of the blocks `layers` (0-based).

        Within the context the network attends by explicit matrices, and the dict fills with each pass.

        Raises:
            UserError: the network does not tell its attention.
        """
        raise NotImplementedError

    def set_image_size(self, side: int) -> None:
        """Make ready for square images of a side in pixels, where the network does not do so by itself."""

    def save(self, folder: Path, variant: str | None) -> None:
        """Write config and weights to a folder in the library's own layout."""
        raise NotImplementedError


class TransformersBackbone(Backbone):
    """A vision model of transformers."""

    def __init__(self, family: EncoderFamily, model: Any) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.hidden_size = config.hidden_size
        self.patch_size = _side(config.patch_size)
        self.num_layers = config.num_hidden_layers
        cls_tokens = family.cls_tokens
        self.cls_tokens = cls_tokens if isinstance(cls_tokens, int) else getattr(config, cls_tokens)
        self.prefix_tokens = self.cls_tokens + (getattr(config, family.register_key) if family.register_key else 0)
        self.native_side = _side(getattr(config, family.side_key))
        norm = model.get_submodule(family.final_norm) if family.final_norm else None
        self.final_norm = None if isinstance(norm, nn.Identity) else norm
        self.normalises_patches = family.normalises_patches
        self.architecture = architecture(config)
        self._family = family
        self._frames = getattr(config, family.frames_key) if family.frames_key else 0

    def set_image_size(self, side: int) -> None:
        """See `Backbone.set_image_size`: these networks do so by themselves, or cannot.

        Raises:
            UserError: for another side than that of a network whose positions are fixed.
        """
        if side != self.native_side and not self._family.takes_side(self.architecture):
            raise UserError(
                f"encoder.image_size: {side} px, but the positions of this {self._family.name} are fixed to "
                f"{self.native_side} px; use that side, or a checkpoint of native resolution"
            )

    def _blocks(self) -> nn.ModuleList:
        # The path of the block list changes between transformers releases; its length identifies it.
        found = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.num_layers]
        assert len(found) == 1, f"{type(self.model).__name__} has {len(found)} lists of {self.num_layers} modules"
        return found[0]

    def states(self, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """See `Backbone.states`. Only the selected block outputs are kept."""
        captured: dict[int, torch.Tensor] = {}
        blocks = self._blocks()

        def keeper(index: int) -> Any:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                captured[index] = output[0] if isinstance(output, tuple) else output

            return keep

        handles = [blocks[index].register_forward_hook(keeper(index)) for index in layers]
        try:
            clip = pixels.unsqueeze(1).expand(-1, self._frames, -1, -1, -1) if self._frames else pixels
            self.model(clip, **self._family.arguments, **self._patch_order(pixels))
        finally:
            for handle in handles:
                handle.remove()
        return [captured[index] for index in layers]

    @contextlib.contextmanager
    def recording_attention(self, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """See `Backbone.recording_attention`."""
        maps: dict[int, torch.Tensor] = {}

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            maps.update((layer, output.attentions[layer]) for layer in layers)

        config = self.model.config
        own = config._attn_implementation, config.output_attentions
        handle = self.model.register_forward_hook(keep)
        try:
            with quiet_transformers():
                self.model.set_attn_implementation("eager")
            if config._attn_implementation != "eager":
                raise UserError(
                    f"attention_layers: transformers' {self._family.model_class} does not tell its attention"
                )
            config.output_attentions = True
            yield maps
        finally:
            handle.remove()
            config.output_attentions = own[1]
            with quiet_transformers():
                self.model.set_attn_implementation(own[0])

    def _patch_order(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        # ViTMAE sorts its patches by this noise, and shuffles them at random when there is none.
        if self._family.patch_order is None:
            return {}
        count = (pixels.shape[-2] // self.patch_size) * (pixels.shape[-1] // self.patch_size)
        order = torch.arange(count, device=pixels.device, dtype=torch.float32)
        return {self._family.patch_order: order.expand(pixels.shape[0], count)}

    def save(self, folder: Path, variant: str | None) -> None:
        """See `Backbone.save`."""
        with quiet_transformers():
            self.model.save_pretrained(folder, variant=variant)


class TimmBackbone(Backbone):
    """A vision transformer of timm, read through `forward_intermediates`."""

    def __init__(self, model: Any, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.hidden_size = model.num_features
        self.patch_size = model.patch_embed.patch_size[0]
        self.num_layers = len(model.blocks)
        self.prefix_tokens = model.num_prefix_tokens
        self.cls_tokens = int(getattr(model, "cls_token", None) is not None)
        self.native_side = model.patch_embed.img_size[0]
        self.normalises_patches = not isinstance(model.norm, nn.Identity)
        norm = model.norm if self.normalises_patches else getattr(model, "fc_norm", None)
        self.final_norm = None if isinstance(norm, nn.Identity) else norm
        self.architecture = dict(architecture)

    def states(self, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """See `Backbone.states`."""
        prefixed = self.prefix_tokens > 0
        found = self.model.forward_intermediates(
            pixels, indices=list(layers), norm=False, output_fmt="NLC", intermediates_only=True, stop_early=True,
            return_prefix_tokens=prefixed,
        )  # fmt: skip
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in found] if prefixed else list(found)

    @contextlib.contextmanager
    def recording_attention(self, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """See `Backbone.recording_attention`."""
        maps: dict[int, torch.Tensor] = {}
        modules = {layer: self.model.blocks[layer].attn for layer in layers}
        fused = {layer: module.fused_attn for layer, module in modules.items()}
        # The dropout after the softmax sees the probabilities, and in eval mode returns them.
        handles = [
            module.attn_drop.register_forward_hook(lambda *call, layer=layer: maps.update({layer: call[-1]}))
            for layer, module in modules.items()
        ]
        try:
            for module in modules.values():
                module.fused_attn = False
            yield maps
        finally:
            for layer, module in modules.items():
                module.fused_attn = fused[layer]
            for handle in handles:
                handle.remove()

    def set_image_size(self, side: int) -> None:
        """Resample the position table as timm does on loading; the description follows, since the table is saved."""
        if side == self.native_side:
            return
        self.model.set_input_size(img_size=(side, side))
        arguments = {**self.architecture.get("model_args", {}), "img_size": side}
        self.architecture = {**self.architecture, "model_args": arguments}
        self.native_side = side

    def save(self, folder: Path, variant: str | None) -> None:
        """See `Backbone.save`."""
        import json

        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.architecture, indent=2, sort_keys=True) + "\n")
        name = f"model.{variant}.safetensors" if variant else "model.safetensors"
        state = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        save_file(state, folder / name, metadata={"format": "pt"})


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and bars away: text towers and heads of a checkpoint are left out on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def architecture_keys(config_class: type) -> set[str]:
    """Return the keys of a transformers config that describe the network: its own fields, not inherited or private.

    This is the allow-list for keys read from files: `auto_map`, `trust_remote_code`, `_attn_implementation_internal`
    and every other key that could name code to run is not among them.
    """
    from transformers import PreTrainedConfig

    inherited = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    own = {item.name for item in dataclasses.fields(config_class)}
    return {name for name in own - inherited if not name.startswith("_")}


def architecture(config: Any) -> dict[str, Any]:
    """Return the JSON-able description of the network of a transformers config; see `architecture_keys`."""
    keys = architecture_keys(type(config))
    return {key: value for key, value in config.to_dict().items() if key in keys}


def transformers_config(family: TransformersFamily, description: Mapping[str, Any], where: str) -> Any:
    """Build a transformers config from the allow-listed keys of a description.

    Raises:
        UserError: where a value has the wrong type or is impossible, naming the key as transformers does.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    config_class = getattr(transformers, family.config_class)
    keys = architecture_keys(config_class).union(family.old_keys)
    values = {key: value for key, value in description.items() if key in keys}
    for key, value in values.items():  # transformers writes lists of so many names before anything is built
        if key.endswith("layers") and isinstance(value, int) and value > _MOST_LAYERS:
            raise UserError(f"{where}: {key} {value} are more layers than any network has, {_MOST_LAYERS} at most")
    try:
        return config_class(**{**values, **family.fixed_config})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a valid {family.config_class}: {' '.join(str(error).split())}") from error


def build_transformers(family: EncoderFamily, description: Mapping[str, Any], where: str) -> TransformersBackbone:
    """Build a model with random weights."""
    import transformers

    config = transformers_config(family, description, where)
    return TransformersBackbone(family, getattr(transformers, family.model_class)(config, **family.constructor))


def build_timm(description: Mapping[str, Any], where: str) -> TimmBackbone:
    """Build a timm vision transformer with random weights at its own input side.

    Raises:
        UserError: for an unknown architecture, or one that is no vision transformer with readable blocks.
    """
    import timm

    architecture = description.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"{where}:architecture: {architecture!r} is no architecture of timm {timm.__version__}")
    arguments = description.get("model_args", {})
    # Those of the factory itself: some name files to load.
    if forbidden := sorted(set(arguments) & set(inspect.signature(timm.create_model).parameters)):
        raise UserError(f"{where}:model_args.{forbidden[0]}: is no argument of a network; delete it")
    try:
        model = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}:model_args: timm cannot build {architecture}: {error}") from error
    needed = ("forward_intermediates", "num_prefix_tokens", "blocks", "patch_embed", "norm", "set_input_size")
    if missing := [name for name in needed if not hasattr(model, name)]:
        raise UserError(
            f"{where}:architecture: timm's {architecture} is no plain vision transformer (it lacks {missing[0]}); "
            "use a ViT or EVA architecture"
        )
    model.eval()
    return TimmBackbone(model, description)


def _side(value: Any) -> int:
    """Return the side of a square size given as a number or a pair."""
    if isinstance(value, int):
        return value
    sides = set(value)
    if len(sides) != 1:
        raise UserError(f"encoder config: sizes must be square, got {tuple(value)}")
    return int(sides.pop())
