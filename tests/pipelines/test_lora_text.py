"""LoRA layers on pipelines that take prompts: the same tests as of classes, and hot swap and refused classes."""

from __future__ import annotations

import pytest
import test_lora as of_classes
import torch
from lora_parts import ATTENTION, close, latents, make_adapter, rows
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_pipelines import TextPipelineMaker

from repagen import RAEv2Transformer2DModel, UserError
from repagen.pipelines.lora import default_lora_targets


class TestEveryGenerator(of_classes.TestEveryGenerator):
    @pytest.fixture
    def make_any_pipe(self) -> TextPipelineMaker:
        return TextPipelineMaker(RAEv2Transformer2DModel)

    def test_default_targets_are_attention_and_feed_forward_of_all_blocks(self, make_any_pipe):
        """And what text enters by."""
        transformer = make_any_pipe().transformer
        targets = default_lora_targets(transformer)
        assert targets[:6] == [*ATTENTION, "ff.linear_in", "ff.linear_out"]
        transformer.add_adapter(LoraConfig(target_modules=targets))
        reached = {name for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
        across = transformer.config.text_conditioning == "cross_attention"  # its layers bear the same names
        blocks, heads = len(transformer.blocks), len(transformer.head_blocks)
        assert len(reached) == 6 * (blocks + heads) + 4 * blocks * across + len(targets[6:])


@pytest.fixture
def make_pipe() -> TextPipelineMaker:
    return TextPipelineMaker(RAEv2Transformer2DModel)


def test_hot_swap(make_pipe, tmp_path):
    first, second = (make_adapter(make_pipe, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    pipe = make_pipe()
    pipe.load_lora_weights(second, adapter_name="x")
    expected = latents(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(first, adapter_name="x")
    assert not close(latents(pipe), expected, 1e-3)
    pipe.load_lora_weights(second, adapter_name="x", hotswap=True)
    assert close(latents(pipe), expected)


def test_an_adapter_keeps_its_hands_off_the_text_encoder(make_pipe, tmp_path):
    pipe = make_pipe()
    before = pipe.encode_prompt("a red cube")[0]
    pipe.load_lora_weights(make_adapter(make_pipe, tmp_path))
    assert torch.equal(pipe.encode_prompt("a red cube")[0], before)


def test_classes_are_refused(make_pipe, tmp_path):
    make_adapter(make_pipe, tmp_path, rows("axolotl"))
    with pytest.raises(UserError, match="brings classes, but this transformer has neither classes"):
        make_pipe().load_lora_weights(tmp_path)
