"""Attention alignment: closed forms of the cross-entropy, and maps that are those the generator attends with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from term_cases import TOKENS, make_batch, make_model, run
from torch.testing import assert_close
from transformer_cases import CASES, build, inputs

from repagen.alignment import AttentionAlignment, attention_cross_entropy


def test_equal_maps_give_their_entropy_and_others_more() -> None:
    logits = torch.randn(2, 3, 5, 5)
    target = logits.softmax(-1)
    entropy = -(target * target.log()).sum(-1).mean()
    assert_close(attention_cross_entropy(logits + 7, target), entropy)
    assert attention_cross_entropy(logits + torch.randn(2, 3, 5, 5), target) > entropy


def test_closed_forms() -> None:
    flat = torch.zeros(1, 2, 4, 4)
    assert attention_cross_entropy(flat, flat.softmax(-1)).item() == pytest.approx(math.log(4))
    # Against one key alone, it is minus the log-probability of that key.
    one_key = torch.eye(4).expand(1, 2, 4, 4)
    logits = torch.randn(1, 2, 4, 4)
    expected = -torch.diagonal(logits.log_softmax(-1), dim1=-2, dim2=-1).mean()
    assert_close(attention_cross_entropy(logits, one_key), expected)


def test_gradient_is_the_difference_of_the_maps() -> None:
    logits = torch.randn(2, 3, 5, 5, requires_grad=True)
    target = torch.randn(2, 3, 5, 5).softmax(-1)
    attention_cross_entropy(logits, target).backward()
    assert_close(logits.grad, (logits.detach().softmax(-1) - target) / 30)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"elt"}))  # its blocks run once a loop
def test_logits_are_those_of_the_generators_own_attention(name: str) -> None:
    """Their softmax over all tokens, applied to the values, is what the block's attention puts out."""
    case = CASES[name]
    model, term, seen = build(case), AttentionAlignment(blocks=(2,)), []
    attention = model.blocks[1].attn
    attention.register_forward_hook(lambda _, *seen_of_pass: seen.append(seen_of_pass), with_kwargs=True)
    with torch.no_grad(), term.capture(model):
        model(**inputs(case))
    args, options, output = seen[0]
    query, key, value = (x.transpose(1, 2) for x in attention.project(*args))
    logits = query @ key.mT * attention.head_dim**-0.5
    if (mask := options["attention_mask"]) is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    assert_close(attention.to_out[0]((logits.softmax(-1) @ value).transpose(1, 2).flatten(2)), output)
    patches = math.prod(model.token_grid)
    assert_close(term.attention_logits(2), logits[..., :patches, :patches])


def test_loss_is_the_mean_over_pairs_of_block_and_layer() -> None:
    model, batch, term = make_model(), make_batch(), AttentionAlignment(blocks=(3, 1), max_heads=1)
    loss = run(term, model, batch)
    assert batch.attention is not None
    expected = [
        attention_cross_entropy(term.attention_logits(block)[:, :1], maps[:, :1])
        for block, maps in zip((3, 1), batch.attention, strict=True)
    ]
    assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize(("max_heads", "teacher_heads", "compared"), [(12, 4, 2), (12, 1, 1), (1, 4, 1)])
def test_heads_are_paired_as_far_as_both_have_them(max_heads: int, teacher_heads: int, compared: int) -> None:
    model = make_model()  # two heads
    maps = [torch.rand(3, teacher_heads, TOKENS, TOKENS).softmax(-1)]
    term = AttentionAlignment(blocks=(1,), max_heads=max_heads)
    loss = run(term, model, make_batch(attention=maps))
    expected = attention_cross_entropy(term.attention_logits(1)[:, :compared], maps[0][:, :compared])
    assert_close(loss, expected)


def test_gradient_reaches_queries_and_keys_and_no_values_of_the_last_block() -> None:
    model, term = make_model(), AttentionAlignment(blocks=(3,))
    run(term, model, make_batch(attention=make_batch().attention[:1])).backward()  # type: ignore[index]
    attention = model.blocks[2].attn
    assert attention.to_q.weight.grad.any() and attention.to_k.weight.grad.any()
    assert attention.to_v.weight.grad is None and model.proj_out.weight.grad is None


def test_class_token_of_the_generator_is_left_out() -> None:
    model = make_model(class_token_dim=6)
    term = AttentionAlignment(blocks=(1,))
    with term.capture(model):
        model(torch.randn(2, 4, 8, 8), torch.rand(2), class_labels=torch.arange(2), class_token=torch.randn(2, 6))
    assert term.attention_logits(1).shape == (2, 2, TOKENS, TOKENS)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([torch.rand(3, 2, 16, 16)], "2 blocks need as many attention maps, got 1"),
        (
            [torch.rand(3, 2, 9, 9)] * 2,
            r"expected attention maps of shape \(3, heads, 16, 16\), got \(3, 2, 9, 9\); let",
        ),
        ([torch.rand(1, 2, 16, 16)] * 2, r"expected .* got \(1, 2, 16, 16\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(AttentionAlignment(blocks=(1, 2)), make_model(), make_batch(attention=maps))


@pytest.mark.parametrize("options", [{"blocks": ()}, {"blocks": (2, 2)}, {"max_heads": 0}])
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"alignment: attention\.(blocks|max_heads) must be"):
        AttentionAlignment(**options)
