"""`ELTTransformer2DModel`: any number of loops from one set of weights, and self-distillation between them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, TextKVCacheConfig
from test_transformer_caches import CACHES, CLOCK
from transformer_cases import ELT, build, fill_, inputs, output

from repagen import ELTTransformer2DModel, SiTTransformer2DModel, UserError
from repagen.flow.distillation import loop_distillation_loss, student_loss_weight

LOOPS = ELT.config["num_loops"]
# Counted here: the paper's sizes are masked generators, whose blocks have no modulation.
PARAMETERS = {"L": 155_588_624, "XL": 172_808_080}


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_have_the_documented_parameters(size: str) -> None:
    with torch.device("meta"):
        model = ELTTransformer2DModel(**ELTTransformer2DModel.config_for_size(size))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]


def test_parameters_do_not_depend_on_the_loops() -> None:
    once, often = (ELTTransformer2DModel(**{**ELT.config, "num_loops": loops}) for loops in (1, 7))
    assert {n: p.shape for n, p in once.named_parameters()} == {n: p.shape for n, p in often.named_parameters()}


def test_one_loop_is_the_plain_network() -> None:
    model = build(ELT)
    plain = SiTTransformer2DModel(**{key: value for key, value in ELT.config.items() if key != "num_loops"}).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(model, ELT, num_loops=1), output(plain, ELT))


def unrolled(model: ELTTransformer2DModel) -> SiTTransformer2DModel:
    """The plain network of N * L blocks with repeated weights."""
    config = {key: value for key, value in ELT.config.items() if key != "num_loops"}
    deep = SiTTransformer2DModel(**{**config, "depth": config["depth"] * LOOPS}).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("blocks.")}
    for number, block in enumerate([*model.blocks] * LOOPS):
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in block.state_dict().items()}
    deep.load_state_dict(state)
    return deep


def test_loops_repeat_the_blocks() -> None:
    model = build(ELT)
    assert torch.equal(output(model, ELT), output(unrolled(model), ELT))


@torch.no_grad()
def test_every_number_of_loops_gives_a_prediction_of_its_own(tmp_path: Path) -> None:
    build(ELT).save_pretrained(tmp_path)
    model = ELTTransformer2DModel.from_pretrained(tmp_path)
    one_pass = model(**inputs(ELT), return_loops=range(1, LOOPS + 1))
    samples = [output(model, ELT, num_loops=loops) for loops in range(1, LOOPS + 1)]
    for sample, of_one_pass in zip(samples, one_pass.loop_samples, strict=True):
        assert sample.isfinite().all() and torch.equal(sample, of_one_pass)
    assert torch.equal(samples[-1], output(model, ELT)) and torch.equal(samples[-1], one_pass.sample)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(samples))
    sample, (second,) = model(**inputs(ELT), return_loops=[2], return_dict=False)
    assert torch.equal(second, samples[1]) and torch.equal(sample, samples[-1])
    assert model(**inputs(ELT)).loop_samples is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_loops": 0}, r"num_loops: 0 is out of range; allowed are 1\.\.3"),
        ({"num_loops": LOOPS + 1}, r"num_loops: 4 is out of range; allowed are 1\.\.3"),
        ({"num_loops": 1.5}, r"num_loops: 1\.5 is out of range"),
        ({"num_loops": 2, "return_loops": [1, 3]}, r"return_loops: 3 is out of range; allowed are 1\.\.2"),
    ],
)
def test_loops_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        output(build(ELT), ELT, **options)


def test_a_model_without_loops_is_refused() -> None:
    with pytest.raises(UserError, match="num_loops: at least 1, got 0"):
        ELTTransformer2DModel(**{**ELT.config, "num_loops": 0})


def gradients(model: ELTTransformer2DModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_distillation_moves_the_student_only() -> None:
    model = build(ELT).train()
    target = output(model, ELT)
    of_a_constant = gradients(model, (model(**inputs(ELT), num_loops=1).sample - target).square().mean())
    calls: list[torch.Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _, __, tokens: tokens.retain_grad() or calls.append(tokens))
    out = model(**inputs(ELT), return_loops=[1])
    distilled = gradients(model, loop_distillation_loss(out.loop_samples[0], out.sample))
    assert [tokens.grad is not None for tokens in calls] == [True] + [False] * (LOOPS - 1)
    for name, gradient in of_a_constant.items():
        assert torch.allclose(distilled[name], gradient, atol=1e-6), name


def test_distillation_makes_early_loops_predict_the_last() -> None:
    model = ELTTransformer2DModel(**ELT.config)
    fill_(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    target, losses = torch.randn_like(inputs(ELT)["hidden_states"]), []
    for step in range(60):
        out = model(**inputs(ELT), return_loops=[1 + step % (LOOPS - 1)])
        student, teacher, weight = out.loop_samples[0], out.sample, student_loss_weight(step / 60)
        distillation = loop_distillation_loss(student, teacher)
        loss = (teacher - target).square().mean() + weight * (student - target).square().mean()
        optimizer.zero_grad()
        (loss + (1 - weight) * distillation).backward()
        optimizer.step()
        losses.append(distillation.item())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_student_weight_falls_along_a_line() -> None:
    assert [student_loss_weight(progress) for progress in (0.0, 0.25, 1.0, 1.2)] == [1.0, 0.75, 0.0, 0.0]


def test_gradient_checkpointing_of_all_loops() -> None:
    model = build(ELT).train()
    expected = gradients(model, model(**inputs(ELT), return_loops=[1]).loop_samples[0].square().mean())
    model.enable_gradient_checkpointing()
    result = gradients(model, model(**inputs(ELT), return_loops=[1]).loop_samples[0].square().mean())
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_caches_that_would_mix_loops_up_are_refused() -> None:
    model = build(ELT)
    with pytest.raises(UserError, match=r"TextKVCacheConfig would mix the loops .* allowed: FirstBlockCache"):
        model.enable_cache(TextKVCacheConfig())
    assert not model.is_cache_enabled


@pytest.mark.parametrize("name", ["pab", "faster"])
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # diffusers.hooks.faster_cache passes no indexing
def test_attention_cached_in_loops_is_attention_cached_in_as_many_blocks(name: str) -> None:
    """Over several steps, again after a reset, and with the cache seen to act."""
    models: list[Any] = [build(ELT), unrolled(build(ELT))]
    exact, acted = build(ELT), []
    for model in models:
        model.enable_cache(CACHES[name]())
    for _ in range(2):
        for step in range(5):
            CLOCK["timestep"] = 950 - 100 * step
            moved = inputs(ELT)["hidden_states"] * (1 + 0.3 * step)
            looped, deep = (output(model, ELT, hidden_states=moved) for model in models)
            assert torch.equal(looped, deep)
            acted.append(not torch.allclose(looped, output(exact, ELT, hidden_states=moved), atol=1e-5))
        for model in models:
            model._reset_stateful_cache()
    assert acted[:5] == acted[5:] and any(acted) and not acted[0]
    copy.deepcopy(models[0]).disable_cache()


def test_loops_do_not_share_a_cache() -> None:
    """With a threshold of 0 nothing is skipped; a state shared by the loops would skip in the first step already."""
    model = build(ELT)
    expected = output(model, ELT)
    model.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    with model.cache_context("cond"):
        assert torch.equal(output(model, ELT), expected)
        assert torch.allclose(output(model, ELT), expected, atol=1e-5)  # same input: what is skipped changed nothing
