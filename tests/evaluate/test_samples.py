"""Sample sets: the same to the bit for any batch size, number of processes, and after kills; and their scores."""

import contextlib
import io
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command, run_two
from conftest import opened, small_vae
from scored import save_dino, save_noise, small_network

import elit
from elit import Sampling
from elit.cli.main import main
from elit.evaluate import EvaluationWarning
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import open_detector
from elit.evaluate.metrics import frechet_distance, moments
from elit.evaluate.pictures import as_samples, open_pictures
from elit.evaluate.reference import open_reference
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup, score
from elit.models.saved import save_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]

COUNT = 90


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(small_network(), folder)
    save_dino(folder.parent / "dino")
    save_noise(folder.parent / "real.npz", 40, 8, 8)
    return folder


def command(model: Path, out: Path, *options: object) -> list[str]:
    detector = ("--detector", f"dinov2:{model.parent / 'dino'}", "--reference", model.parent / "real.npz")
    metrics = ("--metrics", "fdd", "kid", "precision", "recall", "--count", COUNT, "--chunk", 4)
    second = ("--steps", 6, "--guidance", "ccfg", "--scale", "2", "--budget", "0.5")
    return list(map(str, ("evaluate", model, "--out", out, "--json", *detector, *metrics, *second, *options)))


@pytest.mark.parametrize(
    ("names", "labels", "shown"),
    [(("3", "7"), None, [3, 7]), (("3", "7"), ["7"], [7]), (("3", "b"), ["b", "3"], [1, 0]), (("10", "3"), ["3"], [3])],
)
def test_samples_of_classes_named_by_numbers_show_these(tmp_path, names, labels, shown):
    network = small_network(num_classes=2, class_names=names)
    conditions = None if labels is None else network.conditioning.prepare(labels)
    sampler = Sampler(network, Work(out=tmp_path, chunk=4), conditions=conditions)
    assert sampler.planned(Sampling(steps=1), 3).labels.tolist() == (shown * 3)[:3]


