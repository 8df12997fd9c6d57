"""Encoding: the same bytes however often it is killed and however many share it; all sources; damage named."""

import json
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import Command, run_two
from conftest import small_vae, small_video_vae
from PIL import Image

from elit.cli.main import main
from elit.data.encode import Encoding, encode, load_encoder
from elit.data.images import LatentSet, posterior_sample
from elit.data.reader import centre_crop
from elit.data.source import open_source

pytestmark = pytest.mark.slow


def picture(i: int) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 3, 22, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    for i in range(30):
        path = root / "photos" / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    small_vae(scaling_factor=0.5, shift_factor=0.1).save_pretrained(root / "vae")
    return root


def command(place: Path, out: Path) -> list[str]:
    options = ["--vae", str(place / "vae"), "--image-size", "16", "--batch-size", "2", "--shard-size", "2"]
    return ["encode", str(place / "photos"), str(out), *options]


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def encoded(place):
    assert main(command(place, place / "latents")) == 0
    return place / "latents"


def test_killed_twice_and_rerun_is_byte_equal(place, encoded, tmp_path):
    out = tmp_path / "killed"
    for stop_at in (3, 9):
        run = Command(command(place, out), tmp_path, threads=torch.get_num_threads())
        run.wait_until(lambda at=stop_at: len(list(out.glob("*.arrow"))) >= at)
        run.kill()
        assert run.wait() == -signal.SIGKILL
        assert not (out / "index.json").exists()
    assert main(command(place, out)) == 0
    assert content(out) == content(encoded)


def test_two_processes_are_byte_equal(place, encoded, tmp_path):
    runs = run_two(command(place, tmp_path / "two"), tmp_path)
    said = "".join(run.out for run in runs)
    assert said.count("30 samples in 15 shards; counts and sums agree") == 1
    assert content(tmp_path / "two") == content(encoded)


def test_moments_are_the_autoencoders_own(place, encoded):
    data, vae = LatentSet(encoded), load_encoder(str(place / "vae"))
    assert (len(data), data.shape, data.classes) == (30, (4, 8, 8), ("a", "b", "c"))
    files = sorted((place / "photos").glob("*/*.png"))
    moments, labels = data.__getitems__([7, 29])
    for row, (mean, std), label in zip((7, 29), moments, labels, strict=True):
        posterior = vae.encode(centre_crop(Image.open(files[row]), 16)[None]).latent_dist
        assert torch.allclose(mean, (posterior.mean[0] - 0.1) * 0.5, atol=2e-3)
        assert torch.allclose(std, posterior.std[0] * 0.5, rtol=2e-3)
        assert data.classes[label] == files[row].parent.name
    noise = torch.randn(2, 4, 8, 8)
    assert torch.allclose(posterior_sample(moments, noise), moments[:, 0] + moments[:, 1] * noise)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_give_what_the_folder_gives(kind, place, tmp_path):
    folder, table = open_source(place / "photos"), tmp_path / "table"
    table.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    images = [picture.name for picture in folder.pictures]
    rows = datasets.Dataset.from_dict({"image": images, "label": folder.labels}, features=features)
    rows.to_parquet(table / "000.parquet") if kind == "parquet" else rows.save_to_disk(table)
    source = open_source(table)
    assert (source.classes, source.labels) == (folder.classes, folder.labels)
    for i in (0, 13, 29):
        assert np.array_equal(np.asarray(source.read(i)[0]), np.asarray(folder.read(i)[0]))
    assert open_source(table).identity == source.identity


def test_captions_and_clips(tmp_path):
    root, lines = tmp_path / "clips", []
    root.mkdir()
    for i in range(3):
        first, *rest = [picture(10 * i + 3 * k) for k in range(3)]
        first.save(root / f"{i}.gif", save_all=True, append_images=rest)
        lines.append(json.dumps({"file_name": f"{i}.gif", "text": f"clip {i % 2}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    source, vae, out = open_source(root, captions=True), small_video_vae(), tmp_path / "out"
    assert source.captions == ("clip 0", "clip 1")
    encode(source, out, vae, Encoding(image_size=16, frames=3, captions=True))
    moments, labels = LatentSet(out).__getitems__([0, 1, 2])
    assert (moments.shape, labels.tolist()) == ((3, 2, 4, 1, 2, 2), [0, 1, 0])
    with pytest.raises(ValueError, match=r"cannot read '.*0\.gif': 3 frames, 4 wanted"):
        encode(source, tmp_path / "more", vae, Encoding(image_size=16, frames=4))


def test_unreadable_pictures_stop_it_or_are_left_out(tmp_path):
    folder, out = write_pictures(tmp_path / "photos" / "a", 4), tmp_path / "out"
    (folder / "1.png").write_bytes(b"cut")
    source, vae = open_source(folder.parent), small_vae()
    with pytest.raises(ValueError, match=r"cannot read '.*1\.png'.*set skip_unreadable"):
        encode(source, out, vae, Encoding(image_size=16))
    assert not list(out.glob("shard*"))
    assert encode(source, tmp_path / "b", vae, Encoding(image_size=16, skip_unreadable=True))["skipped"] == [1]
    assert len(LatentSet(tmp_path / "b")) == 3


def test_damage_and_mixtures_are_named(run, place, encoded, tmp_path):
    out, photos, vae = tmp_path / "latents", place / "photos", place / "vae"
    shutil.copytree(encoded, out)
    shard = out / "shard-00003.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shard-00003\.arrow' (is damaged|has \d rows)"):
        LatentSet(out)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00003\.arrow' is damaged"):
        LatentSet(out)
    assert main(command(place, out)) == 0  # makes it again
    assert shard.read_bytes() == whole
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index\.json'.*; run elit encode to its end"):
        LatentSet(out)
    more = ("--vae", vae, "--image-size", 16, "--batch-size", 2)
    for line, message in (
        ((photos, out, *more, "--shard-size", 4), "holds another encoding (shard_size differ)"),
        (("nothing", tmp_path / "x", "--vae", vae), "'nothing'"),
        ((photos, tmp_path / "x", "--vae", "nothing/here"), "nothing/here"),
        ((photos, place, *more), "holds something else"),
        ((), "give"),
    ):
        code, _, error = run("encode", *line)
        assert (code, message in error, error.count("\n")) == (2, True, 1), error
    assert not (tmp_path / "x").exists()


def test_latents_that_are_not_finite_and_folders_without_a_readable_picture_are_no_success(place, tmp_path):
    vae, source = small_vae(), open_source(place / "photos")
    with torch.no_grad():
        vae.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"cannot encode '.*00\.png': its latents are not finite in torch\.float16"):
        encode(source, tmp_path / "nan", vae, Encoding(image_size=16))
    with pytest.raises(ValueError, match="none of 30 samples could be encoded"):
        encode(source, tmp_path / "none", vae, Encoding(image_size=16, skip_unreadable=True))


def test_a_picture_that_was_replaced_is_another_encoding(tmp_path):
    folder, out = write_pictures(tmp_path / "photos" / "a", 2), tmp_path / "out"
    vae, encoding = small_vae(), Encoding(image_size=16)
    encode(open_source(folder.parent), out, vae, encoding)
    picture(5).save(folder / "1.png")
    with pytest.raises(ValueError, match=r"holds another encoding \(stamp differ\)"):
        encode(open_source(folder.parent), out, vae, encoding)
    settings = json.loads((out / "encode.json").read_text())
    del settings["stamp"]  # as versions before wrote it
    (out / "encode.json").write_text(json.dumps(settings | {"source": "another digest"}))
    assert encode(open_source(folder.parent), out, vae, encoding)["count"] == 2
