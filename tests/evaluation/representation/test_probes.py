from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

from repagen.errors import UserError
from repagen.evaluation.representation import inputs
from repagen.evaluation.representation.fitting import WEIGHT_DECAY, fit_full_batch
from repagen.evaluation.representation.probes import (
    AttentivePooling,
    ProbeResult,
    attentive_probe,
    knn_probe,
    linear_probe,
)

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def overlapping_classes(count: int = 600, dim: int = 24, num_classes: int = 5, spread: float = 1.0) -> Split:
    """Gaussian classes that overlap, with channels of very different scale and offset; two thirds for training."""
    centres = torch.randn(num_classes, dim) * 0.5
    labels = torch.randint(num_classes, (count,))
    features = (centres[labels] + spread * torch.randn(count, dim)) * torch.logspace(-2, 3, dim) + 50
    known = 2 * count // 3
    return features[:known], labels[:known], features[known:], labels[known:]


def hidden_token_classes(count: int = 500, tokens: int = 16, dim: int = 16) -> Split:
    """One token of each image, anywhere, carries the class; the others are noise that sums to its opposite."""
    labels = torch.randint(4, (count,))
    features = torch.randn(count, tokens, dim)
    places = torch.randint(tokens, (count,))
    marks = torch.zeros(count, dim)
    marks[torch.arange(count), labels] = 4
    marks[:, 8] = 6  # what marks the token that matters
    features[torch.arange(count), places] = marks
    features -= features.mean(dim=1, keepdim=True)  # the mean over tokens knows nothing
    known = 3 * count // 4
    return features[:known], labels[:known], features[known:], labels[known:]


def test_standardisation_is_the_batch_norm_of_mae() -> None:
    train, test = torch.randn(50, 6) * 3 + 1, torch.randn(20, 6)
    norm = nn.BatchNorm1d(6, affine=False, eps=1e-6)
    ours, other = inputs.standardised(train.double(), test.double())
    torch.testing.assert_close(ours.float(), norm(train), atol=1e-5, rtol=1e-5)
    expected = (test - train.mean(0)) / (train.var(0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(other.float(), expected, atol=1e-5, rtol=1e-5)
    tokens = torch.randn(5, 4, 6).double()
    torch.testing.assert_close(
        inputs.standardised(tokens)[0], inputs.standardised(tokens.flatten(0, 1))[0].view(5, 4, 6)
    )


def test_the_linear_probe_is_sklearns_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, train_labels, test, test_labels = overlapping_classes(spread=1.3)
    known, unseen = inputs.standardised(train.double(), test.double())
    theirs = linear_model.LogisticRegression(C=1 / (WEIGHT_DECAY * len(train)), max_iter=5000, tol=1e-8)
    theirs.fit(known.numpy(), train_labels.numpy())
    ours = linear_probe(train, train_labels, test, test_labels, epochs=300)
    assert ours == ProbeResult(theirs.score(unseen.numpy(), test_labels.numpy()), 400, 200)
    assert 0.4 < ours.accuracy < 0.95  # classes overlap, so that a wrong classifier would differ


def test_many_features_are_fitted_until_the_gradient_is_gone() -> None:
    """As many features as an encoder has: 100 iterations are not enough, and the result says so."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = torch.randn(700, 256) @ (torch.logspace(0, -3, 256)[:, None] * torch.randn(256, 256))
    labels = (features[:, :4] / features[:, :4].std(0) + torch.randn(700, 4)).argmax(1)
    split = features[:400], labels[:400], features[400:], labels[400:]
    assert not linear_probe(*split, epochs=30).converged
    ours = linear_probe(*split)
    known, unseen = inputs.standardised(split[0].double(), split[2].double())
    theirs = linear_model.LogisticRegression(C=1 / (WEIGHT_DECAY * 400), max_iter=20_000, tol=1e-9)
    theirs.fit(known.numpy(), split[1].numpy())
    assert ours == ProbeResult(theirs.score(unseen.numpy(), split[3].numpy()), 400, 300, converged=True)


def test_the_full_batch_fit_reaches_the_solution_of_a_closed_form() -> None:
    """Least squares with the weights' decay and a free bias: ridge regression."""
    x, y = torch.randn(80, 5).double(), torch.randn(80, 2).double()
    layer = nn.Linear(5, 2, dtype=torch.float64)
    assert fit_full_batch([layer], lambda: (layer(x) - y).square().sum(dim=1).mean(), 100)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = torch.linalg.solve(a.T @ a * 2 / 80 + WEIGHT_DECAY * torch.eye(5), a.T @ b * 2 / 80).T
    torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-6, rtol=0)


def test_the_linear_probe_does_not_depend_on_its_seed() -> None:
    split = overlapping_classes(spread=1.3)
    assert len({linear_probe(*split, seed=seed, epochs=300).accuracy for seed in range(3)}) == 1


def test_the_scale_of_a_channel_does_not_count() -> None:
    train, train_labels, test, test_labels = overlapping_classes()
    scale = torch.logspace(2, -2, train.shape[1])
    for probe in (linear_probe, knn_probe):
        scaled = probe(train * scale, train_labels, test * scale, test_labels)
        assert scaled.accuracy == pytest.approx(probe(train, train_labels, test, test_labels).accuracy, abs=0.011)


def test_the_knn_probe_is_sklearns_with_dinos_weights() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, train_labels, test, test_labels = overlapping_classes(spread=1.3)
    known, unseen = (part.numpy() for part in inputs.standardised(train.double(), test.double()))
    for k, temperature in ((1, 0.07), (20, 0.07), (50, 0.5)):
        theirs = neighbors.KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance, t=temperature: torch.exp(torch.tensor((1 - distance) / t)).numpy(),
        ).fit(known, train_labels.numpy())
        ours = knn_probe(train, train_labels, test, test_labels, neighbours=k, temperature=temperature)
        assert ours.accuracy == pytest.approx(theirs.score(unseen, test_labels.numpy()), abs=1e-12)
        assert 0.4 < ours.accuracy < 0.95


