"""Scores against independent references."""

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import inputs, opened

import elit
from elit.data.digits import digits
from elit.evaluate.attention import read_attention
from elit.evaluate.features import train_digit_classifier
from elit.evaluate.metrics import frechet_distance
from elit.evaluate.run import score_dial
from elit.evaluate.statistics import Moments


def test_moments_equal_numpys_however_they_arrive():
    x = 100 + torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    moments = Moments(6)
    for part in x.split(77):
        moments.add(part)
    assert np.allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-12)
    assert np.allclose(moments.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-6)
    with pytest.raises(ValueError, match="give at least 2"):
        _ = Moments(3).add(torch.zeros(1, 3)).covariance


@pytest.mark.parametrize("samples", [500, 5])  # 5 samples of 12 features: singular covariances
def test_frechet_distance_against_scipy(samples):
    generator = torch.Generator().manual_seed(0)
    a, b = (Moments(12).add(torch.randn(samples, 12, generator=generator) * (1 + i) + i) for i in (0, 1))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    ours = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert ours == pytest.approx(float(expected), rel=1e-6 if samples > 12 else 1e-4)


def test_frechet_distance_of_equal_and_of_moved_statistics():
    moments = Moments(4).add(torch.randn(50, 4))
    same = (moments.mean, moments.covariance)
    assert frechet_distance(*same, *same) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(*same, moments.mean + 2, moments.covariance) == pytest.approx(16)


def test_the_digit_classifier_is_good_and_repeatable():
    first, second = train_digit_classifier(digits()), train_digit_classifier(digits())
    assert first.accuracy >= 0.97
    assert first.held_out == 359
    assert first.accuracy == second.accuracy
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


def test_scores_of_a_dial():
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_heads": 1, "depth": 3, "split": (1, 1, 1), "window": (4, 4)}
    model = elit.create_model("ELIT-DiT-S/1", sample_size=8, in_channels=1, num_classes=10, **settings).eval()
    classifier = train_digit_classifier(digits(), epochs=1).model
    guidance = (None, elit.CCFG(2.0, 1))
    scores = score_dial(model, classifier, digits().images, budgets=(16, 4), guidance=guidance, count=20, steps=2)
    assert [(s.budget, s.tokens_per_group, s.guidance) for s in scores] == [
        *((1.0, 16, "none"), (1.0, 16, "ccfg"), (0.25, 4, "none"), (0.25, 4, "ccfg"))
    ]
    assert scores[0].gflops_per_image == pytest.approx(2 * elit.count_flops(model) / 1e9)
    assert all(score.fd > 0 and 0 <= score.accuracy <= 1 and score.ms_per_image > 0 for score in scores)


def test_read_attention_sums_to_one_in_every_window_and_leaves_no_hook():
    model = opened("elit-dit")
    x, t, y = inputs(model)
    maps = read_attention(model, x, t, y, 5)
    assert maps.shape == (3, 5, 8, 8)
    sums = maps.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2))
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert not model.latent_interface.reader._forward_pre_hooks
    with pytest.raises(ValueError, match="a baseline has no Read"):
        read_attention(opened("dit"), x, t, y)
