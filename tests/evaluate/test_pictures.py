"""Pictures and references as they come: all kinds give the same, and what cannot be used is named in one line."""

import json
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from elit.cli.main import main
from elit.data.images import ImageFiles, centre_crop, inspect_pictures
from elit.data.reader import read_frames
from elit.data.source import open_source
from elit.evaluate import EvaluationWarning, detectors
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import Detection, open_detector
from elit.evaluate.pictures import open_pictures, write_npz
from elit.evaluate.reference import load_reference, open_reference, save_reference
from elit.evaluate.score import MetricGroup, score
from elit.sampling.pictures import save_frames, to_uint8

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for i, pixels in enumerate(PIXELS):
        path = root / "abc"[i // 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def test_a_folder_a_table_and_arrays_give_the_same_pictures(folder, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    files = list(map(str, sorted(folder.rglob("*.png"))))
    labels = [i // 3 for i in range(9)]
    pictures = datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)
    pictures.to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "plain.npz", PIXELS, np.array(labels))
    np.savez_compressed(tmp_path / "compressed.npz", PIXELS, np.array(labels))
    write_npz(open_pictures(folder), tmp_path / "ours.npz", chunk=4)
    for name in ("photos", "t.parquet", "plain.npz", "compressed.npz", "ours.npz"):
        pictures = open_pictures(tmp_path / name)
        assert pictures.count == 9
        assert np.array_equal(pictures.read(1, 8).permute(0, 2, 3, 1), PIXELS[1:8]), name
        assert pictures.labels.tolist() == labels, name
    Image.fromarray(PIXELS[8, :, :, 0]).save(folder / "c/8.png")  # grey
    assert np.array_equal(open_pictures(folder).read(8, 9)[0, 1], PIXELS[8, :, :, 0])
    Image.fromarray(PIXELS[8]).convert("RGBA").save(folder / "c/8.png")
    assert np.array_equal(open_pictures(folder).read(8, 9)[0].permute(1, 2, 0), PIXELS[8])
    cut = open_pictures(folder, 4).read(0, 1)[0]
    assert torch.equal(cut, to_uint8(centre_crop(Image.fromarray(PIXELS[0]), 4)))


def test_animations_are_clips(tmp_path):
    for i in range(2):
        frames = [Image.fromarray(PIXELS[3 * i + k, :, :, 0]).convert("RGB") for k in range(3)]
        save_frames(frames, tmp_path / "clips" / f"{i}.gif")
    clips = open_pictures(tmp_path / "clips")
    assert clips.read(0, 2).shape == (2, 3, 3, 8, 8)
    assert np.array_equal(clips.read(0, 2)[1, 0], PIXELS[3:6, :, :, 0])
    assert clips.labels is None
    # One still picture makes all stills, of the frame that training takes.
    Image.fromarray(PIXELS[0]).save(tmp_path / "clips" / "still.png")
    (tmp_path / "clips" / "notes.txt").write_text("")
    with pytest.warns(EvaluationWarning, match=r"not taken: 1 \.txt files"):
        assert open_pictures(tmp_path / "clips").read(1, 2).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("frame", [1, 2])
def test_an_animation_cut_in_a_later_frame_is_read_as_far_as_is_asked(frame, tmp_path):
    """Alike in training, encoding and evaluation: a still takes the first frame, a clip is named or left out."""
    for i in range(4):
        frames = [Image.fromarray(PIXELS[2 * i + k % 2]) for k in range(3)]
        save_frames(frames, tmp_path / "a" / f"{i}.gif")
    whole = (tmp_path / "a" / "1.gif").read_bytes()
    end = next(size for size in range(1, len(whole)) if readable(whole[:size], frame + 1))
    (tmp_path / "a" / "1.gif").write_bytes(whole[: end - 20])
    source = open_source(tmp_path / "a", loose=True)
    assert len(ImageFiles(source, 8)) == 4
    assert [isinstance(size, str) for size in inspect_pictures(source, None)] == [False, True, False, False]
    pictures = open_pictures(tmp_path / "a")
    with pytest.raises(ValueError, match=r"1\.gif': image file is truncated"):
        pictures.read(0, 4)
    with pytest.warns(EvaluationWarning, match=r"left out: 1 unreadable; cannot read '.*1\.gif'"):
        clips = open_pictures(tmp_path / "a", skip_unreadable=True)
    assert clips.read(0, 3).shape == (3, 3, 3, 8, 8)
    Image.fromarray(PIXELS[8]).save(tmp_path / "a" / "still.png")
    assert open_pictures(tmp_path / "a", skip_unreadable=True).read(0, 5).shape == (5, 3, 8, 8)