def result(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


@pytest.fixture(scope="module")
def batches_of_64(model, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("evaluate") / "out", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(command(model, out, "--batch-size", 64)) == 0
    return result(said.getvalue())


def same(ours: dict, theirs: dict) -> None:
    assert ours["set_sha256"] == theirs["set_sha256"]
    for detector, scores in theirs["scores"].items():
        assert ours["scores"][detector] == pytest.approx(scores, rel=1e-9, abs=0)
        assert Path(ours["files"][detector]).name == Path(theirs["files"][detector]).name


def test_two_processes(model, batches_of_64, tmp_path):
    runs = run_two(command(model, tmp_path / "out", "--batch-size", 16), tmp_path)
    same(result(runs[0].out), batches_of_64)
    assert sum(run.out.count('"set_sha256"') for run in runs) == 1


def test_killed_and_run_again(model, batches_of_64, capsys, tmp_path):
    run = Command(command(model, tmp_path, "--batch-size", 4), tmp_path / "said", threads=torch.get_num_threads())
    run.wait_until(lambda: len(list(tmp_path.glob("sets/*/pictures/*.safetensors"))) >= 3)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sets/*/pictures/[0-9]*.safetensors")}
    assert 3 <= len(kept) < 23
    assert main(command(model, tmp_path, "--batch-size", 64)) == 0  # other batches: what is there is kept all the same
    same(result(capsys.readouterr().out), batches_of_64)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_the_set_is_what_sampling_gives_and_the_score_what_its_parts_give(model, tmp_path):
    network = elit.load_model(model)
    setting = Sampling(steps=3, budget=4, guidance=elit.CFG(1.5), seed=5)
    work, detector = Work(out=tmp_path, chunk=8), open_detector("digits")
    sampler = Sampler(network, work)
    made = sampler.make(setting, 20)
    plain = elit.sample(network, [i % 10 for i in range(20)], steps=3, budget=4, guidance=elit.CFG(1.5), seed=5)
    expected = ((plain.clamp(-1, 1) + 1) * 127.5).round()
    assert (made.read(0, 20).float() - expected).abs().max() <= 1  # rounding in a batch of 20
    assert made.gflops == pytest.approx(6 * elit.count_flops(network, budget=4) / 1e9)
    real = open_pictures(Path("digits"))
    reference = open_reference(Path("digits"), detector, work)
    with pytest.warns(EvaluationWarning, match="20 samples for 64 features"):
        found = score(made, MetricGroup("digits", detector, reference, ("fd",)), work)
    a, b = (moments([detector(as_samples(p.read(0, p.count))).features]) for p in (real, made))
    by_hand = frechet_distance(*a, *b)
    assert found.scores["fd"] == pytest.approx(by_hand, rel=1e-4)
    assert found.set_sha256 == made.chunks.digest
    sampler.make(setting, 30)  # goes on from the 24 that are there
    assert len(list(tmp_path.glob("sets/*/pictures/*"))) == 2


def test_a_sample_shows_the_class_of_its_label_or_of_its_prompts_number():
    network = opened("elit-mmdit", in_channels=1)
    characters = network.conditioning.prepare(["one", "two", "three"])
    for conditions, labels in ((characters, [0, 1, 2, 0, 1]), (torch.tensor([4, 2]), [4, 2, 4, 2, 4])):
        drawn = Sampler(network, Work(out=Path()), conditions=conditions).planned(Sampling(), 5)
        assert drawn.labels.tolist() == labels


def test_two_recipes_never_share_a_file(model, tmp_path):
    network, detector = elit.load_model(model), open_detector("digits")
    work, group = Work(out=tmp_path, chunk=8), MetricGroup("digits", detector, None, ("is",))
    sampler = Sampler(network, work)
    guided = elit.CFG(2.0), elit.AG(2.0, 1), elit.CCFG(2.0, 1), elit.CFG(2.0, interval=(0.0, 0.5))
    changes = [{}, {"steps": 3}, {"seed": 1}, {"shift": 2.0}, {"solver": "heun"}, {"budget": 8}]
    changes += [{"budget": "8@0-0.5,16@0.5-1"}, *({"guidance": guidance} for guidance in guided)]
    settings = [replace(Sampling(steps=2), **change) for change in changes]
    results = [score(sampler.make(setting, 8), group, work) for setting in settings]
    assert len({result.recipe_sha256 for result in results}) == len(settings)
    assert len(list(tmp_path.glob("scores/*.json"))) == len(settings)
    for setting, same in ((Sampling(steps=2, budget=0.5), 5), (Sampling(steps=2, guidance=elit.CFG(1.0)), 0)):
        again = score(sampler.make(setting, 8), group, work)
        assert again.recipe_sha256 == results[same].recipe_sha256  # the same recipe, written in another way
    with torch.no_grad():
        next(network.parameters()).add_(1)
    other = Sampler(network, work).recipe(settings[0])
    assert other["model"]["weights"] != results[0].recipe["samples"]["model"]["weights"]


def test_samples_of_latents_are_decoded_and_written_as_adm_reads_them(capsys, tmp_path):
    save_model(opened("elit-dit"), tmp_path / "model")
    small_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    save_dino(tmp_path / "dino")
    save_noise(tmp_path / "real.npz", 9, 32, 32)
    line = ["evaluate", str(tmp_path / "model"), "--count", "8", "--steps", "1", "--chunk", "4"]
    line += ["--detector", f"dinov2:{tmp_path / 'dino'}", "--reference", str(tmp_path / "real.npz")]
    assert main([*line, "--out", str(tmp_path / "samples.npz")]) == 2
    assert "elit evaluate: cannot make pictures of samples of 4 channels: give vae" in capsys.readouterr().err
    assert main([*line, "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "samples.npz")]) == 0
    arrays = np.load(tmp_path / "samples.npz")
    assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((8, 32, 32, 3), np.uint8)
    assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    (stored,) = (tmp_path / "samples").glob("scores/*.json")
    assert json.loads(stored.read_text())["recipe"]["samples"]["autoencoder"]["scaling_factor"] == 0.5
    again = open_pictures(tmp_path / "samples.npz")
    assert torch.equal(again.read(2, 5), torch.from_numpy(arrays["arr_0"][2:5]).permute(0, 3, 1, 2))


def test_a_missing_or_damaged_file_is_named(model, tmp_path):
    made = Sampler(elit.load_model(model), Work(out=tmp_path, chunk=4, batch_size=4)).make(Sampling(steps=1), 8)
    _, second = sorted(made.chunks.folder.iterdir())
    second.write_bytes(second.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        made.read(0, 8)
    second.unlink()
    with pytest.raises(ValueError, match="rows from 4 are missing; run it again"):
        made.read(0, 8)
    assert made.read(0, 4).shape == (4, 1, 8, 8)
