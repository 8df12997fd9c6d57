"""Detectors with random weights against the networks called by hand; Read's attention against the forward."""

import copy
import json

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import ELIT, conditions, fresh, opened
from PIL import Image
from scored import save_dino
from transformers import Dinov2Model, ResNetConfig, ResNetForImageClassification

from elit.cli.main import main
from elit.evaluate.detectors import open_detector, resized
from elit.evaluate.inspect.attention import Probe, losses, rank_correlation, read_attention, read_maps
from elit.evaluate.pictures import as_samples
from elit.flow.path import flow_matching_loss, interpolate
from elit.models.layers import patchify
from elit.sampling.engine import seeded_noise
from elit.sampling.pictures import to_uint8

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def noise(count: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save_pictures(pictures: torch.Tensor, folder) -> None:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")


def frechet_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def evaluate(capsys, *arguments) -> dict:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_fdd_from_two_folders_of_pictures(capsys, tmp_path):
    dino = tmp_path / "dinov2"
    save_dino(dino)
    real, made = noise(20, 224, 224), noise(20, 224, 224, seed=1) // 2
    for name, pictures in (("real", real), ("made", made)):
        save_pictures(pictures, tmp_path / name)
    network = Dinov2Model.from_pretrained(dino).eval()
    features = []
    for pictures in (real, made):
        x = (pictures.permute(0, 2, 3, 1).double().numpy() / 255 - MEAN) / STD
        with torch.no_grad():
            tokens = network(torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)).last_hidden_state
        features.append(tokens[:, 0].double().numpy())
    options = ("--detector", f"dinov2:{dino}", "--out", tmp_path / "out", "--chunk", 8)
    result = evaluate(capsys, tmp_path / "made", "--reference", tmp_path / "real", *options)
    (scores,) = result["scores"].values()
    assert scores["fdd"] == pytest.approx(frechet_by_scipy(*features), rel=1e-4)


def test_dinov2_resizes_as_pil_does():
    pictures = noise(2, 40, 300)
    ours = ((resized(as_samples(pictures), 224) + 1) * 127.5).numpy()
    for channel, found in zip(pictures.flatten(0, 1).float().numpy(), ours.reshape(-1, 224, 224), strict=True):
        image = Image.fromarray(channel).resize((224, 224), Image.Resampling.BICUBIC)  # of floats: nothing is rounded
        assert np.abs(np.asarray(image).clip(0, 255) - found).max() <= 0.01


def test_accuracy_with_a_classifier_from_a_folder(capsys, tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=4)
    network = ResNetForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "classifier")
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "classifier" / "preprocessor_config.json").write_text(json.dumps(settings))
    pictures = noise(12, 32, 32) // torch.arange(1, 13)[:, None, None, None].to(torch.uint8)
    with torch.no_grad():
        seen = network(as_samples(pictures)).logits.argmax(1)
    labels = torch.where(torch.arange(12) < 9, seen, (seen + 1) % 4)  # 9 of 12 as it sees them
    np.savez(tmp_path / "set.npz", pictures.permute(0, 2, 3, 1).numpy(), labels.numpy())
    options = ("--detector", f"classifier:{tmp_path / 'classifier'}", "--out", tmp_path / "out")
    result = evaluate(capsys, tmp_path / "set.npz", *options)
    assert result["scores"] == {f"classifier:{tmp_path / 'classifier'}": {"accuracy": 0.75}}


class Clips(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 400)

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        if rescale:
            x = x / 127.5 - 1
        return self.linear(x.mean(dim=[3, 4]).std(dim=2)) if return_features else x


