"""Scores against independent references."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from elit.data.builtin import digits, moving_digits
from elit.data.images import ImageSet
from elit.evaluate.detectors import ClipDetector, centred, train_digit_classifier
from elit.evaluate.metrics import frechet_distance, inception_score, kernel_distance, manifold_share, moments


def test_moments_equal_numpys_however_they_arrive():
    x = 100 + torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    mean, covariance = moments(x.split(77))
    assert np.allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    assert np.allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-6)


def features(count: int, seed: int, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return (mixed * (1 + seed) + seed).double()


def ours(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(*moments([a]), *moments([b]))


def test_frechet_distance_against_scipy_and_torchmetrics():
    a, b = features(500, 1), features(400, 2)
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    by_scipy = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(covariances[0] + covariances[1] - 2 * root)
    by_torchmetrics = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert ours(a, b) == pytest.approx(by_scipy, rel=1e-6)
    assert ours(a, b) == pytest.approx(float(by_torchmetrics), rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [(5, 5), (5, 40), (12, 13), (2, 2), (50, 60)])
def test_frechet_distance_of_singular_covariances(first, second):
    a, b = features(first, 1), features(second, 2)
    a[:, 3] = b[:, 3] = 7
    a[:, 4] = a[:, 5]
    # With centred samples x and y, the trace of the root is the sum of the singular values of x·yᵀ.
    (x, y), means = (each - each.mean(0) for each in (a, b)), (a.mean(0) - b.mean(0)).square().sum()
    x, y = x / (first - 1) ** 0.5, y / (second - 1) ** 0.5
    expected = means + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert ours(a, b) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("counts", [(60, 60), (5, 8)])
def test_kernel_distance_against_torchmetrics(counts):
    real, made = features(counts[0], 0), features(counts[1], 1) / 3
    size = min(counts)
    mean, spread = kernel_distance(real[:size], made[:size], subsets=3)
    assert mean == pytest.approx(float(poly_mmd(real[:size], made[:size])), rel=1e-6)
    assert spread <= 1e-9 * mean  # each subset is all of them
    generator, expected = torch.Generator().manual_seed(4), []
    for _ in range(7):
        x, y = (values[torch.randperm(len(values), generator=generator)[:4]] for values in (real, made))
        expected.append(float(poly_mmd(x, y)))
    mean, spread = kernel_distance(real, made, subsets=7, subset_size=4, seed=4)
    assert (mean, spread) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-6)


@pytest.mark.parametrize(("count", "splits"), [(50, 1), (53, 5), (4, 10)])
def test_inception_score_against_torchmetrics(count, splits, monkeypatch):
    logits = features(count, 0)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: order)
    theirs = InceptionScore(feature=torch.nn.Identity(), splits=splits)
    theirs.update(logits)
    mean, spread = theirs.compute()
    parts = len(logits.chunk(splits))
    assert inception_score(logits, splits=splits)[0] == pytest.approx(float(mean), rel=1e-6)
    if parts > 1:  # torchmetrics divides by one less
        expected = float(spread) * ((parts - 1) / parts) ** 0.5
        assert inception_score(logits, splits=splits)[1] == pytest.approx(expected, rel=1e-6)


def share_inside(points: np.ndarray, others: np.ndarray, neighbours: int) -> float:
    radii = [sorted(np.linalg.norm(x - y) for y in others)[neighbours] for x in others]
    inside = [any(np.linalg.norm(p - x) <= radius for x, radius in zip(others, radii, strict=True)) for p in points]
    return float(np.mean(inside))


@pytest.mark.parametrize(("count", "width"), [((60, 50), 3), ((9, 7), 12)])
def test_precision_and_recall_against_a_loop(count, width, monkeypatch):
    monkeypatch.setattr("elit.evaluate.metrics.BLOCK", 16)
    real, made = features(count[0], 0, width) + 100, features(count[1], 0, width)[: count[1]] * 1.3 + 100.5
    made[:3] = real[:3]  # a sample that is a real picture lies on the manifold, however tight
    for neighbours in (1, 3):
        expected = (
            share_inside(made.numpy(), real.numpy(), neighbours),
            share_inside(real.numpy(), made.numpy(), neighbours),
        )
        assert 0 < expected[0] <= 1
        shares = [manifold_share(*pair, neighbours=neighbours) for pair in ((made, real), (real, made))]
        assert shares == pytest.approx(expected, rel=1e-6)
    copies = real[:1].expand(9, width) + 1e3
    assert manifold_share(copies, copies) == 1
    assert manifold_share(copies, real) == 0
    with pytest.raises(ValueError, match="cannot find 3 neighbours among 3 samples"):
        manifold_share(made, real[:3])


@pytest.mark.slow
def test_the_digit_classifier_is_good_and_repeatable(digit_classifiers):
    trained = digit_classifiers(digits())
    assert trained.accuracy >= 0.97
    assert trained.held_out == 359
    first, second = train_digit_classifier(digits(), epochs=1), train_digit_classifier(digits(), epochs=1)
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


@pytest.mark.slow
def test_clips_are_recognised_by_their_frames():
    clips = moving_digits(frames=3, clips_per_digit=1)
    still = digits()
    still = ImageSet(centred(still.images), still.labels, still.classes)
    detector = ClipDetector(train_digit_classifier(still).model)
    real = detector(clips.images)
    assert (real.label == clips.labels).float().mean() > 0.98
    assert real.steady.float().mean() > 0.99
    one_of_each = torch.stack([(clips.labels == label).nonzero()[0, 0] for label in range(10)])
    changed = clips.images[one_of_each].clone()
    changed[:, :, 2] = changed.roll(1, 0)[:, :, 2]  # another digit in the last frame
    assert detector(changed).steady.float().mean() < 0.2
