"""Adapters of a pipeline's transformer: LoRA layers through peft, and the classes that were trained with them."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from repagen.errors import UserError, refusing
from repagen.pipelines.adapter_file import (
    COMPONENT,
    ROWS_KEY,
    Adapter,
    find_adapter_file,
    metadata_of,
    read_adapter_file,
    split_adapter,
    write_adapter_file,
)

_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.linear_in", "ff.linear_out",
    "text_embedder.proj", "text_embedder.pooled_proj",
)  # fmt: skip


def default_lora_targets(transformer: nn.Module) -> list[str]:
    """Return the `target_modules` of a `LoraConfig` that reach attention, feed-forward and what text enters by.

    The layers that make modulations, `modulation` and `modulation_out`, and `proj_out` can be named too. They are left
    out: they are half as large as the rest of a block, and a class reaches them through its label row.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return [target for target in _TARGETS if any(f".{name}".endswith(f".{target}") for name in names)]


def _check_push(push: bool, options: Mapping[str, Any], weight_name: str | None, safe: bool) -> None:
    from repagen.hub.published import HUB_OPTIONS, require_safetensors

    if unknown := options.keys() - (HUB_OPTIONS if push else ()):
        raise TypeError(f"save_lora_weights: unexpected options {sorted(unknown)}, with push_to_hub={push}")
    require_safetensors(safe)
    if weight_name not in (None, LORA_WEIGHT_NAME_SAFE):
        raise UserError(
            f"weight_name={weight_name!r}: an adapter is published as {LORA_WEIGHT_NAME_SAFE}; leave it out"
        )


