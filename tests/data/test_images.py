"""Data sets, the order of a run, and pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from elit.data.digits import digits
from elit.data.images import ImageFolder, read_image
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
    data = ImageFolder(folder, 16)
    images, labels = data.__getitems__([0, 5])
    assert (len(data), data.classes, data.shape) == (6, ("cats", "dogs"), (3, 16, 16))
    assert labels.tolist() == [0, 1]
    assert torch.allclose(images[1, :, 8, 8], torch.tensor([80, 80, 0]) / 127.5 - 1)


def test_images_are_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 10).mean() > 0.9


def test_an_unreadable_image_is_named_and_skipped_only_if_asked(folder):
    whole = (folder / "dogs" / "1.png").read_bytes()
    (folder / "dogs" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cats" / "fake.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read '.*fake\.jpg'.*2 of 7 images are unreadable.*skip_unreadable"):
        ImageFolder(folder, 16)
    data = ImageFolder(folder, 16, skip_unreadable=True)
    assert len(data) == 5
    assert [path.name for path in data.skipped] == ["fake.jpg", "1.png"]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        ImageFolder(tmp_path / "missing", 16)
    with pytest.raises(ValueError, match="no images in its sub-folders"):
        ImageFolder(tmp_path, 16)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_text("no")
    with pytest.raises(ValueError, match="none of its 1 images is readable"):
        ImageFolder(tmp_path, 16, skip_unreadable=True)


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
