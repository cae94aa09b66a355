"""Generators that take text: what their output depends on, other grids, and the start from classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TorchAoConfig
from peft import LoraConfig
from torchao.quantization import Int8WeightOnlyConfig
from transformer_cases import DITDH, RAEV2, SIT, Case, all_text_generators, build, inputs, output, relative_error

from repagen import DiTDHTransformer2DModel, RAEv2Transformer2DModel, UserError
from repagen.alignment import AlignmentTarget, RepresentationAlignment
from repagen.layers import attention
from repagen.layers.text_conditioning import trim_padding
from repagen.pipelines.lora import default_lora_targets

pytestmark = all_text_generators
NUM_IMAGE_TOKENS = 16


def prompts(case: Case, batch_size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    batch = inputs(case, batch_size)
    return batch["encoder_hidden_states"], batch["encoder_attention_mask"]


def with_prompts(model: Any, case: Case, embeddings: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return output(model, case, encoder_hidden_states=embeddings, encoder_attention_mask=mask)


def whole_prompts(case: Case) -> torch.Tensor:
    """Prompts of one length."""
    return prompts(case)[0].repeat(1, 2, 1)


# What the output depends on


def test_padding_is_not_seen(case: Case) -> None:
    model, (embeddings, mask) = build(case), prompts(case)
    expected = output(model, case)
    for filler in (0.0, float("nan")):
        filled = embeddings.masked_fill(~mask[..., None], filler)
        longer = torch.cat([filled, torch.full((2, 7, embeddings.shape[2]), filler)], dim=1)
        wider = torch.cat([mask, torch.zeros(2, 7, dtype=torch.bool)], dim=1)
        assert torch.allclose(with_prompts(model, case, longer, wider), expected, atol=1e-5)
    assert torch.allclose(with_prompts(model, case, *trim_padding(embeddings, mask)), expected, atol=1e-5)


@torch.no_grad()
def test_a_prompt_alone_without_padding_gives_the_same(case: Case) -> None:
    model, batch = build(case), inputs(case, 4)
    expected = model(**batch).sample
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        embeddings, mask = trim_padding(alone["encoder_hidden_states"], alone["encoder_attention_mask"])
        alone |= {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
        assert torch.allclose(model(**alone).sample, expected[row : row + 1], atol=1e-5)


def test_absent_prompt_is_learned_and_reads_nothing(case: Case) -> None:
    model, (embeddings, mask) = build(case), prompts(case)
    assert mask.sum(1).tolist() == [4, 0]
    before = output(model, case)
    after = with_prompts(model, case, embeddings + 1, mask)
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0], atol=1e-3)
    with torch.no_grad():
        for name, parameter in model.text_embedder.named_parameters():
            if name.startswith("null"):
                parameter.add_(torch.randn_like(parameter))  # the same added to all would be lost in a norm
    changed = output(model, case)
    assert torch.equal(changed[0], before[0]) and not torch.allclose(changed[1], before[1], atol=1e-3)


def test_text_tokens_have_no_position(case: Case) -> None:
    model, (embeddings, mask) = build(case), prompts(case)
    turned = with_prompts(model, case, embeddings.flip(1), mask.flip(1))
    assert torch.allclose(turned, output(model, case), atol=1e-5)


def test_masks_are_passed_only_where_they_leave_something_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], int, tuple[int, ...] | None]] = []
    real = attention.dispatch_attention_fn

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any, **more: Any) -> torch.Tensor:
        seen.append((tuple(query.shape), key.shape[1], None if attn_mask is None else tuple(attn_mask.shape)))
        return real(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(attention, "dispatch_attention_fn", spy)
    model, embeddings = build(case), whole_prompts(case)
    expected = with_prompts(model, case, embeddings, None)
    assert all(shape is None for _, _, shape in seen)
    assert torch.equal(with_prompts(model, case, embeddings, torch.ones(2, 10, dtype=torch.bool)), expected)
    assert all(shape is None for _, _, shape in seen)
    seen.clear()
    output(model, case)
    heads, deep = seen[-2:], seen[:-2]
    assert all(query[1] == keys == NUM_IMAGE_TOKENS and shape is None for query, keys, shape in heads)
    masked = [(keys, shape) for _, keys, shape in deep if shape is not None]
    assert len(masked) == 3 and all(shape == (2, 1, 1, keys) for keys, shape in masked)
    # Beside its own tokens or in one sequence with them.
    across = case.config["text_conditioning"] == "cross_attention"
    assert all((keys <= 8) == across for keys, _ in masked) and len(deep) == 3 * (1 + across)


def test_a_backend_without_masks_takes_prompts_of_one_length(case: Case) -> None:
    model, embeddings = build(case), whole_prompts(case)
    expected = with_prompts(model, case, embeddings, None)
    model.set_attention_backend("_native_flash")
    for mask in (None, torch.ones(2, 10, dtype=torch.bool)):
        assert torch.allclose(with_prompts(model, case, embeddings, mask), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"attention backend '_native_flash' cannot leave out padding; .*native") as e:
        output(model, case)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_compiled_with_and_without_a_mask(case: Case) -> None:
    model, (embeddings, mask) = build(case), prompts(case)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (mask, torch.ones_like(mask), None):
        expected = with_prompts(model, case, embeddings, given)
        assert torch.allclose(with_prompts(compiled, case, embeddings, given), expected, atol=1e-5)
    latents = torch.randn(2, case.config["in_channels"], 6, 3)
    assert torch.allclose(
        output(compiled, case, hidden_states=latents), output(model, case, hidden_states=latents), atol=1e-5
    )


# Other grids


def restated_tables(grid: tuple[int, int], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary angles of a grid over the base grid of 4 x 4, in float64, token by token."""
    scale = (16 / (grid[0] * grid[1])) ** 0.5
    angles = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            y, x = ((i - (n - 1) / 2) * scale + 1.5 for i, n in zip((row, column), grid, strict=True))
            turns = [10000.0 ** (-2 * k / (head_dim // 2)) for k in range(head_dim // 4)]
            angles.append([position * turn for position in (y, x) for turn in turns for _ in range(2)])
    table = torch.tensor(angles, dtype=torch.float64)
    return table.cos().float(), table.sin().float()


@pytest.mark.parametrize("grid", [(6, 3), (2, 8), (5, 5)], ids=str)
def test_another_grid_has_interpolated_positions(case: Case, grid: tuple[int, int]) -> None:
    """A model made for that grid, with tables restated here and these weights, predicts the same."""
    model, made = build(case), build(case, sample_size=grid)
    for table in (made.rope, made.head_rope):
        cos, sin = restated_tables(grid, table.cos.shape[1])
        table.cos[: len(cos)], table.sin[: len(sin)] = cos, sin
    if getattr(made, "pos_embed", None) is not None:
        scale = (16 / (grid[0] * grid[1])) ** 0.5
        for token in range(grid[0] * grid[1]):
            y, x = ((i - (n - 1) / 2) * scale + 1.5 for i, n in zip(divmod(token, grid[1]), grid, strict=True))
            rates = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
            made.pos_embed[0, token] = torch.cat([f(p * rates) for p in (x, y) for f in (torch.sin, torch.cos)])
    latents = torch.randn(2, case.config["in_channels"], *grid)
    result = output(model, case, hidden_states=latents)
    assert result.shape == latents.shape
    assert torch.allclose(result, output(made, case, hidden_states=latents), atol=1e-5)


def test_only_multiples_of_the_patch(case: Case) -> None:
    model = build(case, patch_size=2)
    assert model.any_size and model.takes_text
    latents = torch.randn(2, case.config["in_channels"], 6, 2)
    assert output(model, case, hidden_states=latents).shape == latents.shape
    with pytest.raises(UserError, match=r"h and w multiples of 2; got \(2, 12, 5, 4\)"):
        output(model, case, hidden_states=torch.randn(2, case.config["in_channels"], 5, 4))


def test_alignment_sees_the_image_tokens_of_the_grid(case: Case) -> None:
    model = build(case)
    alignment = RepresentationAlignment(hidden_size=32, targets=(AlignmentTarget(dim=8, block=1),))
    for grid in ((6, 3), (4, 4)):
        with alignment.capture(model):
            output(model, case, hidden_states=torch.randn(2, case.config["in_channels"], *grid))
        assert alignment.captured_tokens(1).shape == (2, grid[0] * grid[1], 32)
        assert alignment.loss([torch.randn(2, grid[0] * grid[1], 8)]).isfinite()


# From classes to text

CLASS_CASES = {DiTDHTransformer2DModel: DITDH, RAEv2Transformer2DModel: RAEV2}


def converted(case: Case, **changes: Any) -> tuple[Any, Any]:
    origin = build(CLASS_CASES[case.model_class], **changes)
    return origin, origin.to_text_conditional(case.config["text_dim"], case.config["text_conditioning"])


def test_classes_to_text_starts_as_the_null_class(case: Case, tmp_path: Path) -> None:
    origin, model = converted(case)
    expected = output(origin, CLASS_CASES[case.model_class], class_labels=torch.tensor([10, 10]))
    first = output(model, case)
    assert torch.allclose(first[1], expected[1], atol=1e-5)  # an absent prompt
    with_prompt = torch.allclose(first[0], expected[0], atol=1e-5)
    assert with_prompt == (case.config["text_conditioning"] == "cross_attention")
    shared, own = origin.state_dict(), model.state_dict()
    kept = {name for name in shared.keys() & own.keys() if torch.equal(own[name], shared[name])}
    assert shared.keys() - kept <= {"label_embedder.table.weight", "class_tokens", "rope.cos", "rope.sin"}
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    assert loaded.takes_text and loaded.config.num_classes == 0 and loaded.label_embedder is None
    assert torch.equal(output(loaded, case), first)


def test_training_moves_what_starts_at_zero(case: Case) -> None:
    _, model = converted(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # in the first step, what feeds a layer of zeros has no gradient
        model(**inputs(case)).sample.square().mean().backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if not parameter.any()] == []


@pytest.mark.parametrize(
    "change", [{"class_dropout_prob": 0.0}, {"num_classes": 0, "class_dropout_prob": 0.0}], ids=str
)
def test_without_a_null_class_it_starts_from_what_there_is(case: Case, change: dict[str, Any]) -> None:
    origin, model = converted(case, **change)
    if origin.label_embedder is not None:
        with torch.no_grad():  # every class the mean one
            origin.label_embedder.table.weight.copy_(origin.label_embedder.table.weight.mean(0).expand(10, -1))
    expected = output(origin, CLASS_CASES[case.model_class], class_labels=torch.tensor([3, 4]))
    assert torch.allclose(output(model, case)[1], expected[1], atol=1e-5)


def test_text_to_text_is_refused(case: Case) -> None:
    with pytest.raises(UserError, match="takes text already"):
        build(case).to_text_conditional(8)


# The contract


def test_config_says_what_it_takes(case: Case) -> None:
    text, classes = build(case), build(CLASS_CASES[case.model_class])
    assert text.takes_text and text.config.num_classes == 0
    assert not classes.takes_text and not classes.any_size and not build(SIT).takes_text
    class_config = {**CLASS_CASES[case.model_class].config}
    del class_config["num_classes"]
    assert case.model_class(**class_config).config.num_classes == 1000
    with pytest.raises(
        UserError, match=r"num_classes: 10, but a model that takes text \(text_dim=20\) has no classes"
    ):
        build(case, num_classes=10)


def test_what_does_not_fit_is_refused(case: Case) -> None:
    model, (embeddings, mask) = build(case), prompts(case)
    for given, message in (
        ((None, None), r"encoder_hidden_states: missing; this model takes text, give .*\(2, tokens, 20\)"),
        ((None, mask), "encoder_hidden_states: missing"),
        ((embeddings[..., :8], mask), r"text embeddings of shape \(2, tokens, 20\)"),
        ((embeddings, mask[:, 1:]), r"encoder_attention_mask: expected a bool tensor of shape \(2, 5\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            with_prompts(model, case, *given)
        assert "\n" not in str(error.value)
    class_case = CLASS_CASES[case.model_class]
    for given in ((embeddings, mask), (None, mask)):
        with pytest.raises(UserError, match="this model takes no text"):
            with_prompts(build(class_case), class_case, *given)
    unguided = build(case, text_dropout_prob=0.0)
    assert with_prompts(unguided, case, embeddings, None).isfinite().all()
    assert not any("null" in name for name in unguided.state_dict())
    with pytest.raises(UserError, match="text_dropout_prob is 0"):
        output(unguided, case)


def test_default_lora_reaches_what_reads_text(case: Case) -> None:
    model = build(case)
    model.add_adapter(LoraConfig(r=2, target_modules=default_lora_targets(model), init_lora_weights=False))
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    text = {name for name, _ in model.named_parameters() if "text_embedder" in name or "cross_attn" in name}
    expected = {name.removesuffix(".base_layer.weight") for name in text if name.endswith(".base_layer.weight")}
    assert "text_embedder.proj" in names and expected <= names
    across = case.config["text_conditioning"] == "cross_attention"
    assert ("blocks.0.cross_attn.attn.to_k" in names) == across
    assert ("text_embedder.pooled_proj" in names) == (case.model_class is DiTDHTransformer2DModel)
    assert not any(
        name.endswith("weight") and "lora" not in name and "norm" not in name and ".base_layer." not in name
        for name in text
    )


def test_initial_weights_of_text(case: Case) -> None:
    model = build(case)
    model.initialize_weights()
    embedder, fan = model.text_embedder, case.config["text_dim"] + 32
    assert embedder.proj.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.15)
    for block in model.blocks:
        assert block.cross_attn is None or not block.cross_attn.attn.to_out[0].weight.any()
    if embedder.pooled_proj is not None:
        assert embedder.pooled_proj.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_eight_bits_leave_norms_alone_and_stay_close(case: Case, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    loaded = case.model_class.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    quantized = {name for name, weight in loaded.named_parameters() if type(weight).__name__ == "Int8Tensor"}
    text = {name for name, weight in loaded.named_parameters() if "text_embedder" in name or "cross_attn" in name}
    left = {name for name in text - quantized if not name.endswith("bias")}
    assert "text_embedder.proj.weight" in quantized and all("norm" in name or "null" in name for name in left)
    assert all(loaded.get_parameter(name).dtype == torch.float32 for name in left if "norm" in name)
    assert 0 < relative_error(output(loaded, case), output(model, case)) < 0.05