class AdapterMixin(LoraBaseMixin):
    """Loads, saves, fuses and removes adapters of `transformer`.

    An adapter holds LoRA layers, rows of new classes, or both. Its classes follow those that the pipeline has, with
    their names in `id2label`, and leave with it, unless it is fused then. LoRA layers are peft's;
    `get_active_adapters`, `get_list_adapters`, `enable_lora`, `disable_lora`, `set_lora_device` and
    `enable_lora_hotswap` are diffusers', and know nothing of adapters without LoRA layers, which are always active.
    """

    _lora_loadable_modules: ClassVar[list[str]] = [COMPONENT]  # type: ignore[misc]
    transformer_name = COMPONENT

    transformer: Any
    config: Any
    guidance_transformer: Any
    components: Any
    register_to_config: Any

    @property
    def adapter_classes(self) -> dict[str, list[int]]:
        """Adapter => ids of the classes that came with it."""
        return dict(getattr(self.transformer, "_adapter_classes", {}))

    @classmethod
    def lora_state_dict(  # type: ignore[override]  # diffusers declares **kwargs alone
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        **hub: Any,
    ) -> Any:
        """Return all tensors of an adapter, as stored.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder that holds one, a Hub repository, or the tensors.
            weight_name: name of the file; None: `pytorch_lora_weights.safetensors`.
            return_lora_metadata: also return the metadata of the LoRA layers, or None.
            hub: `subfolder`, `revision`, `token`, `local_files_only`, `cache_dir`, `force_download`.

        Raises:
            UserError: no such file, or none of tensors alone.
        """
        tensors, metadata, _ = cls._read(pretrained_model_name_or_path_or_dict, weight_name, **hub)
        return (tensors, metadata) if return_lora_metadata else tensors

    @classmethod
    def _read(
        cls, source: str | os.PathLike[str] | Mapping[str, torch.Tensor], weight_name: str | None, **hub: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, list[str] | None]:
        if isinstance(source, Mapping):
            return dict(source), None, None
        return read_adapter_file(find_adapter_file(Path(source), weight_name, **hub))

    def load_lora_weights(  # type: ignore[override]  # diffusers declares **kwargs alone
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        weight_name: str | None = None,
        low_cpu_mem_usage: bool = True,
        **hub: Any,
    ) -> None:
        """Load an adapter and make it the active one; its classes are appended to those of the pipeline.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder that holds one, a Hub repository, or the tensors,
                whose classes then have ids but no names.
            adapter_name: of this adapter; None: the first free `default_N`.
            hotswap: put the weights and classes in the place of those of the loaded adapter `adapter_name`.
            weight_name: name of the file; None: `pytorch_lora_weights.safetensors`.
            low_cpu_mem_usage: do not draw weights that are then replaced.
            hub: `subfolder`, `revision`, `token`, `local_files_only`, `cache_dir`, `force_download`.

        Raises:
            UserError: (a ValueError) nothing to load, nothing that fits, or LoRA layers beside fused ones; the
                pipeline is then as it was.
        """
        tensors, metadata, class_names = self._read(pretrained_model_name_or_path_or_dict, weight_name, **hub)
        if tensors and not any("." in key for key in tensors):  # names no layer of any model: diffusers warns
            self.load_lora_into_transformer(tensors, self.transformer, adapter_name)
            return
        adapter = split_adapter(tensors, metadata, class_names)
        if adapter_name is not None and not adapter_name.strip():
            raise UserError(f"load_lora_weights: adapter_name {adapter_name!r} is no name; give one, or leave it out")
        name = adapter_name or self._free_name()
        self._check_name(adapter, name, hotswap)
        if adapter.layers:
            self._require_unfused(f"adapter {name!r}")
        self._check_rows(adapter, name, hotswap)
        fresh = self._check_layers(adapter, name, hotswap)
        if fresh is not None:
            transformer = unwrap_module(self.transformer)
            padded = hotswap or transformer._prepare_lora_hotswap_kwargs is not None
            if hotswap:
                transformer.peft_config[name].alpha_pattern = dict(fresh.peft_config[name].alpha_pattern)
            self.load_lora_into_transformer(
                adapter.layers,
                self.transformer,
                name,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
                metadata=adapter.metadata,
            )
            if padded:
                _restate_layers(transformer, name, fresh)
        self._merged_adapters = self._merged_adapters - {name}  # one of that name may have been fused and unloaded
        self._replace_classes(name, adapter.rows, adapter.class_names)

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: Any,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Load LoRA layers into a transformer; see `PeftAdapterMixin.load_lora_adapter`."""
        with _without_needless_warnings():
            transformer.load_lora_adapter(
                dict(state_dict),
                prefix=cls.transformer_name,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=_pipeline,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )

    @classmethod
    def save_lora_weights(  # type: ignore[override]  # diffusers declares **kwargs alone
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: nn.Module | Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
        label_rows: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write an adapter file, and upload it where it is asked to; equal content gives equal bytes.

        Args:
            save_directory: folder, made where it is missing.
            transformer_lora_layers: as `peft.get_peft_model_state_dict(transformer)` returns them.
            is_main_process: False writes nothing.
            weight_name: name of the file; None: `pytorch_lora_weights.safetensors`, or `.bin`.
            safe_serialization: False writes a `.bin` of `torch.save`, which holds LoRA layers alone.
            transformer_lora_adapter_metadata: `transformer.peft_config[name].to_dict()`; keeps ranks and alphas.
            label_rows: class name => its embedding (D,); in this order the classes are appended on loading.
            push_to_hub: publish the folder too.
            hub: `repo_id`, by default the folder's name; `private`, `token`, `commit_message`, `create_pr` and
                `revision` of `publish_folder`.

        Raises:
            UserError: nothing to save, a name of another format, a class without name, rows of different widths,
                metadata or rows for a `.bin`, or a push of another file than `pytorch_lora_weights.safetensors`; the
                Hub refuses or cannot be reached: the folder is whole then.
        """
        if push_to_hub or hub:
            _check_push(push_to_hub, hub, weight_name, safe_serialization)
        name = weight_name or (LORA_WEIGHT_NAME_SAFE if safe_serialization else LORA_WEIGHT_NAME)
        if not name.endswith(".safetensors" if safe_serialization else ".bin"):
            raise UserError(f"weight_name={name!r} does not go with safe_serialization={safe_serialization}")
        if not safe_serialization and (transformer_lora_adapter_metadata or label_rows):
            raise UserError("save_lora_weights: a .bin keeps no metadata and no classes; set safe_serialization=True")
        if not transformer_lora_layers and not label_rows:
            raise UserError("save_lora_weights: give transformer_lora_layers, label_rows, or both")
        if any(not name.strip() for name in label_rows or ()):
            raise UserError(f"label_rows: every class needs a name; got {list(label_rows or ())}")
        if not is_main_process:
            return
        tensors = cls.pack_weights(transformer_lora_layers or {}, cls.transformer_name)
        if label_rows:
            shapes = {tuple(row.shape) for row in label_rows.values()}
            if len(shapes) > 1 or len(next(iter(shapes))) != 1:
                raise UserError(f"label_rows: one vector per class, all of one width; got shapes {sorted(shapes)}")
            tensors[ROWS_KEY] = torch.stack([row.detach().float() for row in label_rows.values()])
        path = Path(save_directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        class_names = list(label_rows) if label_rows else None
        write_adapter_file(
            path, tensors, metadata_of(transformer_lora_adapter_metadata, class_names, pipeline=cls.__name__)
        )
        if push_to_hub:
            from repagen.hub.publishing import publish_folder

            publish_folder(path.parent, hub.pop("repo_id", path.parent.name), **hub)

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict[str, Any] | list[float] | list[dict[str, Any]] | None = None,
    ) -> None:
        """Choose the active adapters and their weights, 1 by default; see `LoraBaseMixin.set_adapters`.

        Raises:
            UserError: adapters are fused; others would have no effect, and unfusing would take out the new weights.
        """
        self._require_unfused("set_adapters")
        super().set_adapters(adapter_names, adapter_weights)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the active adapters, or those named, to the weights; their classes then stay when they are unloaded.

        `fuse_lora()`, `unload_lora_weights()` and `save_pretrained(folder)` make a pipeline that needs no adapter.
        See `LoraBaseMixin.fuse_lora`.

        Raises:
            UserError: quantised weights, whose few values cannot hold the sum; peft would also leave out DoRA's part.
        """
        if getattr(unwrap_module(self.transformer), "hf_quantizer", None) is not None:
            raise UserError(
                "fuse_lora: the transformer is quantised, and the sum would be rounded to its few values; leave the "
                "adapter unfused, or fuse it in a pipeline that was loaded without quantisation"
            )
        rows_only = set(self.adapter_classes) - set(self.get_list_adapters().get(COMPONENT, []))
        named = rows_only if adapter_names is None else rows_only & set(adapter_names)
        layered = None if adapter_names is None else [name for name in adapter_names if name not in named]
        if layered is None or layered:
            super().fuse_lora(components or [COMPONENT], lora_scale, safe_fusing, layered, **kwargs)
        self._merged_adapters = self._merged_adapters | named

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take fused adapters out of the weights again; see `LoraBaseMixin.unfuse_lora`."""
        super().unfuse_lora(components or [COMPONENT], **kwargs)

    def unload_lora_weights(self) -> None:
        """Remove all adapters and their classes; what is fused stays in the weights, and its classes with it."""
        super().unload_lora_weights()
        self._release_classes(list(self.adapter_classes))

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters and their classes; what is fused stays in the weights, and its classes with it."""
        super().delete_adapters(adapter_names)
        if not self.get_list_adapters():
            self.transformer.unload_lora()  # diffusers leaves empty layers, which change the names of the weights
        self._release_classes([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the pipeline; see `DiffusionPipeline.save_pretrained`.

        Raises:
            UserError: LoRA layers are loaded, under whose names nothing would find the weights again.
        """
        if any(name.endswith(".base_layer") for name, _ in self.transformer.named_modules()):
            raise UserError(
                "save_pretrained: the pipeline has LoRA layers; call fuse_lora() and unload_lora_weights() to save it "
                "with them, unload_lora_weights() to save it without them, or save_lora_weights to save the adapter"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # DiffusionPipeline's

    def _free_name(self) -> str:
        taken = {*self.get_list_adapters().get(COMPONENT, []), *self.adapter_classes}
        return next(name for name in (f"default_{i}" for i in range(len(taken) + 1)) if name not in taken)

    def _check_name(self, adapter: Adapter, name: str, hotswap: bool) -> None:
        layered = self.get_list_adapters().get(COMPONENT, [])
        known = [*layered, *(other for other in self.adapter_classes if other not in layered)]
        if not hotswap:
            if name in known:
                raise UserError(
                    f"Adapter name {name} already in use in the model - please select a new adapter name, "
                    "or pass hotswap=True to take its place"
                )
            return
        if name not in known:
            raise UserError(
                f"Trying to hotswap LoRA adapter '{name}' but there is no existing adapter by that name; "
                f"loaded are: {', '.join(known) or 'none'}"
            )
        if name in self.fused_loras:
            raise UserError(f"adapter {name!r} is fused, so it cannot be hot-swapped; call unfuse_lora() first")
        if bool(adapter.layers) != (name in layered):
            ours, theirs = ("LoRA layers", "none") if name in layered else ("no LoRA layers", "some")
            raise UserError(f"adapter {name!r} has {ours} and its hot swap {theirs}; unload it and load the other")

    def _require_unfused(self, what: str) -> None:
        """Refuse to change LoRA layers while some are in the weights: peft takes them out, or leaves out the rest."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.transformer.modules() if isinstance(module, BaseTunerLayer)]
        fused = sorted({name for layer in layers for name in layer.merged_adapters})
        if fused:
            raise UserError(
                f"{what}: adapters are fused ({', '.join(fused)}); call unload_lora_weights(), which keeps "
                "what is fused, and load the others again, or call unfuse_lora() first"
            )

    def _check_rows(self, adapter: Adapter, name: str, hotswap: bool) -> None:
        replaced = len(self.adapter_classes.get(name, [])) if hotswap else 0
        added = 0 if adapter.rows is None else len(adapter.rows)
        if not (added or replaced):
            return
        embedder = unwrap_module(self.transformer).label_embedder
        if embedder is None:
            raise UserError("adapter: brings classes, but this transformer has neither classes nor a null class")
        width = embedder.table.embedding_dim
        if adapter.rows is not None and adapter.rows.shape[1] != width:
            raise UserError(
                f"adapter: label rows have width {adapter.rows.shape[1]}, this transformer's {width}; "
                "it is of another model"
            )
        total = self.transformer.config.num_classes - replaced + added
        weaker = self.guidance_transformer
        if weaker is not None and weaker.config.num_classes != total:
            raise UserError(
                f"adapter: the transformer would have {total} classes and the guidance_transformer has "
                f"{weaker.config.num_classes}; they must agree, so set guidance_transformer=None or a fitting one"
            )

    def _check_layers(self, adapter: Adapter, name: str, hotswap: bool) -> Any:
        """Load LoRA layers into a copy of the transformer without weights, and refuse what does not fit it exactly.

        Returns:
            The copy, whose layers know rank and scaling of the adapter; None for one without layers.
        """
        if not adapter.layers:
            return None
        from peft import get_peft_model_state_dict

        transformer = unwrap_module(self.transformer)
        magnitudes = any(".lora_magnitude_vector" in key for key in adapter.layers)
        if hotswap and (magnitudes or transformer.peft_config[name].use_dora):
            raise UserError(
                f"adapter {name!r}: DoRA (use_dora) cannot be hot-swapped, as peft exchanges no magnitudes; "
                f"call delete_adapters({name!r}) and load the other"
            )
        unfit = f"adapter {name!r} does not fit this {type(transformer).__name__}"
        with refusing(unfit), _quiet_loader(), _without_needless_warnings():
            copy = _without_weights(transformer)
            load = partial(self.load_lora_into_transformer, adapter.layers, metadata=adapter.metadata)
            load(copy, name, low_cpu_mem_usage=True)
            expected = get_peft_model_state_dict(copy, adapter_name=name)
            if hotswap:
                swapped = _without_weights(transformer)
                config = deepcopy(transformer.peft_config[name])
                config.alpha_pattern = dict(copy.peft_config[name].alpha_pattern)  # any takes any other's place
                swapped.add_adapter(config, name)
                load(swapped, name, hotswap=True)
        keys = {key.removeprefix(f"{COMPONENT}.") for key in adapter.layers}
        wrong = sorted(keys ^ set(expected))
        if wrong:
            state = "is of no layer" if wrong[0] in keys else "is missing"
            raise UserError(f"{unfit}: {wrong[0]} {state} ({len(wrong)} such of {len(keys)} tensors)")
        return copy

    def _replace_classes(self, name: str, rows: torch.Tensor | None, class_names: list[str] | None) -> None:
        """Let an adapter have these classes in place of those it had, in their place where they are as many."""
        ids = self.adapter_classes.get(name, [])
        if rows is None or len(rows) != len(ids):
            self._release_classes([name])
            if rows is None:
                return
            first = self.transformer.config.num_classes
            ids = list(range(first, first + len(rows)))
            with self._without_offloading():
                self.transformer.choose_classes(range(first), rows)
        else:
            with self._without_offloading(), torch.no_grad():
                table = self.transformer.label_embedder.table.weight
                table[ids] = rows.to(table)
        self.transformer._adapter_classes = {**self.adapter_classes, name: ids}
        kept = {label: text for label, text in (self.config["id2label"] or {}).items() if int(label) not in ids}
        self._name_classes(kept | {str(label): text for label, text in zip(ids, class_names or (), strict=False)})

    def _release_classes(self, names: Sequence[str]) -> None:
        """End the ownership of adapters over their classes, and remove the classes of those that are not fused."""
        owned = self.adapter_classes
        released = {name: owned.pop(name) for name in names if name in owned}
        gone = {label for name, ids in released.items() if name not in self.fused_loras for label in ids}
        if gone:
            kept = [label for label in range(self.transformer.config.num_classes) if label not in gone]
            renumbered = {old: new for new, old in enumerate(kept)}
            with self._without_offloading():
                self.transformer.choose_classes(kept)
            owned = {name: [renumbered[label] for label in ids] for name, ids in owned.items()}
            names_left = (self.config["id2label"] or {}).items()
            self._name_classes({str(renumbered[int(k)]): text for k, text in names_left if int(k) in renumbered})
        if released:
            self.transformer._adapter_classes = owned

    def _name_classes(self, id2label: dict[str, str]) -> None:
        self.register_to_config(id2label=id2label or None)

    @contextmanager
    def _without_offloading(self) -> Iterator[None]:
        """Take offloading hooks off while the label table is exchanged: they hold on to the old one."""
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        model_offload, sequential_offload, group_offload = self._optionally_disable_offloading(self)
        yield
        pipeline: Any = self
        if model_offload:
            pipeline.enable_model_cpu_offload()
        elif sequential_offload:
            pipeline.enable_sequential_cpu_offload()
        elif group_offload:
            _maybe_remove_and_reapply_group_offloading(unwrap_module(self.transformer))


def _without_weights(transformer: Any) -> Any:
    """Return a model of the same layers that takes no memory."""
    with torch.device("meta"):
        return type(transformer).from_config(transformer.config)


def _restate_layers(transformer: Any, name: str, fresh: Any) -> None:
    """Let layers that were swapped or padded know the rank and alpha of the adapter that is in them now.

    peft leaves those of the adapter before, from which `set_adapters` scales and what is saved is described; the
    patterns of the new one it does not heed. A smaller rank is padded with zeros, so alpha grows with it.

    Args:
        transformer: with the layers, not wrapped.
        name: of the adapter.
        fresh: a copy of the transformer that has this adapter alone; layers that it lacks are zero.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.hotswap import _update_scaling

    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    known = {path: layer for path, layer in fresh.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in transformer.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.lora_A:
            continue
        down: Any = layer.lora_A[name]
        rank = layer.r[name] = ranks[f"^{path}"] = len(down.weight)
        if path in known:
            padding = rank / known[path].r[name]
            padding = padding**0.5 if layer.use_rslora.get(name) else padding
            alpha = known[path].lora_alpha[name]
            layer.lora_alpha[name] = alphas[f"^{path}"] = alpha if padding == 1 else alpha * padding
            _update_scaling(layer, name, known[path].scaling[name])
    config = transformer.peft_config[name]
    config.r, config.rank_pattern = _most_and_others(ranks)
    config.lora_alpha, config.alpha_pattern = _most_and_others(alphas)


def _most_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most names have, and the names that have another."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {name: value for name, value in values.items() if value != most}


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Keep diffusers' loader from logging what is about to be refused in one line of ours."""
    logger = logging.getLogger("diffusers.loaders.peft")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _without_needless_warnings() -> Iterator[None]:
    """Leave out peft's warnings of several adapters, which are meant, and of biases, which it takes for shards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape: \S+\.lora_B\.bias")
        yield
