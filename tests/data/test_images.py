"""Data sets, the order of a run, and pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from elit.data.digits import digits
from elit.data.images import ImageFiles
from elit.data.source import open_source
from elit.sampling.pictures import image_grid, to_uint8, write_samples


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20 + i, 30), (80 * label, 40 * i, 0)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_digits_are_real_and_in_range():
    data = digits()
    images, labels = data.__getitems__([0, 1, 2])
    assert len(data) == 1797
    assert images.shape == (3, *data.shape) == (3, 1, 8, 8)
    assert labels.tolist() == [0, 1, 2]  # how scikit-learn's set begins
    assert data.images.min() == -1
    assert data.images.max() == 1
    assert data.classes == tuple("0123456789")


def test_a_folder_of_images(folder):
    data = ImageFiles(open_source(folder), 16)
    images, labels = data.__getitems__([0, 5])
    assert (len(data), data.classes, data.shape) == (6, ("cats", "dogs"), (3, 16, 16))
    assert labels.tolist() == [0, 1]
    assert torch.allclose(images[1, :, 8, 8], torch.tensor([80, 80, 0]) / 127.5 - 1)


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
    with pytest.raises(ValueError, match=r"give a \.png"):
        write_samples(samples, tmp_path / "f.txt", pictures=True)
    assert not list(tmp_path.rglob(".*"))