def test_a_close_neighbour_outvotes_two_far_ones_at_low_temperature_only() -> None:
    angles = torch.tensor([0.0, 0.9, -0.9, 1.6])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    centred = train / train.std(dim=0, correction=0)  # standardisation moves the origin: make it do nothing
    balanced, labels = torch.cat([centred, -centred]), torch.tensor([0, 1, 1, 2, 3, 3, 3, 3])
    test = balanced[:1]
    sharp = knn_probe(balanced, labels, test, torch.tensor([0]), neighbours=3, temperature=0.05)
    blunt = knn_probe(balanced, labels, test, torch.tensor([1]), neighbours=3, temperature=5)
    assert (sharp.accuracy, blunt.accuracy) == (1, 1)
    icy = knn_probe(balanced, labels, test, torch.tensor([0]), neighbours=3, temperature=1e-4)
    assert icy.accuracy == 1  # exp(1 / temperature) alone would overflow


def test_blocks_do_not_change_the_knn_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    split = overlapping_classes()
    whole = knn_probe(*split)
    monkeypatch.setattr("repagen.evaluation.representation.probes._ROWS", 7)
    assert knn_probe(*split) == whole


def test_attentive_pooling_is_multi_head_attention_of_one_query() -> None:
    dim, heads = 12, 3
    theirs, ours = nn.MultiheadAttention(dim, heads, batch_first=True), AttentivePooling(dim, heads)
    query, tokens = torch.randn(1, 1, dim), torch.randn(4, 7, dim)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    weight_q, weight_k, weight_v = theirs.in_proj_weight.chunk(3)
    bias_q, _, bias_v = theirs.in_proj_bias.chunk(3)
    projected = (query[0] @ weight_q.T + bias_q).view(heads, 1, dim // heads)
    with torch.no_grad():
        ours.queries.copy_((projected @ weight_k.view(heads, dim // heads, dim))[:, 0] / (dim // heads) ** 0.5)
        ours.value.weight.copy_(weight_v)
        ours.value.bias.copy_(bias_v)
        ours.out.load_state_dict(theirs.out_proj.state_dict())
        expected = theirs(query.expand(4, 1, dim), tokens, tokens, need_weights=False)[0][:, 0]
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=1e-4)


def test_attention_finds_what_the_mean_over_tokens_hides() -> None:
    train, train_labels, test, test_labels = hidden_token_classes()
    mean = linear_probe(train.mean(1), train_labels, test.mean(1), test_labels)
    attentive = attentive_probe(train, train_labels, test, test_labels)
    assert mean.accuracy < 0.45
    assert attentive.accuracy > 0.9
    assert (attentive.num_train, attentive.num_test) == (375, 125)


def test_the_attentive_probe_is_a_function_of_its_seed() -> None:
    split = hidden_token_classes(120, tokens=4, dim=12)
    torch.manual_seed(5)
    first = attentive_probe(*split, epochs=3)
    torch.manual_seed(6)
    assert attentive_probe(*split, epochs=3) == first
    torch.manual_seed(5)
    attentive_probe(*split, epochs=1, seed=9)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())  # the global stream was not used


def test_labels_may_be_any_integers() -> None:
    train, train_labels, test, test_labels = overlapping_classes()
    names = torch.tensor([-7, 3, 1000, 20, 21], dtype=torch.int32)
    renamed = names[train_labels], names[test_labels]
    for probe in (linear_probe, knn_probe):
        expected = probe(train, train_labels, test, test_labels)
        assert probe(train, renamed[0], test, renamed[1]).accuracy == pytest.approx(expected.accuracy, abs=0.011)


def test_features_without_class_are_at_chance() -> None:
    train, test, labels = torch.randn(400, 10), torch.randn(400, 10), torch.arange(400) % 4
    for probe in (linear_probe, knn_probe):
        assert 0.15 < probe(train, labels, test, labels).accuracy < 0.35


def test_probes_run_without_gradients_being_recorded() -> None:
    split = overlapping_classes(90)
    tokens = split[0][:, None].expand(-1, 2, -1), split[1], split[2][:, None].expand(-1, 2, -1), split[3]
    with torch.no_grad():
        assert linear_probe(*split) is not None
        assert attentive_probe(*tokens, epochs=1) is not None
    with torch.inference_mode():
        features = [part.clone() for part in split]
    assert linear_probe(*features) == linear_probe(*split)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe, attentive_probe])
