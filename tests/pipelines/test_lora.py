"""LoRA layers on every generator: what diffusers' own LoRA tests check, in our words, and what they do not."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from lora_parts import ATTENTION, FILE, add_adapter, close, latents, make_adapter, save_adapter
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import PipelineMaker

from repagen import ClassToImagePipeline, RAEv2Transformer2DModel, SiTTransformer2DModel, UserError
from repagen.pipelines.lora import default_lora_targets

BIN = "pytorch_lora_weights.bin"
SIT = PipelineMaker(SiTTransformer2DModel)
KINDS = {
    "plain": {},
    "alpha": {"lora_alpha": 9},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 7}},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
}
needs_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers offloads to an accelerator")
kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def has_lora(pipe: ClassToImagePipeline) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in pipe.transformer.modules())


def two_adapters(make_pipe) -> ClassToImagePipeline:
    pipe = make_pipe()
    add_adapter(pipe, "a", seed=1)
    add_adapter(pipe, "b", seed=2, r=2, lora_alpha=6)
    return pipe


def with_deltas(pipe: ClassToImagePipeline, weights: dict[str, float]) -> ClassToImagePipeline:
    """The same pipeline without LoRA layers, W + sum of weight * alpha / r * B A computed here."""
    plain = copy.deepcopy(pipe.transformer)
    plain.unload_lora()
    layers = dict(plain.named_modules())
    for adapter, weight in weights.items():
        config = pipe.transformer.peft_config[adapter]
        state = get_peft_model_state_dict(pipe.transformer, adapter_name=adapter)
        for key in [key for key in state if key.endswith("lora_A.weight")]:
            name = key.removesuffix(".lora_A.weight")
            delta = state[f"{name}.lora_B.weight"] @ state[key] * config.lora_alpha / config.r
            layers[name].weight.data += weight * delta
    result = type(pipe)(**{**pipe.components, "transformer": plain})
    result.set_progress_bar_config(disable=True)
    return result


class TestEveryGenerator:
    def test_saves_unloads_and_loads(self, make_any_pipe, tmp_path):
        pipe = make_any_pipe()
        base = latents(pipe)
        add_adapter(pipe)
        adapted = latents(pipe)
        assert not close(adapted, base, 1e-3)
        stored = get_peft_model_state_dict(pipe.transformer)
        save_adapter(pipe, tmp_path)
        pipe.unload_lora_weights()
        assert not has_lora(pipe) and torch.equal(latents(pipe), base)
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(latents(pipe), adapted)
        assert pipe.get_active_adapters() == ["default_0"]
        loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
        assert loaded.keys() == stored.keys() and all(torch.equal(loaded[key], stored[key]) for key in stored)

    def test_saves_and_loads_a_bin_that_is_named(self, make_any_pipe, tmp_path):
        pipe = make_any_pipe()
        add_adapter(pipe)
        adapted, stored = latents(pipe), get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(tmp_path, stored, safe_serialization=False)
        assert [path.name for path in tmp_path.iterdir()] == [BIN]
        read = torch.load(tmp_path / BIN, weights_only=True)
        assert read.keys() == {f"transformer.{key}" for key in stored}
        for source, options in (
            (tmp_path / BIN, {"low_cpu_mem_usage": False}),
            (str(tmp_path / BIN), {"low_cpu_mem_usage": True}),
            (tmp_path, {"weight_name": BIN}),
        ):
            pipe.unload_lora_weights()
            pipe.load_lora_weights(source, **options)
            assert torch.equal(latents(pipe), adapted)
        with pytest.raises(UserError, match="no adapter file"):
            pipe.load_lora_weights(tmp_path, adapter_name="x")

    def test_fused_equals_unfused(self, make_any_pipe):
        pipe = make_any_pipe()
        base = latents(pipe)
        add_adapter(pipe)
        adapted = latents(pipe)
        assert not close(adapted, base, 1e-3)
        pipe.fuse_lora()
        assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"default"} and has_lora(pipe)
        assert close(latents(pipe), adapted)
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0 and has_lora(pipe)
        assert close(latents(pipe), adapted)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert not has_lora(pipe) and close(latents(pipe), adapted)

    def test_weights_of_several_adapters_add_up(self, make_any_pipe):
        pipe = two_adapters(make_any_pipe)
        for weights in ({"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": -0.3}):
            pipe.set_adapters(list(weights), list(weights.values()))
            assert pipe.get_active_adapters() == list(weights)
            assert close(latents(pipe), latents(with_deltas(pipe, weights)), 1e-4)

    def test_scale_per_call(self, make_any_pipe):
        pipe = two_adapters(make_any_pipe)
        for scale in (0.0, 0.4):
            pipe.set_adapters(["a", "b"], [0.5, 2.0])
            scaled = latents(pipe, attention_kwargs={"scale": scale})
            assert close(scaled, latents(with_deltas(pipe, {"a": 0.5 * scale, "b": 2.0 * scale})), 1e-4)
            # The weights that set_adapters gave are as they were.
            assert close(latents(pipe), latents(with_deltas(pipe, {"a": 0.5, "b": 2.0})), 1e-4)

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"scale": "a"}, "scale is 'a'; give a finite number"),
            ({"scale": None}, "scale is None"),
            ({"scale": float("nan")}, "scale is nan"),
            ({"scal": 1, "scale": 1}, "attention_kwargs has 'scal'; allowed: 'scale'"),
        ],
    )
    def test_refuses_other_scales(self, given, reason):
        with pytest.raises(UserError, match=reason):
            latents(SIT(), attention_kwargs=given)

    def test_lora_reaches_every_linear_layer(self, make_any_pipe, tmp_path):
        pipe = make_any_pipe()
        base = latents(pipe)
        names = [
            name
            for name, module in pipe.transformer.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        ]
        add_adapter(pipe, target_modules=names)
        state = get_peft_model_state_dict(pipe.transformer)
        assert {key.rpartition(".lora_")[0] for key in state} == set(names)
        adapted = latents(pipe)
        save_adapter(pipe, tmp_path)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path)
        assert close(latents(pipe), adapted)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert close(latents(pipe), adapted, 1e-4) and not close(adapted, base, 1e-3)

    def test_default_targets_are_attention_and_feed_forward_of_all_blocks(self, make_any_pipe):
        transformer = make_any_pipe().transformer
        targets = default_lora_targets(transformer)
        assert targets == [*ATTENTION, "ff.linear_in", "ff.linear_out"]
        transformer.add_adapter(LoraConfig(target_modules=targets))
        reached = {name for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
        blocks = [*transformer.blocks, *getattr(transformer, "head_blocks", [])]
        assert len(reached) == 6 * len(blocks)

    def test_dora(self, make_any_pipe, tmp_path):
        pipe = make_any_pipe()
        add_adapter(pipe, use_dora=True)
        adapted = latents(pipe)
        save_adapter(pipe, tmp_path)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(latents(pipe), adapted)
        pipe.fuse_lora()
        assert close(latents(pipe), adapted)


class TestFile:
    @kinds
    def test_config_survives(self, tmp_path, config):
        pipe = SIT()
        add_adapter(pipe, **config)
        before, adapted = pipe.transformer.peft_config["default"].to_dict(), latents(pipe)
        save_adapter(pipe, tmp_path)
        for low_cpu_mem_usage in (True, False):
            pipe.unload_lora_weights()
            pipe.load_lora_weights(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            after = pipe.transformer.peft_config["default_0"].to_dict()
            assert {**after, "target_modules": set(after["target_modules"])} == before
            assert torch.equal(latents(pipe), adapted)

    @kinds
    def test_fused_equals_unfused(self, config):
        pipe = SIT()
        add_adapter(pipe, **config)
        adapted = latents(pipe)
        pipe.fuse_lora()
        assert close(latents(pipe), adapted)

    @pytest.mark.parametrize("alpha", [4, 8, 16])
    def test_metadata_are_diffusers(self, tmp_path, alpha):
        make_adapter(SIT, tmp_path, lora_alpha=alpha)
        tensors, metadata = ClassToImagePipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
        assert all(key.startswith("transformer.blocks.") for key in tensors)
        assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == alpha
        with safe_open(tmp_path / FILE, "pt") as file:
            assert json.loads(file.metadata()["lora_adapter_metadata"]) == metadata
        assert (
            tensors.keys()
            == ClassToImagePipeline.lora_state_dict(tmp_path).keys()
            == load_file(tmp_path / FILE).keys()
        )

    def test_without_metadata_alpha_is_the_rank(self, tmp_path):
        pipe = SIT()
        add_adapter(pipe, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
        adapted = latents(pipe)
        pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer))
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(latents(pipe), adapted)

    def test_places_to_load_from(self, tmp_path):
        make_adapter(SIT, tmp_path / "é x" / "sub")
        (tmp_path / "é x" / "other.safetensors").write_bytes((tmp_path / "é x" / "sub" / FILE).read_bytes())
        folder = tmp_path / "é x"
        results = []
        for source, options in (
            (folder / "sub", {}),
            (str(folder / "sub" / FILE), {}),
            (folder, {"subfolder": "sub"}),
            (folder, {"weight_name": "other.safetensors"}),
            (load_file(folder / "other.safetensors"), {}),
        ):
            pipe = SIT()
            pipe.load_lora_weights(source, adapter_name="x", **options)
            results.append(latents(pipe))
        assert all(torch.equal(result, results[0]) for result in results)

    def test_equal_content_gives_equal_bytes(self, tmp_path):
        row = {"cat": torch.ones(16), "dög": torch.zeros(16)}
        contents = {(make_adapter(SIT, tmp_path / str(i), label_rows=row) / FILE).read_bytes() for i in range(6)}
        assert len(contents) == 1

    def test_other_processes_write_nothing(self, tmp_path):
        SIT().save_lora_weights(tmp_path / "x", {"a.lora_A.weight": torch.ones(1)}, is_main_process=False)
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"transformer_lora_layers": None}, "save_lora_weights: give"),
            ({"label_rows": {"cat": torch.ones(16), " ": torch.ones(16)}}, "every class needs a name"),
            ({"label_rows": {"": torch.ones(16)}}, "every class needs a name"),
            ({"weight_name": "adapter.bin"}, "'adapter.bin' does not go with safe_serialization=True"),
            ({"weight_name": "a.pt", "safe_serialization": False}, "'a.pt' does not go with safe_serialization=False"),
            ({"safe_serialization": False, "label_rows": {"cat": torch.ones(16)}}, "keeps no metadata and no classes"),
            (
                {"safe_serialization": False, "transformer_lora_adapter_metadata": {"r": 4}},
                "keeps no metadata and no classes",
            ),
        ],
    )
    def test_refuses_to_save(self, tmp_path, given, reason):
        with pytest.raises(UserError, match=reason):
            SIT().save_lora_weights(
                tmp_path, **{"transformer_lora_layers": {"a.lora_A.weight": torch.ones(1)}, **given}
            )
        assert not list(tmp_path.iterdir())


class TestAdapters:
    def test_names(self, tmp_path):
        pipe = two_adapters(SIT)
        assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
        assert pipe.get_active_adapters() == ["b"]
        pipe.set_adapters(["a", "b"])
        assert pipe.get_active_adapters() == ["a", "b"]
        assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}

    def test_names_given_by_the_pipeline_are_free(self, tmp_path):
        make_adapter(SIT, tmp_path)
        pipe = SIT()
        for _ in range(2):
            pipe.load_lora_weights(tmp_path)
        pipe.set_adapters(["default_0", "default_1"])
        pipe.delete_adapters("default_0")
        pipe.load_lora_weights(tmp_path)
        assert sorted(pipe.get_list_adapters()["transformer"]) == ["default_0", "default_1"]

    def test_delete(self):
        pipe = SIT()
        base = latents(pipe)
        for names in (["a", "b"], [["a", "b"]]):
            add_adapter(pipe, "a", seed=1)
            add_adapter(pipe, "b", seed=2)
            only_b = latents(pipe)
            pipe.set_adapters(["a", "b"])
            for name in names:
                pipe.delete_adapters(name)
                expected = only_b if name == "a" else base
                assert close(latents(pipe), expected)
        assert not has_lora(pipe) and pipe.get_list_adapters() == {}

    def test_load_delete_load(self, tmp_path):
        make_adapter(SIT, tmp_path)
        pipe = SIT()
        base = latents(pipe)
        pipe.load_lora_weights(tmp_path)
        adapted = latents(pipe)
        pipe.delete_adapters(pipe.get_active_adapters()[0])
        assert close(latents(pipe), base)
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(latents(pipe), adapted)

    def test_unload_then_add(self):
        pipe = SIT()
        add_adapter(pipe)
        adapted = latents(pipe)
        pipe.unload_lora_weights()
        add_adapter(pipe)
        assert torch.equal(latents(pipe), adapted)

    def test_disable_and_enable(self):
        pipe = SIT()
        base = latents(pipe)
        add_adapter(pipe)
        adapted = latents(pipe)
        pipe.disable_lora()
        assert torch.equal(latents(pipe), base)
        pipe.enable_lora()
        assert torch.equal(latents(pipe), adapted)

    def test_fuse_of_some(self):
        pipe = two_adapters(SIT)
        pipe.set_adapters(["a", "b"])
        both = latents(pipe)
        pipe.set_adapters("a")
        only_a = latents(pipe)
        pipe.fuse_lora(adapter_names=["a"])
        assert pipe.fused_loras == {"a"} and close(latents(pipe), only_a)
        pipe.unfuse_lora()
        pipe.fuse_lora(adapter_names=["b", "a"])
        assert pipe.num_fused_loras == 2 and close(latents(pipe), both)
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0 and close(latents(pipe), only_a)

    def test_fused_ones_stay_fused(self, tmp_path):
        for seed, name in enumerate("ab"):
            make_adapter(SIT, tmp_path / name, {f"class {name}": torch.ones(16)}, seed=seed)
        pipe = SIT()
        pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
        only_a = latents(pipe)
        pipe.fuse_lora()
        for change in (
            lambda: pipe.load_lora_weights(tmp_path / "b", adapter_name="b"),
            lambda: pipe.set_adapters("a", 0.5),
        ):
            with pytest.raises(UserError, match=r"adapters are fused \(a\); call unload_lora_weights\(\)"):
                change()
            assert pipe.get_list_adapters() == {"transformer": ["a"]} and close(latents(pipe), only_a)
        pipe.save_lora_weights(tmp_path / "rows", label_rows={"cat": torch.ones(16)})
        pipe.load_lora_weights(tmp_path / "rows", adapter_name="rows")  # has no LoRA layers
        assert close(latents(pipe), only_a)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path / "b", adapter_name="b")
        expected = SIT()
        for name in "ab":
            expected.load_lora_weights(tmp_path / name, adapter_name=name)
        expected.set_adapters(["a", "b"])
        assert close(latents(pipe), latents(expected)) and pipe.transformer.config.num_classes == 6
        pipe.unload_lora_weights()
        assert close(latents(pipe), only_a)

    def test_fusing_one_of_two_leaves_the_other_to_unfuse_lora(self):
        pipe = two_adapters(SIT)
        only_b = latents(pipe)
        pipe.fuse_lora(adapter_names=["a"])
        with pytest.raises(UserError, match=r"set_adapters: adapters are fused \(a\)"):
            pipe.set_adapters("b")
        pipe.unfuse_lora()
        pipe.set_adapters("b")
        assert close(latents(pipe), only_b)

    @pytest.mark.parametrize("scale", [1.0, 0.8])
    def test_scale_of_a_call_equals_scale_of_a_fusion(self, scale):
        pipe = SIT()
        add_adapter(pipe)
        scaled = latents(pipe, attention_kwargs={"scale": scale})
        pipe.fuse_lora(lora_scale=scale)
        assert close(latents(pipe), scaled)

    def test_unknown_names_are_refused(self, caplog):
        pipe = SIT()
        add_adapter(pipe, "a")
        with pytest.raises(ValueError, match="not in the list of present adapters"):
            pipe.set_adapters("test")
        with pytest.raises(ValueError, match="Length of adapter names"):
            pipe.set_adapters(["a"], [1.0, 2.0])
        logger = logging.getLogger("diffusers")
        logger.addHandler(caplog.handler)
        try:
            pipe.set_adapters("a", {"text_encoder": 0.0})
        finally:
            logger.removeHandler(caplog.handler)
        assert "not part of the pipeline: ['text_encoder']" in caplog.text

    def test_tensors_that_name_no_layer_change_nothing(self, caplog):
        pipe = SIT()
        base = latents(pipe)
        logger = logging.getLogger("diffusers")
        logger.addHandler(caplog.handler)
        try:
            pipe.load_lora_weights({"lora_foo": torch.tensor(2.0), "lora_bar": torch.tensor(3.0)})
        finally:
            logger.removeHandler(caplog.handler)
        assert "No LoRA keys" in caplog.text
        assert torch.equal(latents(pipe), base) and not has_lora(pipe)

    def test_saving_needs_fusing(self, tmp_path):
        pipe = SIT()
        add_adapter(pipe)
        adapted = latents(pipe)
        with pytest.raises(UserError, match="fuse_lora"):
            pipe.save_pretrained(tmp_path / "x")
        assert not (tmp_path / "x").exists()
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.save_pretrained(tmp_path / "x")
        loaded = ClassToImagePipeline.from_pretrained(tmp_path / "x")
        loaded.set_progress_bar_config(disable=True)
        assert close(latents(loaded), adapted)

    def test_deleting_all_leaves_a_pipeline_that_saves(self, tmp_path):
        pipe = SIT()
        base = latents(pipe)
        add_adapter(pipe)
        pipe.delete_adapters("default")
        pipe.save_pretrained(tmp_path)
        loaded = ClassToImagePipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(latents(loaded), base)

    def test_a_weaker_model_takes_the_scale_without_lora_layers(self, make_flow_pipe):
        pipe = make_flow_pipe(guidance_transformer=make_flow_pipe.weaker())
        base = latents(pipe)
        add_adapter(pipe)
        assert not close(latents(pipe, attention_kwargs={"scale": 0.5}), base, 1e-3)
        assert torch.equal(latents(pipe, attention_kwargs={"scale": 0.0}), base)

    def test_internal_guidance_with_lora_in_both_heads(self, tmp_path):
        pipe = PipelineMaker(RAEv2Transformer2DModel)()
        call = {"guidance_method": "internal"}
        base = latents(pipe, **call)
        add_adapter(pipe, target_modules=["base_head.proj_out"])
        adapted = latents(pipe, **call)
        assert not close(adapted, base, 1e-3)
        pipe.fuse_lora()
        assert close(latents(pipe, **call), adapted)

    def test_half_precision(self, tmp_path):
        make_adapter(SIT, tmp_path / "adapter")
        exact = SIT()
        exact.save_pretrained(tmp_path / "pipeline")
        half = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.bfloat16)
        half.set_progress_bar_config(disable=True)
        for pipe in (exact, half):
            pipe.load_lora_weights(tmp_path / "adapter")
        assert close(latents(half), latents(exact), 0.1)

    @pytest.mark.parametrize(
        "offload", ["group", *(pytest.param(kind, marks=needs_accelerator) for kind in ("model", "sequential"))]
    )
    def test_offloading(self, tmp_path, offload):
        make_adapter(SIT, tmp_path, label_rows={"cat": torch.ones(16)})
        expected = SIT()
        base = latents(expected)
        expected.load_lora_weights(tmp_path)
        pipe = SIT()
        if offload == "group":
            pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        elif offload == "model":
            pipe.enable_model_cpu_offload()
        else:
            pipe.enable_sequential_cpu_offload()
        pipe.load_lora_weights(tmp_path)
        assert close(latents(pipe), latents(expected))
        assert close(latents(pipe, class_labels="cat"), latents(expected, class_labels="cat"))
        pipe.delete_adapters("default_0")
        assert close(latents(pipe), base)


class TestHotSwap:
    @pytest.mark.parametrize("ranks", [(4, 4), (2, 6), (6, 2)])
    def test_takes_the_place(self, make_flow_pipe, tmp_path, ranks):
        for i, rank in enumerate(ranks):
            make_adapter(make_flow_pipe, tmp_path / str(i), r=rank, lora_alpha=rank, seed=i)
        expected = make_flow_pipe()
        expected.load_lora_weights(tmp_path / "1")
        pipe = make_flow_pipe()
        pipe.enable_lora_hotswap(target_rank=max(ranks))
        pipe.load_lora_weights(tmp_path / "0", adapter_name="x")
        pipe.load_lora_weights(tmp_path / "1", adapter_name="x", hotswap=True)
        assert pipe.get_list_adapters() == {"transformer": ["x"]}
        assert close(latents(pipe), latents(expected))

    def test_ranks_change_again_and_again(self, tmp_path):
        expected = {}
        for rank in (2, 4):
            make_adapter(SIT, tmp_path / str(rank), r=rank, lora_alpha=3, seed=rank)
            plain = SIT()
            plain.load_lora_weights(tmp_path / str(rank))
            expected[rank] = latents(plain)
        pipe = SIT()
        pipe.load_lora_weights(tmp_path / "2", adapter_name="x")
        for rank in (4, 2, 4):
            pipe.load_lora_weights(tmp_path / str(rank), adapter_name="x", hotswap=True)
            assert close(latents(pipe), expected[rank])

    @pytest.mark.parametrize("target_rank", [None, 6])
    @pytest.mark.parametrize(
        "second",
        [
            {"r": 2, "lora_alpha": 5},
            {"r": 6, "lora_alpha": 3},
            {"r": 2, "use_rslora": True},
            {"r": 2, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 9}},
        ],
    )
    def test_scales_and_saves_what_was_swapped_in(self, tmp_path, second, target_rank):
        make_adapter(SIT, tmp_path / "0", r=4, lora_alpha=4, use_rslora=second.get("use_rslora", False))
        make_adapter(SIT, tmp_path / "1", **second, seed=2)
        expected, pipe = SIT(), SIT()
        expected.load_lora_weights(tmp_path / "1")
        if target_rank is not None:
            pipe.enable_lora_hotswap(target_rank=target_rank)
        pipe.load_lora_weights(tmp_path / "0", adapter_name="x")
        for name in ("1", "0", "1"):
            pipe.load_lora_weights(tmp_path / name, adapter_name="x", hotswap=True)
            alone, saved = SIT(), SIT()
            alone.load_lora_weights(tmp_path / name)
            saved.load_lora_weights(save_adapter(pipe, tmp_path / f"saved {name}", "x"))
            assert close(latents(pipe), latents(alone)) and close(latents(saved), latents(alone))
        for each in (pipe, expected):
            each.set_adapters(each.get_active_adapters(), 0.5)
        assert close(latents(pipe), latents(expected))

    def test_an_adapter_that_was_padded_is_saved_as_it_is(self, tmp_path):
        make_adapter(SIT, tmp_path / "0", r=2, lora_alpha=3)
        pipe, saved = SIT(), SIT()
        pipe.enable_lora_hotswap(target_rank=6)
        pipe.load_lora_weights(tmp_path / "0", adapter_name="x")
        saved.load_lora_weights(save_adapter(pipe, tmp_path / "1", "x"))
        assert close(latents(saved), latents(pipe))

    def test_compiled_without_recompiling(self, tmp_path):
        for i, rank in enumerate((2, 6)):
            row = {f"class {i}": torch.full((16,), float(i))}
            make_adapter(SIT, tmp_path / str(i), row, r=rank, lora_alpha=2 * rank, seed=i)
        expected = SIT()
        expected.load_lora_weights(tmp_path / "1")
        pipe = SIT()
        pipe.enable_lora_hotswap(target_rank=6)
        pipe.load_lora_weights(tmp_path / "0", adapter_name="x")
        pipe.transformer.compile(backend="eager", fullgraph=True)
        latents(pipe, class_labels="class 0")
        with torch._dynamo.config.patch(error_on_recompile=True):
            pipe.load_lora_weights(tmp_path / "1", adapter_name="x", hotswap=True)
            swapped = latents(pipe, class_labels="class 1")
        torch.compiler.reset()
        assert close(swapped, latents(expected, class_labels="class 1"))

    def test_comes_before_the_first_adapter(self):
        pipe = SIT()
        add_adapter(pipe)
        with pytest.raises(RuntimeError, match="before loading the first adapter"):
            pipe.enable_lora_hotswap(target_rank=8)
        with pytest.raises(ValueError, match="one of 'error', 'warn', or 'ignore'"):
            pipe.enable_lora_hotswap(target_rank=8, check_compiled="maybe")
        pipe.enable_lora_hotswap(target_rank=8, check_compiled="ignore")

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"target_modules": ["to_q", "ff.linear_in"]}, "unexpected keys"),
            ({"use_dora": True}, "DoRA .* cannot be hot-swapped"),
        ],
    )
    def test_refusals_change_nothing(self, tmp_path, config, reason):
        make_adapter(SIT, tmp_path / "0")
        make_adapter(SIT, tmp_path / "1", **config)
        pipe = SIT()
        pipe.load_lora_weights(tmp_path / "0", adapter_name="x")
        before = latents(pipe)
        with pytest.raises(UserError, match=reason):
            pipe.load_lora_weights(tmp_path / "1", adapter_name="x", hotswap=True)
        with pytest.raises(UserError, match="no existing adapter by that name"):
            pipe.load_lora_weights(tmp_path / "0", adapter_name="y", hotswap=True)
        assert torch.equal(latents(pipe), before) and pipe.get_list_adapters() == {"transformer": ["x"]}
        pipe.fuse_lora()
        with pytest.raises(UserError, match="fused"):
            pipe.load_lora_weights(tmp_path / "0", adapter_name="x", hotswap=True)
        assert close(latents(pipe), before)

    def test_dora_is_not_swapped_for_dora(self, tmp_path):
        make_adapter(SIT, tmp_path, use_dora=True)
        pipe = SIT()
        pipe.load_lora_weights(tmp_path, adapter_name="x")
        before = latents(pipe)
        with pytest.raises(UserError, match=r"DoRA .* cannot be hot-swapped"):
            pipe.load_lora_weights(tmp_path, adapter_name="x", hotswap=True)
        assert torch.equal(latents(pipe), before)