def readable(content: bytes, count: int) -> bool:
    try:
        return bool(read_frames(content, count))
    except Exception:  # whatever Pillow raises for a part of a file
        return False


def evaluate(*arguments) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_pictures_that_cannot_be_used_are_named_in_one_line(capsys, tmp_path):
    good = Image.fromarray(PIXELS[0])
    for name in ("empty", "mixed", "unreadable"):
        (tmp_path / name).mkdir()
        if name != "empty":
            good.save(tmp_path / name / "a.png")
    good.resize((6, 7)).save(tmp_path / "mixed/b.png")
    (tmp_path / "unreadable/b.png").write_bytes(b"no picture at all")
    np.savez(tmp_path / "key.npz", images=PIXELS)
    np.savez(tmp_path / "float.npz", PIXELS / 255)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "key.npz").read_bytes()[:300])
    for name, message in {
        "empty": "no pictures in it",
        "mixed": "/b.png', since there are {(",
        "unreadable": "/b.png': cannot identify image file",
        "key.npz": "must have arr_0, got images",
        "float.npz": "must be uint8 pictures (N, H, W, 3), got float64 (9, 8, 8, 3)",
        "cut.npz": "not an npz",
        "nothing.npz": "nothing.npz'",
    }.items():
        place = tmp_path / name
        for arguments in ((place, "--reference", "digits"), ("digits", "--reference", place)):
            code = evaluate(*arguments, "--detector", "digits", "--out", tmp_path / "out")
            said = capsys.readouterr()
            assert (code, said.out, said.err.count("\n")) == (2, "", 1)
            assert message in said.err
    for number in (2, 3):  # in the scored pictures and in the reference
        good.save(tmp_path / "unreadable" / f"{number}.png")
    line = ("--detector", "digits", "--metrics", "fd", "--out", tmp_path / "out", "--skip-unreadable", "--json")
    for arguments in (
        (tmp_path / "unreadable", "--reference", "digits"),
        ("digits", "--reference", tmp_path / "unreadable"),
    ):
        with pytest.warns(EvaluationWarning, match=r"left out: 1 unreadable; cannot read '.*b\.png'"):
            assert evaluate(*arguments, *line) == 0


def test_a_saved_reference_says_what_made_it_and_is_refused_for_another_detector(
    capsys, tmp_path, monkeypatch, digit_classifiers
):
    options = ("--detector", "digits", "--out", tmp_path / "out")
    assert evaluate("digits", "--save-reference", tmp_path / "real.safetensors", *options, "--json") == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])["made"]
    assert (made["count"], made["pictures"]["name"], made["size"]) == (1797, "digits", [1, 8, 8])
    assert len(made["detector"]["weights"]) == len(made["pictures"]["sha256"]) == 64
    results = []
    np.savez(tmp_path / "set.npz", PIXELS)
    for reference in (tmp_path / "real.safetensors", "digits"):
        code = evaluate(tmp_path / "set.npz", "--reference", reference, *options, "--metrics", "fd", "recall", "--json")
        said = capsys.readouterr()
        assert code == 0
        results.append(json.loads(said.out.splitlines()[-1]))
        (note,) = results[-1]["notes"]
        assert note.startswith("9 samples for 64 features: their covariance is singular")
    assert results[0] == results[1]

    line = (tmp_path / "set.npz", "--reference", tmp_path / "real.safetensors", "--out", tmp_path / "out")
    one_epoch = partial(digit_classifiers, epochs=1)  # nobody looks at what it sees
    monkeypatch.setattr("elit.evaluate.detectors.train_digit_classifier", one_epoch)
    assert evaluate(*line, "--detector", "moving-digits") == 2
    detectors._digit_classifier.cache_clear()
    said = capsys.readouterr().err
    assert "made with detector digits (" in said
    assert ", not moving-digits" in said
    (tmp_path / "real.safetensors").write_bytes(b"cut")
    assert evaluate(*line, "--detector", "digits") == 2
    assert "damaged" in capsys.readouterr().err


