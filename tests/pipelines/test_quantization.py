"""Eight-bit weights by torchao, which run on a CPU; what needs a GPU is listed in docs/memory.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from lora_parts import latents, make_adapter, rows
from tiny_pipelines import PipelineMaker, inputs, tiny_text_pipeline
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

from repagen import ClassToImagePipeline, TextToImagePipeline, UserError
from repagen.pipelines.provenance import pipeline_sha256


def load(folder: Path, quantization: Any, *parts: str) -> ClassToImagePipeline:
    """The saved pipeline with the named parts in eight bits."""
    config = PipelineQuantizationConfig(quant_mapping={part: TorchAoConfig(quantization) for part in parts})
    pipe = ClassToImagePipeline.from_pretrained(
        folder, quantization_config=config, dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantized_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if type(parameter).__name__ == "Int8Tensor"]


@pytest.fixture
def saved(make_any_pipe: PipelineMaker, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with a pipeline, and its images."""
    pipe = make_any_pipe()
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline", pipe(**inputs()).images


@pytest.fixture
def quantized(make_pipe: PipelineMaker, tmp_path: Path) -> ClassToImagePipeline:
    make_pipe().save_pretrained(tmp_path / "pipeline")
    return load(tmp_path / "pipeline", Int8WeightOnlyConfig(), "transformer")


@pytest.mark.parametrize(
    "quantization",
    [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()],
    ids=["weights", "weights and activations"],
)
def test_every_generator_samples_in_eight_bits(saved: tuple[Path, torch.Tensor], quantization: Any) -> None:
    folder, expected = saved
    pipe = load(folder, quantization, "transformer", "vae")
    for model in (pipe.transformer, pipe.vae):
        names, kept = quantized_names(model), set(model._keep_in_fp32_modules)
        assert names and not any(kept & set(name.split(".")) for name in names)
    modules = {word for name in quantized_names(pipe.transformer) for word in name.split(".")}
    assert {"to_q", "to_k", "to_v", "to_out", "linear_in", "linear_out", "proj_out"} <= modules
    images = pipe(**inputs()).images
    assert 0 < (images - expected).abs().max() < 0.05


def test_linear_weights_take_a_byte_each(quantized: ClassToImagePipeline) -> None:
    weights = [quantized.transformer.get_parameter(name) for name in quantized_names(quantized.transformer)]
    assert all(weight.qdata.dtype == torch.int8 and weight.qdata.shape == weight.shape for weight in weights)


def test_eight_bits_are_saved_and_loaded(quantized: ClassToImagePipeline, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "again")
    loaded = ClassToImagePipeline.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert quantized_names(loaded.transformer) == quantized_names(quantized.transformer)
    call = {"output_type": "latent"}
    assert torch.equal(loaded(**inputs(**call)).images, quantized(**inputs(**call)).images)


def test_eight_bits_have_a_fingerprint_of_their_own(quantized: ClassToImagePipeline, tmp_path: Path) -> None:
    plain = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.bfloat16)
    again = load(tmp_path / "pipeline", Int8WeightOnlyConfig(), "transformer")
    assert pipeline_sha256(quantized) == pipeline_sha256(again)
    name = quantized_names(again.transformer)[0]
    again.transformer.get_parameter(name).qdata[0] += 1
    assert len({pipeline_sha256(pipe) for pipe in (quantized, again, plain)}) == 3


def test_a_text_encoder_in_eight_bits(tmp_path: Path) -> None:
    plain = tiny_text_pipeline()
    plain.save_pretrained(tmp_path / "pipeline")
    quantization = PipelineQuantizationConfig(quant_mapping={"text_encoder": TorchAoConfig(Int8WeightOnlyConfig())})
    pipe = TextToImagePipeline.from_pretrained(
        tmp_path / "pipeline", quantization_config=quantization, dtype=torch.bfloat16
    )
    assert quantized_names(pipe.text_encoder)
    pipe.save_pretrained(tmp_path / "again")
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert quantized_names(loaded.text_encoder) == quantized_names(pipe.text_encoder)
    assert loaded.text_encoder.describe() == pipe.text_encoder.describe()
    expected, read, again = (one.text_encoder.encode(["a red cube", ""]).embeddings for one in (plain, pipe, loaded))
    assert torch.equal(again, read)
    assert 0 < (read - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_on_eight_bits(
    make_pipe: PipelineMaker, quantized: ClassToImagePipeline, tmp_path: Path, config: dict[str, Any]
) -> None:
    exact, base = make_pipe(), latents(quantized)
    make_adapter(make_pipe, tmp_path / "a", rows("okapi"), **config)
    make_adapter(make_pipe, tmp_path / "b", seed=2, r=2, **config)
    for pipe in (exact, quantized):
        pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
        pipe.load_lora_weights(tmp_path / "b", adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.7, 0.4])
    for call in ({"class_labels": 4}, {"class_labels": 4, "attention_kwargs": {"scale": 0.5}}):
        expected = latents(exact, **call)
        plain = latents(exact, class_labels=4, attention_kwargs={"scale": 0.0})
        error, change = latents(quantized, **call) - expected, expected - plain
        assert error.norm() < 0.6 * change.norm()
    if not config:
        assert torch.equal(latents(quantized, attention_kwargs={"scale": 0.0}), base)
    quantized.delete_adapters("a")
    quantized.unload_lora_weights()
    assert quantized.transformer.config.num_classes == 4 and torch.equal(latents(quantized), base)


def test_eight_bits_cannot_hold_a_fused_adapter(
    make_pipe: PipelineMaker, quantized: ClassToImagePipeline, tmp_path: Path
) -> None:
    make_adapter(make_pipe, tmp_path / "adapter")
    quantized.load_lora_weights(tmp_path / "adapter")
    adapted = latents(quantized)
    with pytest.raises(UserError, match="fuse_lora: the transformer is quantised") as error:
        quantized.fuse_lora()
    assert "\n" not in str(error.value)
    assert torch.equal(latents(quantized), adapted) and quantized.num_fused_loras == 0


@pytest.mark.parametrize("what", ["model offload", "group offload", "cache", "compile"])
def test_eight_bits_combine_with(quantized: ClassToImagePipeline, what: str) -> None:
    expected = quantized(**inputs()).images
    if what == "model offload":
        quantized.enable_model_cpu_offload(device="cpu")
    elif what == "group offload":
        quantized.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    elif what == "cache":
        quantized.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    else:
        torch.compiler.reset()
        quantized.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(quantized(**inputs()).images, expected, rtol=0, atol=1e-5)