def test_user_mistakes_are_refused(probe: Callable[..., ProbeResult]) -> None:
    axes = (5, 8) if probe is attentive_probe else (8,)
    train, test = torch.randn(40, *axes), torch.randn(10, *axes)
    labels, test_labels = torch.arange(40) % 4, torch.arange(10) % 4
    with pytest.raises(UserError, match=r"at least 2 classes in training, got only label \[3\]"):
        probe(train, torch.full((40,), 3), test, test_labels)
    with pytest.raises(UserError, match=r"test labels \[4, 7\] do not occur in training"):
        probe(train, labels, test, torch.tensor([0, 1, 7, 4, 7, 0, 0, 0, 0, 0]))
    with pytest.raises(UserError, match="take both from the same layer"):
        probe(train, labels, test[..., :7], test_labels)
    with pytest.raises(UserError, match="test set of a probe holds no samples"):
        probe(train, labels, test[:0], test_labels[:0])
    with pytest.raises(UserError, match="training labels must be one integer for each of the 40 samples"):
        probe(train, labels[:39], test, test_labels)
    with pytest.raises(UserError, match=r"test labels must be one integer .* got torch.float32"):
        probe(train, labels, test, test_labels.float())
    with pytest.raises(UserError, match="test features must be"):
        probe(train, labels, test[0], test_labels)
    broken = test.clone()
    broken[6].view(-1)[0] = torch.nan
    with pytest.raises(UserError, match="test features of sample 6 are not finite"):
        probe(train, labels, broken, test_labels)
    if "epochs" in inspect.signature(probe).parameters:
        with pytest.raises(UserError, match="epochs: must be above 0, got 0"):
            probe(train, labels, test, test_labels, epochs=0)


def test_options_out_of_range_are_refused() -> None:
    split = overlapping_classes(60)
    with pytest.raises(UserError, match="from 1 to the 40 training samples, got 41"):
        knn_probe(*split, neighbours=41)
    with pytest.raises(UserError, match="temperature: must be above 0"):
        knn_probe(*split, temperature=0)
    tokens = split[0][:, None], split[1], split[2][:, None], split[3]
    with pytest.raises(UserError, match="num_heads: must divide the 24 features, got 5"):
        attentive_probe(*tokens, num_heads=5)
