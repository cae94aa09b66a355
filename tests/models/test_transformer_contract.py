"""What diffusers' own testers ask of a model (saving, dtypes, training, attention, LoRA), of all generators."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FasterCacheConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, _add_variant
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss
from transformer_cases import Case, all_generators, build, fill_, inputs, output, relative_error

from repagen.errors import UserError
from repagen.layers.attention import AttentionProcessor

pytestmark = all_generators
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def is_kept_in_float32(model: Any, name: str) -> bool:
    return any(part in model._keep_in_fp32_modules for part in name.split("."))


# Saving and loading


def test_save_and_load_is_exact(case: Case, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert torch.equal(output(model, case), output(loaded, case))


def test_save_and_load_variant(case: Case, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path, variant="ema")
    assert torch.equal(output(model, case), output(case.model_class.from_pretrained(tmp_path, variant="ema"), case))
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        case.model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_load_in_dtype_keeps_norms_time_and_tables_in_float32(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if is_kept_in_float32(model, name) else dtype), name
    assert loaded.time_embedder.linear_1.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_close(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    half = inputs(case)["hidden_states"].to(dtype)
    result = output(loaded, case, hidden_states=half)
    assert result.dtype == dtype
    assert relative_error(result, output(model, case)) < 0.02
    # Float32 latents may meet a half-precision model: the sampler's state is float32.
    assert output(loaded, case).dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    again = case.model_class.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(output(again, case), output(loaded, case))


def test_bare_to_casts_and_still_runs(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    model = build(case)
    expected = output(model, case)
    logging.getLogger("diffusers").propagate = True
    try:
        with caplog.at_level(logging.WARNING, logger="diffusers.models.modeling_utils"):
            model.to(torch.bfloat16)
    finally:
        logging.getLogger("diffusers").propagate = False
    assert f"should be kept in float32: {model._keep_in_fp32_modules}" in caplog.text
    assert relative_error(output(model, case), expected) < 0.02


@pytest.mark.parametrize("variant", [None, "ema"])
def test_sharded_checkpoint(case: Case, variant: str | None, tmp_path: Path) -> None:
    model = build(case)
    size_kb = sum(tensor.nbytes for tensor in model.state_dict().values()) // 1024
    model.save_pretrained(tmp_path, max_shard_size=f"{int(size_kb * 0.75)}KB", variant=variant)
    index = json.loads((tmp_path / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)).read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(output(model, case), output(case.model_class.from_pretrained(tmp_path, variant=variant), case))


def test_sharded_checkpoint_loads_in_parallel(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.utils import constants

    model = build(case)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", True)
    monkeypatch.setattr(constants, "DEFAULT_HF_PARALLEL_LOADING_WORKERS", 2)
    assert torch.equal(output(model, case), output(case.model_class.from_pretrained(tmp_path), case))


def test_device_map_keeps_blocks_whole(case: Case, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(output(model, case), output(loaded, case))
    kinds = {type(block).__name__ for block in model.modules() if type(block).__name__.endswith("Block")}
    assert kinds <= set(model._no_split_modules)


# Calling


def test_output_has_the_latent_shape_and_repeats(case: Case) -> None:
    model = build(case)
    first = output(model, case)
    batch_size, _, *size = inputs(case)["hidden_states"].shape
    assert first.shape == (batch_size, case.out_channels, *size)
    assert torch.equal(first, output(model, case))
    assert torch.equal(first, model(**inputs(case)).sample)


def test_samples_of_a_batch_do_not_meet(case: Case) -> None:
    model, batch = build(case), inputs(case)
    alone = [model(**{key: value[i : i + 1] for key, value in batch.items()}, return_dict=False)[0] for i in range(2)]
    assert torch.allclose(torch.cat(alone), output(model, case), atol=1e-5)


def test_attributes_and_config(case: Case) -> None:
    model = build(case)
    model.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 5
    with pytest.raises(AttributeError, match=f"'{case.model_class.__name__}' object has no attribute 'nowhere'"):
        _ = model.nowhere


def test_layerwise_casting(case: Case) -> None:
    model = build(case)
    expected = output(model, case)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].ff.linear_in.weight.dtype == torch.float8_e4m3fn
    for name, tensor in model.state_dict().items():
        if is_kept_in_float32(model, name):
            assert tensor.dtype == torch.float32, name
    assert 0 < relative_error(output(model, case), expected) < 0.15


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"]
)
def test_group_offload(case: Case, options: dict[str, Any]) -> None:
    expected = output(build(case), case)
    model = build(case)
    model.enable_group_offload(torch.device("cpu"), **options)
    assert torch.equal(output(model, case), expected)


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"]
)
def test_group_offload_to_disk(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    # What a hook does not bring back from the disk is garbage, which offloading to memory would not show on a CPU.
    expected = output(build(case), case)
    model = build(case)
    model.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options)
    assert torch.equal(output(model, case), expected)


def test_compiles_whole_without_graph_breaks(case: Case) -> None:
    model = build(case)
    expected = output(model, case)
    torch.compiler.reset()
    assert torch.allclose(output(torch.compile(model, backend="eager", fullgraph=True), case), expected, atol=1e-6)


def test_compiles_block_by_block(case: Case) -> None:
    model = build(case)
    expected = output(model, case)
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=1):
        assert torch.allclose(output(model, case), expected, atol=1e-6)


def test_runs_on_the_meta_device(case: Case) -> None:
    with torch.device("meta"):
        model = case.model_class(**case.config)
    batch = {key: value.to("meta") for key, value in inputs(case).items()}
    assert model(**batch).sample.shape == output(build(case), case).shape


# Classes


def skip_text(case: Case) -> None:
    if case.takes_text:
        pytest.skip("this model takes text, not classes")


def test_chosen_classes_keep_their_predictions(case: Case, tmp_path: Path) -> None:
    skip_text(case)
    model = build(case)
    before = output(model, case, class_labels=torch.tensor([7, 10]))  # a class, and no class
    new_rows = torch.randn(2, model.label_embedder.table.embedding_dim)
    model.choose_classes([3, 7], new_rows)
    assert model.config.num_classes == 4
    assert torch.equal(output(model, case, class_labels=torch.tensor([1, 4])), before)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    labels = torch.tensor([2, 3])
    assert torch.equal(output(loaded, case, class_labels=labels), output(model, case, class_labels=labels))
    with pytest.raises(UserError, match="class_labels: 5 is no class"):
        output(model, case, class_labels=torch.tensor([5, 0]))
    for kept, rows in (([4], None), ([0, 0], None), ([0], torch.zeros(1, 3))):
        with pytest.raises(UserError, match=r"ids from 0 to 3, each once|shape \(classes, 32\)"):
            model.choose_classes(kept, rows)


def test_an_unconditional_model_learns_of_classes_where_it_has_a_null_class(case: Case) -> None:
    skip_text(case)
    model = build(case, num_classes=0)
    before = output(model, case)
    model.choose_classes([], torch.randn(3, model.label_embedder.table.embedding_dim))
    assert torch.equal(output(model, case, class_labels=torch.tensor([3, 3])), before)
    with pytest.raises(UserError, match="neither classes nor a null class"):
        build(case, num_classes=0, class_dropout_prob=0.0).choose_classes([], torch.zeros(1, 32))


# Training


def test_training_reaches_every_parameter(case: Case) -> None:
    model = build(case).train()
    shadow = EMAModel(model.parameters())
    samples = model(**inputs(case), **case.training_options, return_dict=False)
    sum(mse_loss(sample, torch.randn_like(sample)) for sample in samples).backward()
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without_gradient == []
    shadow.step(model.parameters())


def test_gradient_checkpointing_is_switched(case: Case) -> None:
    model = build(case)
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    with_it = {type(m).__name__ for m in model.modules() if getattr(m, "gradient_checkpointing", False)}
    assert with_it == {case.model_class.__name__}
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    plain, checkpointed = build(case).train(), build(case).train()
    checkpointed.enable_gradient_checkpointing()
    for model in (plain, checkpointed):
        samples = model(**inputs(case), **case.training_options, return_dict=False)
        sum(sample.square().mean() for sample in samples).backward()
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


def test_gradient_checkpointing_runs_blocks_again(case: Case) -> None:
    model, calls = build(case).train(), []
    model.enable_gradient_checkpointing()
    model.blocks[0].ff.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**inputs(case)).sample.mean().backward()
    assert len(calls) == 2 * case.num_loops


def test_bf16_autocast_keeps_the_residual_stream_float32(case: Case) -> None:
    model, seen = build(case).train(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    model.blocks[0].norm1.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    model.time_embedder.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    matmuls = []
    model.blocks[0].ff.linear_in.register_forward_hook(lambda _, args, out: matmuls.append(out.dtype))
    expected = output(model, case)
    seen.clear(), matmuls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        sample = model(**inputs(case)).sample
        loss = mse_loss(sample.float(), torch.zeros_like(sample))
    loss.backward()
    assert {dtype for pair in seen for dtype in pair} == {torch.float32}
    assert matmuls == [torch.bfloat16] * case.num_loops
    assert sample.dtype == torch.float32 and 0 < relative_error(sample, expected) < 0.02


def test_time_embedding_is_exact_under_autocast(case: Case) -> None:
    model, t = build(case), torch.linspace(0, 1, 7)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model.time_embedder(t)
    assert torch.equal(under_autocast, model.time_embedder(t))


# Attention


@torch.no_grad()
def test_fused_projections_change_nothing(case: Case) -> None:
    model = build(case)
    expected = output(model, case)
    attentions = [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]
    model.fuse_qkv_projections()
    fused = {True: "to_kv", False: "to_qkv"}
    assert all(module.fused_projections and hasattr(module, fused[module.is_cross_attention]) for module in attentions)
    assert torch.allclose(output(model, case), expected, atol=1e-6)
    model.unfuse_qkv_projections()
    assert not any(
        module.fused_projections or hasattr(module, fused[module.is_cross_attention]) for module in attentions
    )
    assert torch.equal(output(model, case), expected)


def test_processors_are_got_and_set(case: Case) -> None:
    model = build(case)
    names = model.attn_processors.keys()
    across = case.config.get("text_conditioning") == "cross_attention"
    assert len(names) == case.config["depth"] * (1 + across) + case.config.get("head_depth", 0)
    assert all(isinstance(processor, AttentionProcessor) for processor in model.attn_processors.values())
    attention = model.blocks[0].attn
    replacement = AttentionProcessor()
    attention.set_processor(replacement)
    assert attention.get_processor() is replacement
    model.set_attn_processor({name: AttnProcessor() for name in names})
    assert all(type(processor) is AttnProcessor for processor in model.attn_processors.values())
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(names)): AttnProcessor()})


def test_backend_of_a_model_equals_the_context_manager(case: Case) -> None:
    model = build(case)
    with attention_backend("_native_math"):
        expected = output(model, case)
    before = _AttentionBackendRegistry._active_backend
    model.set_attention_backend("_native_math")
    assert _AttentionBackendRegistry._active_backend == before
    assert torch.equal(output(model, case), expected)
    model.reset_attention_backend()
    assert torch.allclose(output(model, case), expected, atol=1e-5)
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


# LoRA


def with_lora(case: Case) -> Any:
    model = build(case)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS, init_lora_weights=False))
    return model


def test_lora_saves_unloads_and_loads(case: Case, tmp_path: Path) -> None:
    bare = build(case)
    plain = output(bare, case)
    model = with_lora(case)
    expected = output(model, case)
    assert not torch.allclose(expected, plain, atol=1e-4)
    assert torch.allclose(output(model, case, attention_kwargs={"scale": 0.0}), plain, atol=1e-6)
    metadata = model.peft_config["default"].to_dict()
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    torch.testing.assert_close(model.state_dict(), bare.state_dict(), rtol=0, atol=0)
    # Weights at another address may take another kernel, which rounds differently.
    assert torch.allclose(output(model, case), plain, atol=1e-6)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.allclose(output(model, case), expected, atol=1e-6)
    assert model.peft_config["default_0"].to_dict()["target_modules"] == metadata["target_modules"]


def test_lora_refuses_wrong_name_and_metadata(case: Case, tmp_path: Path) -> None:
    model = with_lora(case)
    with pytest.raises(ValueError, match="Adapter name foo not found"):
        model.save_lora_adapter(tmp_path, adapter_name="foo")
    model.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    wrong = {"r": 4, "foo": 1}
    save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(wrong)})
    model.unload_lora()
    with pytest.raises(TypeError, match="LoraConfig"):
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"])
def test_lora_hot_swap_compiles_nothing_again(case: Case, compiled: bool, tmp_path: Path) -> None:
    expected = []
    for rank in (3, 5):
        model = build(case)
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=["to_q", "linear_in", "proj_out"], init_lora_weights=False
        )
        model.add_adapter(config, adapter_name="x")
        expected.append(output(model, case))
        model.save_lora_adapter(tmp_path / str(rank), adapter_name="x")
    assert not torch.allclose(*expected, atol=1e-3)
    model = build(case)
    model.enable_lora_hotswap(target_rank=5)
    options = {"prefix": None, "use_safetensors": True}
    model.load_lora_adapter(tmp_path / "3", adapter_name="x", **options)
    torch.compiler.reset()
    if compiled:
        model.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(output(model, case), expected[0], atol=1e-5)
        model.load_lora_adapter(tmp_path / "5", adapter_name="x", hotswap=True, **options)
        assert torch.allclose(output(model, case), expected[1], atol=1e-5)
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        model.load_lora_adapter(tmp_path / "5", adapter_name="y", hotswap=True, **options)


# Caches, beside test_transformer_caches.py


def test_faster_cache_takes_images_and_says_what_it_assumes(caplog: pytest.LogCaptureFixture, case: Case) -> None:
    model = build(case)
    with pytest.raises(ValueError, match="tensor_format"):
        model.enable_cache(FasterCacheConfig(spatial_attention_block_skip_range=2, tensor_format="BFHWC"))
    assert not model.is_cache_enabled
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        model.enable_cache(FasterCacheConfig(spatial_attention_block_skip_range=2, tensor_format="BCHW"))
    finally:
        logger.removeHandler(caplog.handler)
    assert "No `attention_weight_callback` provided" in caplog.text and model.is_cache_enabled


# What the generators promise beside


def test_published_initial_weights_predict_exactly_zero(case: Case) -> None:
    model = case.model_class(**case.config)
    assert output(model, case).any()
    model.initialize_weights()
    assert not output(model, case).any()


def test_copies_and_reinitialised_models_are_independent(case: Case) -> None:
    model = build(case)
    twin = copy.deepcopy(model)
    fill_(twin)
    assert not torch.equal(output(model, case), output(twin, case))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 3, 8, 8)}, r"takes latents of shape \(batch, .*got \(2, 3, 8, 8\)"),
        ({"hidden_states": torch.zeros(2, 4, 16, 16)}, "takes latents of shape"),
        (
            {"class_labels": torch.tensor([0, 11])},
            "11 is no class of this model; allowed are 0..9, or 10 for no class",
        ),
        ({"class_labels": torch.tensor([-1, 0])}, "-1 is no class"),
        ({"class_labels": None}, "class_labels: missing"),
        ({"class_labels": torch.tensor([1])}, r"expected 2 integers, shape \(2,\)"),
        ({"class_labels": torch.tensor([1.0, 2.0])}, "expected 2 integers"),
        ({"timestep": torch.zeros(3)}, "one time per sample"),
    ],
)
def test_wrong_input_is_refused_by_name(case: Case, change: dict[str, Any], message: str) -> None:
    if "class_labels" in change:
        skip_text(case)
    if case.model_class.any_size and change.get("hidden_states", torch.zeros(0)).shape[-1:] == (16,):
        pytest.skip("this model takes any size")
    with pytest.raises(ValueError, match=message) as error:
        output(build(case), case, **change)
    assert "\n" not in str(error.value)


def skip_discrete_time(case: Case) -> None:
    if case.model_class.discrete_time:
        pytest.skip("this model counts steps, not times")


@pytest.mark.parametrize(
    ("timestep", "message"),
    [([500.0, 500.0], "divide a scheduler's timesteps"), ([1, 0], "expected float times")],
)
def test_steps_in_place_of_times_are_refused(case: Case, timestep: list[float], message: str) -> None:
    skip_discrete_time(case)
    with pytest.raises(ValueError, match=message) as error:
        output(build(case), case, timestep=torch.tensor(timestep))
    assert "\n" not in str(error.value)


def test_scalar_time_stands_for_all_samples(case: Case) -> None:
    model = build(case)
    t = inputs(case)["timestep"][0]
    expected = output(model, case, timestep=t.expand(2))
    assert torch.equal(output(model, case, timestep=t), expected)
    assert torch.equal(output(model, case, timestep=t[None]), expected)


@pytest.mark.parametrize("class_dropout_prob", [0.0, 0.1])
def test_unconditional_model_ignores_labels(case: Case, class_dropout_prob: float) -> None:
    skip_text(case)
    model = build(case, num_classes=0, class_dropout_prob=class_dropout_prob)
    without = output(model, case, class_labels=None)
    assert torch.equal(output(model, case, class_labels=torch.tensor([3, 4])), without)


def test_no_null_row_without_label_dropping(case: Case) -> None:
    skip_text(case)
    model = build(case, class_dropout_prob=0.0)
    assert model.label_embedder.table.num_embeddings == 10
    with pytest.raises(ValueError, match=r"10 is no class of this model; allowed are 0\.\.9$"):
        output(model, case, class_labels=torch.tensor([10, 0]))


def test_rectangular_latent(case: Case) -> None:
    model = build(case, sample_size=(4, 8))
    height, width = 4, 8
    x = torch.randn(2, case.config["in_channels"], height, width)
    assert output(model, case, hidden_states=x).shape == (2, case.out_channels, height, width)
    assert model.token_grid == (height // model.config.patch_size, width // model.config.patch_size)


@pytest.mark.parametrize("prediction_type", ["velocity", "sample", "epsilon"])
def test_time_direction_is_converted_at_one_place(case: Case, prediction_type: str) -> None:
    skip_discrete_time(case)
    forward = build(case, prediction_type=prediction_type)
    backward = build(case, prediction_type=prediction_type, time_direction="data_at_one")
    t = torch.tensor([0.25, 0.75])
    sign = -1 if prediction_type == "velocity" else 1
    assert torch.equal(output(backward, case, timestep=1 - t), sign * output(forward, case, timestep=t))


def test_unknown_size_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"no size 'H'; allowed are .*XL"):
        case.model_class.config_for_size("H")
