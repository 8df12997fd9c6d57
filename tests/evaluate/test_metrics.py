"""Scores against independent references."""

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import inputs, opened

import elit
from elit.data.digits import CAPTIONS, digits, moving_digits
from elit.data.images import ImageSet
from elit.evaluate.attention import read_attention
from elit.evaluate.features import ClipDetector, ImageDetector, centred, train_digit_classifier
from elit.evaluate.metrics import frechet_distance
from elit.evaluate.run import score_dial
from elit.evaluate.statistics import Moments
from elit.models.transformer import Transformer


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


def untrained(name: str, sample_size, **settings) -> Transformer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 1, "depth": 3, "split": (1, 1, 1), "in_channels": 1}
    return elit.create_model(name, sample_size=sample_size, **sizes, **settings).eval()


@pytest.fixture(scope="module")
def classifier():
    return train_digit_classifier(digits(), epochs=2).model


def test_scores_of_a_dial(classifier):
    model = untrained("ELIT-DiT-S/1", 8, num_classes=10, window=(4, 4))
    guidance = (None, elit.CCFG(2.0, 1))
    scores = score_dial(
        model,
        ImageDetector(classifier),
        digits().images,
        conditions=torch.arange(10),
        budgets=(16, 4),
        guidance=guidance,
        count=20,
        steps=2,
    )
    assert [(s.budget, s.tokens_per_group, s.guidance) for s in scores] == [
        *((1.0, 16, "none"), (1.0, 16, "ccfg"), (0.25, 4, "none"), (0.25, 4, "ccfg"))
    ]
    assert scores[0].gflops_per_image == pytest.approx(2 * elit.count_flops(model) / 1e9)
    assert all(score.fd > 0 and 0 <= score.accuracy <= 1 and score.ms_per_image > 0 for score in scores)
    assert all(score.steady is None for score in scores)


def test_scores_of_prompts_and_of_clips(classifier):
    """A network that gives back real digits, in the order of the classes, is right every time."""
    clips = moving_digits(frames=3, clips_per_digit=1)
    one_of_each = torch.stack([(clips.labels == label).nonzero()[0, 0] for label in range(10)])
    model = untrained("ELIT-DiT-S/2-Video", clips.shape[1:], num_classes=10, window=(3, 2, 3))
    detector = ClipDetector(train_digit_classifier(centred_digits()).model)
    real = detector(clips.images)
    assert (real.label == clips.labels).float().mean() > 0.98
    assert real.steady.float().mean() > 0.99
    settings = {"conditions": torch.arange(10), "budgets": (12,), "guidance": (None,), "count": 20, "steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elit.evaluate.run.sample", lambda model, y, **_: clips.images[one_of_each[y]])
        (right,) = score_dial(model, detector, clips.images, **settings)
        shuffled = clips.images[one_of_each].clone()
        shuffled[:, :, 2] = shuffled.roll(1, 0)[:, :, 2]  # another digit in the last frame
        patch.setattr("elit.evaluate.run.sample", lambda model, y, **_: shuffled[y])
        (wrong,) = score_dial(model, detector, clips.images, **settings)
    assert (right.accuracy, right.steady) == (1.0, 1.0)
    assert wrong.steady < 0.2

    text = untrained("ELIT-MM-DiT-S/1", 8, text_features=16, pooled_features=16, window=(4, 4))
    prompts = text.conditions(CAPTIONS)
    scores = score_dial(text, ImageDetector(classifier), digits().images, **settings | {"conditions": prompts})
    assert scores[0].gflops_per_image == pytest.approx(elit.count_flops(text, budget=12) / 1e9)


def centred_digits() -> ImageSet:
    still = digits()
    return ImageSet(centred(still.images), still.labels, still.classes)


def test_centring_finds_the_digit_wherever_it_lies():
    still = digits().images[:50]
    alone = centred(still)
    for top, left in ((0, 0), (3, 7), (8, 2)):
        canvas = torch.full((50, 1, 16, 18), -1.0)
        canvas[:, :, top : top + 8, left : left + 8] = still
        assert torch.equal(centred(canvas), alone)


@pytest.mark.parametrize("kind", ["elit-dit", "elit-uvit", "elit-hdit", "elit-mmdit"])
def test_read_attention_sums_to_one_in_every_window_and_leaves_no_hook(kind):
    model = opened(kind)
    x, t, y = inputs(model)
    maps = read_attention(model, x, t, y, 8)
    assert maps.shape == (3, 8, 8, 8)
    sums = maps.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2))
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert not model.latent_interface.reader._forward_pre_hooks
    with pytest.raises(ValueError, match="a baseline has no Read"):
        read_attention(opened("dit"), x, t, y)