def test_fvd_from_clips_with_a_torchscript_file(capsys, tmp_path):
    torch.manual_seed(0)
    module = Clips()
    torch.jit.script(module).save(tmp_path / "i3d.pt")
    sets = [noise(10, 4, 8, 8, seed=i) // (1 + i) for i in range(2)]
    for name, clips in zip(("real", "made"), sets, strict=True):
        np.savez(tmp_path / f"{name}.npz", clips.permute(0, 2, 3, 4, 1).numpy())
    options = ("--detector", f"i3d:{tmp_path / 'i3d.pt'}", "--out", tmp_path / "out")
    result = evaluate(capsys, tmp_path / "made.npz", "--reference", tmp_path / "real.npz", *options)
    with torch.no_grad():
        features = [module(as_samples(clips), rescale=False, return_features=True).double().numpy() for clips in sets]
    (scores,) = result["scores"].values()
    assert scores["fvd"] == pytest.approx(frechet_by_scipy(*features), rel=1e-3)
    assert [note.split(":")[0] for note in result["notes"]] == [
        f"10 {what} for 400 features" for what in ("samples", "reference pictures")
    ]
    with pytest.raises(ValueError, match="detector i3d takes clips, got"):
        open_detector(f"i3d:{tmp_path / 'i3d.pt'}")(as_samples(noise(2, 8, 8)))


def test_the_pyramid_knows_colours_and_bands_and_scores_where_nothing_else_is_at_hand(capsys, tmp_path):
    """Closed forms; and of one's own pictures, without a detector's name, the worse ones score worse."""
    red, board = torch.full((1, 3, 64, 64), -1.0), torch.ones(64, 64)
    red[:, 0], board[::2, ::2], board[1::2, 1::2] = 1, -1, -1
    colours = open_detector("pyramid")(torch.cat((red, board.expand(1, 3, 64, 64)))).features.view(2, 4, 3, 16)
    expected = torch.zeros(2, 4, 3, 16)  # band, channel, field
    expected[0, 3, 0], expected[0, 3, 1:], expected[1, 0] = 1, -1, 8
    assert torch.allclose(colours, expected, atol=1e-5)
    smooth = resized(as_samples(noise(400, 8, 8)), 32)
    save_pictures(to_uint8(smooth[:200]), tmp_path / "real")
    scores = []
    for name, amount in (("same", 0), ("noisy", 0.3), ("worse", 0.6)):
        save_pictures(to_uint8(smooth[200:] + amount * as_samples(noise(200, 32, 32, seed=1))), tmp_path / name)
        found = evaluate(capsys, tmp_path / name, "--reference", tmp_path / "real", "--out", tmp_path / "out")["scores"]
        scores.append(found["pyramid"]["fd"])
    assert scores == sorted(scores)
    assert scores[1] > 1.2 * scores[0]


def test_without_torch_fidelity_one_line_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    options = ("--reference", "digits", "--detector", "inception", "--out", str(tmp_path / "out"))
    assert main(["evaluate", "digits", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("elit evaluate: cannot load detector inception: it needs torch-fidelity (the extra eval)")
    assert said.count("\n") == 1


@pytest.fixture(params=[kind for kind in ELIT if kind != "elit-sit"])  # the published SiT uses all its latents
def elit_model(request):
    return opened(request.param)


def probe_of(model, **settings):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, model.config.in_channels, *model.sample_size, generator=generator)
    return Probe(x=x, y=conditions(model, 3), **({"times": (0.3, 0.8), "draws": 2, "batch_size": 4} | settings))


def test_rank_correlation_is_scipys_with_ties_in_many_rows_and_nan_for_constants():
    a, b = torch.randint(0, 9, (2, 4, 5, 64), generator=torch.Generator().manual_seed(0))
    found = rank_correlation(a, b)
    assert found.shape == (4, 5)
    for row in range(4):
        expected = scipy.stats.spearmanr(a[row, 2], b[row, 2]).statistic
        assert found[row, 2].item() == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(a, a**3).allclose(torch.ones(4, 5, dtype=torch.float64))
    assert rank_correlation(torch.ones(4), torch.arange(4)).isnan()


def test_losses_are_those_of_training(any_model):
    probe = probe_of(any_model)
    found = losses(any_model, probe)
    for i, time in enumerate(probe.times):
        expected = torch.zeros(3)
        for draw in range(2):
            x0 = seeded_noise([3 * draw + b for b in range(3)], probe.x.shape[1:])
            t = torch.full((3,), time)
            with torch.no_grad():
                v = any_model(interpolate(x0, probe.x, t), t, probe.y)
            expected += flow_matching_loss(v, x0, probe.x) / 2
        assert torch.allclose(found[i].float(), expected, rtol=1e-5)


def test_maps_are_attention_and_token_losses(elit_model):
    probe = probe_of(elit_model, times=(0.4,), draws=1)
    found = read_maps(elit_model, probe)
    x0 = seeded_noise(range(3), probe.x.shape[1:])
    t = torch.full((3,), 0.4)
    maps = read_attention(elit_model, interpolate(x0, probe.x, t), t, probe.y)  # (B, J, *grid)
    size = probe.x.shape[2:]
    tokens = patchify(maps, (1,) * len(size), elit_model.windows(size, maps))  # (B, N, J)
    assert torch.allclose(found.latents.float(), tokens, atol=1e-6)
    assert torch.allclose(found.attention[0].float(), tokens.sum(2), atol=1e-5)
    kept, n = tokens.shape[2], found.tokens_per_group
    assert torch.allclose(found.attention[0].unflatten(1, (-1, n)).sum(2), torch.tensor(float(kept)).double())
    assert torch.allclose(found.loss.mean(2), losses(elit_model, probe), atol=1e-6)
    expected = scipy.stats.spearmanr(found.attention[0, 1], found.loss[0, 1]).statistic
    assert found.correlation()[0, 1].item() == pytest.approx(expected, abs=1e-9)
    each = [
        scipy.stats.spearmanr(a, b).statistic
        for a, b in zip(found.attention[0, 1].view(-1, n), found.loss[0, 1].view(-1, n), strict=True)
    ]
    assert not elit_model.latent_interface.reader._forward_pre_hooks
    assert found.correlation_in_windows()[0, 1].item() == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_a_velocity_that_is_not_finite_and_a_baseline_are_errors():
    broken = copy.deepcopy(opened("elit-dit"))
    with torch.no_grad():
        broken.latent_interface.latents[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"velocity at t = 0\.3 is not finite"):
        losses(broken, probe_of(broken))
    with pytest.raises(ValueError, match="cannot inspect a baseline, which has no Read"):
        read_maps(fresh("dit"), probe_of(fresh("dit")))
