"""What diffusers' own tests ask of an autoencoder: its mixins for models, training, attention and autoencoders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoder_cases import tiny_autoencoder, tiny_config
from diffusers import AutoModel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel

from repagen import RepresentationAutoencoder


def sample() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_load(tmp_path: Path, variant: str | None) -> None:
    model = RepresentationAutoencoder(**tiny_config()).eval()
    model.save_pretrained(tmp_path, variant=variant)
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path, variant=variant)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert torch.equal(loaded(sample(), return_dict=False)[0], model(sample(), return_dict=False)[0])
    if variant is not None:
        with pytest.raises(OSError, match=r"Error no file named diffusion_pytorch_model\.bin found in directory"):
            RepresentationAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_load_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    RepresentationAutoencoder(**tiny_config()).eval().to(dtype).save_pretrained(tmp_path)
    assert RepresentationAutoencoder.from_pretrained(tmp_path, dtype=dtype).dtype == dtype


@torch.no_grad()
def test_sharded_save_load(tmp_path: Path) -> None:
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(RepresentationAutoencoder.from_pretrained(tmp_path)(sample()).sample, model(sample()).sample)


def test_auto_model(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(str(tmp_path)), RepresentationAutoencoder)


@torch.no_grad()
def test_tuples_and_determinism() -> None:
    model = tiny_autoencoder()
    assert torch.equal(model(sample(), return_dict=False)[0], model(sample()).sample)
    latents = model.encode(sample(), return_dict=False)[0]
    assert torch.equal(latents, model.encode(sample()).latent)
    assert torch.equal(model.decode(latents, return_dict=False)[0], model.decode(latents).sample)


def test_attributes() -> None:
    model = RepresentationAutoencoder(**tiny_config())
    model.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 5
    with pytest.raises(AttributeError, match="'RepresentationAutoencoder' object has no attribute 'does_not_exist'"):
        _ = model.does_not_exist


def test_gradient_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = RepresentationAutoencoder(**tiny_config())
    twin = RepresentationAutoencoder(**tiny_config())
    twin.load_state_dict(model.state_dict())
    assert not model.is_gradient_checkpointing
    twin.enable_gradient_checkpointing()
    enabled = {type(module).__name__ for module in twin.modules() if getattr(module, "gradient_checkpointing", False)}
    assert enabled == {"RepresentationAutoencoder"}
    calls: list[Any] = []
    checkpoint = twin._gradient_checkpointing_func
    twin._gradient_checkpointing_func = lambda *args: calls.append(1) or checkpoint(*args)
    outputs = [each(sample()).sample for each in (model, twin)]
    for output in outputs:
        output.square().mean().backward()
    assert len(calls) == 2
    assert torch.equal(*outputs)
    for (name, one), (_, two) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, atol=5e-5, rtol=0, msg=name)
    twin.disable_gradient_checkpointing()
    assert not twin.is_gradient_checkpointing


def test_training_with_ema_and_autocast() -> None:
    model = RepresentationAutoencoder(**tiny_config(noise_tau=0.8)).train()
    ema = EMAModel(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(sample()).sample.float().square().mean()
    loss.backward()
    ema.step(model.parameters())
    assert torch.isfinite(loss)


@torch.no_grad()
def test_attention_processors_and_fusing() -> None:
    model = tiny_autoencoder()
    before = model(sample()).sample
    assert len(model.attn_processors) == 2
    model.fuse_qkv_projections()
    assert any(hasattr(module, "to_qkv") for module in model.modules() if isinstance(module, AttentionModuleMixin))
    torch.testing.assert_close(model(sample()).sample, before, atol=1e-5, rtol=0)
    model.unfuse_qkv_projections()
    assert torch.equal(model(sample()).sample, before)
    model.set_attn_processor({name: AttnProcessor() for name in model.attn_processors})
    assert all(type(processor) is AttnProcessor for processor in model.attn_processors.values())
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(model.attn_processors)): AttnProcessor()})


@torch.no_grad()
def test_attention_backend() -> None:
    model = tiny_autoencoder()
    before = model(sample()).sample
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(model(sample()).sample, before, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no_such_backend"):
        model.set_attention_backend("no_such_backend")


@torch.no_grad()
def test_copies_and_offload_hooks() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny_autoencoder()
    expected = model(sample()).sample
    assert torch.equal(copy.deepcopy(model)(sample()).sample, expected)
    calls = []

    class Counter(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    add_hook_to_module(model, Counter())
    model.encode(sample())
    model.decode(torch.zeros(1, 32, 4, 4))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"]
)
def test_decodes_under_group_offload_to_disk(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_autoencoder()
    latents = torch.randn(2, *model.latent_shape)
    expected = model.decode(latents).sample
    model.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options)
    assert torch.equal(model.decode(latents).sample, expected)
