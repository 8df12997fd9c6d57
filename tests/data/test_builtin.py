"""The digits, still and on the move; IDX files as written by hand, and every way in which they can be wrong."""

import gzip

import pytest
import torch
from conftest import idx

from elit.data.builtin import FASHION_CLASSES, FASHION_MNIST, digits, fashion_mnist, idx_images, moving_digits, read_idx


def test_the_digits_are_the_real_ones_with_captions():
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert (data.captions[7], data.classes[7]) == ("a handwritten seven", "7")


def test_every_frame_shows_the_whole_digit_and_nothing_else():
    """Cut out where it lies, each frame is the still digit; on the way it moves in a straight line."""
    still, data = digits(), moving_digits(frames=4, canvas=(10, 14), pixels=1, clips_per_digit=2)
    assert data.images.shape == (2 * 1797, 1, 4, 10, 14)
    assert torch.equal(data.labels, still.labels.repeat(2))
    places = [(top, left) for top in range(3) for left in range(7)]
    for i in range(0, len(data), 97):
        digit, path = still.images[i % 1797, 0], []
        for frame in data.images[i, 0]:
            cut = [(frame[top : top + 8, left : left + 8], (top, left)) for top, left in places]
            path.append(next(place for part, place in cut if torch.equal(part, digit)))
            assert (frame == -1).sum() == 140 - 64 + (digit == -1).sum()
        for k, place in enumerate(path):
            exact = [a + (b - a) * k / 3 for a, b in zip(path[0], path[-1], strict=True)]
            assert all(abs(p - e) <= 1 for p, e in zip(place, exact, strict=True))
        assert path[0] != path[-1]


@pytest.fixture
def folder(tmp_path):
    """Ten training pictures of 5×6 and four test pictures, one pair gzipped."""
    generator = torch.Generator().manual_seed(0)
    for prefix, count, suffix, write in (("train", 10, "", bytes), ("t10k", 4, ".gz", gzip.compress)):
        images = torch.randint(0, 256, (count, 5, 6), dtype=torch.uint8, generator=generator)
        labels = torch.arange(count, dtype=torch.uint8) % 3
        (tmp_path / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(write(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(write(idx(labels)))
    return tmp_path


def test_pictures_are_padded_in_the_middle_and_batches_are_in_minus_one_to_one(folder):
    raw = read_idx(folder / "train-images-idx3-ubyte", axes=3)
    data = idx_images(folder)
    assert (data.images.dtype, data.shape, len(data)) == (torch.uint8, (1, 8, 8), 10)
    assert torch.equal(data.images[:, 0, 1:6, 1:7], raw)
    assert data.images.sum() == raw.sum()
    images, labels = data.__getitems__([3, 0])
    torch.testing.assert_close(images, data.images[[3, 0]].float() / 255 * 2 - 1)
    assert labels.tolist() == [0, 0]
    assert data.classes == ("0", "1", "2")
    assert len(idx_images(folder, "test")) == 4


def test_class_names_come_from_classes_txt(folder):
    (folder / "classes.txt").write_text("ankle boot\nbag\ncoat\n")
    data = idx_images(folder)
    assert data.classes == ("ankle boot", "bag", "coat")
    assert data.captions[:2] == ("a photo of an ankle boot", "a photo of a bag")
    (folder / "classes.txt").write_text("bag\n")
    with pytest.raises(ValueError, match="labels up to 2 and 1 class names do not fit"):
        idx_images(folder)


IMAGES = "train-images-idx3-ubyte"
FAULTS = {
    "magic": (IMAGES, lambda whole: b"\x89PNG" + bytes(100), "' or its .gz: not 3 axes of bytes"),
    "cut": (IMAGES, lambda whole: whole[:-7], "not 3 axes of bytes, or of another length"),
    "cut gzip": (f"{IMAGES}.gz", lambda whole: gzip.compress(whole)[:99], "get it again"),
    "missing": ("elsewhere", lambda whole: whole, f"{IMAGES}' or its .gz: No such file or directory"),
    "fewer": (IMAGES, lambda whole: whole[:4] + bytes([0, 0, 0, 9]) + whole[8:-30], "9 pictures, 10 labels up to 2"),
}


@pytest.mark.parametrize(("name", "change", "line"), FAULTS.values(), ids=FAULTS)
def test_bad_files_are_one_line_and_exit_2(run, folder, tmp_path, name, change, line):
    whole = (folder / IMAGES).read_bytes()
    (folder / IMAGES).unlink()
    (folder / name).write_bytes(change(whole))
    code, _, message = run("train", "--data", f"idx:{folder}", "--out", tmp_path / "run")
    assert (code, line in message, message.count("\n")) == (2, True, 1)
    assert not (tmp_path / "run").exists()


def test_where_it_is_not_at_hand_a_line_says_how_to_get_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr("elit.data.builtin.FASHION_MNIST", tmp_path / "nowhere")
    code, _, message = run("train", "--data", "fashion-mnist", "--out", tmp_path / "run")
    assert (code, "apt-get install dataset-fashion-mnist" in message, message.count("\n")) == (2, True, 1)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_is_the_real_one():
    data = fashion_mnist("test")
    assert data.shape == (1, 32, 32)
    assert data.classes == FASHION_CLASSES
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    assert data.images[:, :, 2:30, 2:30].float().mean().item() == pytest.approx(73.1466, abs=0.01)
    assert data.images.float().sum() == data.images[:, :, 2:30, 2:30].float().sum()
