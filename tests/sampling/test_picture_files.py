"""Pictures as files, with a text inside."""

import numpy as np
import pytest
import torch
from PIL import Image

from elit.sampling.pictures import FORMATS, MOVING, encode_picture, image_grid, read_text, to_uint8, write_samples

FRAMES = [Image.new("RGB", (8, 6), (60 * i, 0, 99)) for i in range(3)]


@pytest.mark.parametrize(("suffix", "count"), [*((suffix, 1) for suffix in FORMATS), *((each, 3) for each in MOVING)])
def test_every_format_keeps_frames_and_text(suffix, count, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encode_picture(FRAMES[:count], suffix, '{"seed": 3}'))
    assert read_text(path) == '{"seed": 3}'
    with Image.open(path) as image:
        assert (image.format, image.size, getattr(image, "n_frames", 1)) == (FORMATS[suffix], (8, 6), count)
    path.write_bytes(encode_picture(FRAMES[:count], suffix))
    assert read_text(path) is None


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    for name, message in (("a.png", "not a picture"), ("b.png", "no such file")):
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(ValueError, match="text: 70000 characters"):
        encode_picture(FRAMES[:1], ".png", "a" * 70000)


def test_pictures():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    grid = image_grid(torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 1.0, -1.0)]), 2, scale=2, gap=2)
    assert grid.size == (10, 10)
    assert grid.getpixel((0, 0)) == (0, 0, 0)
    assert grid.getpixel((4, 0)) == (255, 255, 255)
    assert grid.getpixel((0, 9)) == (0, 0, 0)


def test_written_samples(tmp_path):
    samples = torch.rand(3, 1, 8, 8) * 2 - 1
    write_samples(samples, tmp_path / "a" / "grid.png", pictures=True)
    assert Image.open(tmp_path / "a" / "grid.png").size == (2 * 64 + 2, 2 * 64 + 2)
    write_samples(samples, tmp_path / "b", pictures=True)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    write_samples(samples, tmp_path / "c.npz", pictures=True)
    array = np.load(tmp_path / "c.npz")["arr_0"]
    assert (array.shape, array.dtype) == ((3, 8, 8, 3), np.uint8)
    latents = torch.randn(2, 16, 4, 4)
    write_samples(latents, tmp_path / "d.npz", pictures=False)
    assert np.array_equal(np.load(tmp_path / "d.npz")["arr_0"], latents.numpy())
    with pytest.raises(ValueError, match="latents, no pictures"):
        write_samples(latents, tmp_path / "e.png", pictures=False)
    with pytest.raises(ValueError, match="must be a folder, or end in one of"):
        write_samples(samples, tmp_path / "f.txt", pictures=True)
    assert not list(tmp_path.rglob(".*"))