class Inception:
    name, distance, width = "inception", "fid", 2
    offers = ("fid", "sfid", "is", "kid", "precision", "recall")
    default = ("fid", "sfid", "is", "precision", "recall")

    def describe(self):
        return {"name": self.name, "weights": "0" * 64, "input": "as it is"}

    def __call__(self, samples):
        flat = samples.flatten(1)
        return Detection(torch.stack((flat.mean(1), flat[:, 0]), 1), spatial=flat[:, 5:6], logits=flat[:, :4])


def test_adms_reference_files(tmp_path):
    statistics = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(1), "sigma_s": np.eye(1)}
    np.savez(tmp_path / "both.npz", PIXELS, **statistics)
    np.savez(tmp_path / "statistics.npz", **statistics)
    np.savez(tmp_path / "set.npz", PIXELS[::-1])
    pictures, detector = open_pictures(tmp_path / "set.npz"), Inception()
    work = Work(out=tmp_path / "out", chunk=4)
    results = {}
    for name in ("both", "statistics"):
        reference = open_reference(tmp_path / f"{name}.npz", detector, work)
        assert torch.equal(reference.tensors["covariance"], torch.eye(2, dtype=torch.float64))
        results[name] = score(pictures, MetricGroup("inception", detector, reference), work)
    assert set(results["both"].scores) == {"fid", "sfid", "is", "is_std", "precision", "recall"}
    assert set(results["statistics"].scores) == {"fid", "sfid", "is", "is_std"}
    assert results["both"].scores["fid"] == results["statistics"].scores["fid"]
    assert (results["both"].scores["precision"], results["both"].scores["recall"]) == (1, 1)
    again = open_reference(tmp_path / "both.npz", detector, work)  # the one that was kept
    with pytest.raises(ValueError, match="metrics='recall': give a reference with its pictures"):
        score(pictures, MetricGroup("inception", detector, reference, ("recall",)), work)
    with pytest.raises(ValueError, match="ADM's statistics of 2 features, made with detector inception, not digits"):
        open_reference(tmp_path / "both.npz", open_detector("digits"), work)
    save_reference(again, tmp_path / "saved.safetensors")
    assert load_reference(tmp_path / "saved.safetensors", detector).describe() == again.describe()


def test_metrics_that_cannot_be_had_say_what_they_lack(capsys, tmp_path):
    np.savez(tmp_path / "set.npz", PIXELS)
    for options, message in (
        ("--metrics fvd", "metrics must be of fd, accuracy"),
        ("--metrics fd", "cannot compute metrics='fd': give a reference"),
        ("--count 10", "count must be at most 9, the number of pictures, got 10"),
        ("--save-reference x.pt", "save_reference must be a .safetensors, got 'x.pt'"),
        ("--detector classifier", "detector must be one of inception, dinov2"),
        ("--detector dinov2:nothing", "cannot load detector dinov2:nothing"),
    ):
        code = evaluate(tmp_path / "set.npz", "--detector", "digits", "--out", tmp_path / "out", *options.split())
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), said
        assert message in said
