"""Text embeddings as a generator reads them."""

from __future__ import annotations

import pytest
import torch

from repagen.errors import UserError
from repagen.layers.norms import RMSNorm
from repagen.layers.text_conditioning import TextCrossAttention, TextEmbedding, trim_padding

EMBEDDINGS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])


def embedding(num_null_tokens: int = 2, *, has_null: bool = True, pooled: bool = True) -> TextEmbedding:
    torch.manual_seed(0)
    module = TextEmbedding(6, 8, has_null=has_null, num_null_tokens=num_null_tokens, pooled=pooled)
    torch.nn.init.normal_(module.norm.weight)
    return module


@torch.no_grad()
def test_tokens_and_pooled_equal_the_formulas() -> None:
    module = embedding()
    text = module(EMBEDDINGS, MASK, torch.float32, 3)
    normed = EMBEDDINGS / (EMBEDDINGS.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
    assert torch.allclose(text.tokens[2], module.proj(normed[2]), atol=1e-6)
    assert torch.allclose(text.tokens[0][MASK[0]], module.proj(normed[0][MASK[0]]), atol=1e-6)
    for row in (0, 2):
        assert torch.allclose(text.pooled[row], module.pooled_proj(normed[row][MASK[row]].mean(0)), atol=1e-6)
    assert torch.equal(text.mask[[0, 2]], MASK[[0, 2]])


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_absent_prompt_is_the_learned_one(num_tokens: int) -> None:
    module = embedding()
    text = module(EMBEDDINGS[:, :num_tokens], torch.zeros(3, num_tokens, dtype=torch.bool), torch.float32, 3)
    assert text.mask.sum(1).tolist() == [2, 2, 2]
    assert torch.equal(text.tokens[text.mask].reshape(3, 2, 8), module.null_tokens.expand(3, 2, 8))
    assert torch.equal(text.pooled, module.null_pooled.expand(3, 8))


def test_absent_prompt_without_tokens_has_a_pooled_vector_alone() -> None:
    module = embedding(num_null_tokens=0)
    text = module(EMBEDDINGS, MASK, torch.float32, 3)
    assert module.null_tokens is None and torch.equal(text.mask, MASK)
    assert torch.equal(text.pooled[1], module.null_pooled)


@pytest.mark.parametrize("filler", [0.0, 7.0, float("nan"), float("inf")])
def test_padding_does_not_matter(filler: float) -> None:
    module = embedding()
    expected = module(EMBEDDINGS, MASK, torch.float32, 3)
    padded = torch.cat([EMBEDDINGS.masked_fill(~MASK[..., None], filler), torch.full((3, 5, 6), filler)], dim=1)
    text = module(padded, torch.cat([MASK, torch.zeros(3, 5, dtype=torch.bool)], dim=1), torch.float32, 3)
    assert torch.equal(text.tokens[text.mask], expected.tokens[expected.mask])
    assert torch.allclose(text.pooled, expected.pooled, atol=1e-6)
    (text.tokens[text.mask].sum() + text.pooled.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_trimming_leaves_out_padding_alone() -> None:
    embeddings, mask = trim_padding(EMBEDDINGS[:2], MASK[:2])
    assert torch.equal(embeddings, EMBEDDINGS[:2, [0, 1, 3]])
    assert mask.tolist() == [[True] * 3, [False] * 3]
    embeddings, mask = trim_padding(EMBEDDINGS[:1], MASK[:1])  # padding on the left or right, or in between
    assert torch.equal(embeddings, EMBEDDINGS[:1, [0, 1, 3]]) and mask is None
    embeddings, mask = trim_padding(EMBEDDINGS[1:2], MASK[1:2])
    assert embeddings.shape == (1, 0, 6) and mask.shape == (1, 0)


def test_cross_attention_starts_by_adding_nothing() -> None:
    layer = TextCrossAttention(RMSNorm(8), 8, 2)
    x, text = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    assert not torch.allclose(layer(x, text, None, torch.float32), x, atol=1e-3)
    layer.initialize_weights()
    assert torch.equal(layer(x, text, None, torch.float32), x)


@pytest.mark.parametrize(
    ("embeddings", "mask", "message"),
    [
        (EMBEDDINGS[..., :5], MASK, r"shape \(3, tokens, 6\), one prompt per sample, got \(3, 4, 5\)"),
        (EMBEDDINGS[:2], None, r"got \(2, 4, 6\)"),
        (EMBEDDINGS[0], None, r"got \(4, 6\)"),
        (EMBEDDINGS[:, :0], None, r"got \(3, 0, 6\)"),
        (EMBEDDINGS, MASK[:, :3], r"expected a bool tensor of shape \(3, 4\), .* got torch.bool of shape \(3, 3\)"),
        (EMBEDDINGS, MASK.long(), r"got torch.int64 of shape \(3, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(embeddings: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        embedding()(embeddings, mask, torch.float32, 3)
    assert "\n" not in str(error.value)


def test_absent_prompt_needs_a_stand_in() -> None:
    module = embedding(has_null=False)
    assert module.null_tokens is None and module.null_pooled is None
    with pytest.raises(UserError, match="a row is all False, and this model has nothing that stands for an absent"):
        module(EMBEDDINGS, MASK, torch.float32, 3)
    assert module(EMBEDDINGS[:1], MASK[:1], torch.float32, 1).mask is not None
