"""Digits, IDX files, and any file that Pillow reads as upright 8-bit RGB."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import idx
from PIL import Image, PngImagePlugin

from elit.data.builtin import FASHION_CLASSES, FASHION_MNIST, digits, fashion_mnist, idx_images, read_idx
from elit.data.reader import SUFFIXES, centre_crop, read_frames

CASES = Path(__file__).parent / "cases"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def content(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(read_frames(data)[0])


@pytest.mark.parametrize("path", sorted(CASES.iterdir()), ids=lambda path: path.name)
def test_every_case_is_one_upright_picture(path):
    (frame,) = read_frames(path.read_bytes())
    size = (48, 64) if path.stem == "exif6" else (64, 48)
    assert path.suffix in SUFFIXES
    assert (frame.mode, frame.size) == ("RGB", size)
    assert 1 < np.asarray(frame).std() < 100


@pytest.mark.parametrize("name", ["phone_mpo.jpg", "stereo_mpo.jpg", "multipage.tif"])
def test_previews_and_other_eyes_are_no_frames(name):
    assert len(read_frames((CASES / name).read_bytes(), None)) == 1
    with pytest.raises(ValueError, match="1 frames, 2 wanted"):
        read_frames((CASES / name).read_bytes(), 2)


def test_only_the_frames_asked_for_are_decoded():
    cut = (CASES / "anim_cut.gif").read_bytes()
    assert len(read_frames(cut)) == 1
    with pytest.raises(OSError, match="truncated"):
        read_frames(cut, 2)
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    clip = content(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert [np.array_equal(a, b) for a, b in zip(read_frames(clip, None), frames, strict=True)] == [True, True]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exifs_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = content(Image.fromarray(PIXELS), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    turned = PIXELS if orientation < 5 else PIXELS.swapaxes(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    assert np.array_equal(pixels(data), np.flip(turned, flips))


DEEP = np.array([[0, 257, 32896, 65535]])


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (DEEP.astype(np.uint16), "PNG", [0, 1, 128, 255]),
        (DEEP.astype(np.uint16), "TIFF", [0, 1, 128, 255]),
        (DEEP.astype(np.int32), "TIFF", [0, 1, 128, 255]),
        (np.array([[0, 7, 255]], np.int32), "TIFF", [0, 7, 255]),
        (np.array([[0, 0.5, 1]], np.float32), "TIFF", [0, 128, 255]),
        (np.array([[0, 127.6, 255]], np.float32), "TIFF", [0, 128, 255]),
    ],
)
def test_deep_grey_keeps_its_range(values, kind, expected):
    assert pixels(content(Image.fromarray(values), kind))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("value", [-1.0, np.nan, 70_000.0])
def test_floats_without_a_known_range_are_refused(value):
    data = content(Image.fromarray(np.array([[0, value]], np.float32)), "TIFF")
    with pytest.raises(ValueError, match="values must be from 0 to 65535, got"):
        read_frames(data)


def test_alpha_lies_on_white():
    rgba = np.dstack((PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)))
    assert np.array_equal(pixels(content(Image.fromarray(rgba), "PNG")), PIXELS)
    rgba[..., 3] = 0
    assert (pixels(content(Image.fromarray(rgba), "PNG")) == 255).all()
    palette = Image.fromarray(PIXELS).quantize(4)
    seen = pixels(content(palette, "PNG", transparency=0))
    assert ((seen == 255).all(-1) == (np.asarray(palette) == 0)).all()
    assert (pixels(content(Image.new("L", (2, 2), 9), "PNG", transparency=9)) == 255).all()


def with_chunk(data: bytes, kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return data[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc) + data[33:]


def damaged_jpeg(segment: bytes) -> bytes:
    data = content(Image.fromarray(PIXELS), "JPEG", quality=100)
    return data[:20] + segment[:2] + struct.pack(">H", len(segment)) + segment[2:] + data[20:]


def test_damaged_metadata_costs_no_picture():
    plain = content(Image.fromarray(PIXELS), "PNG")
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    files = [
        content(Image.fromarray(PIXELS), "PNG", pnginfo=text),
        with_chunk(plain, b"tEXt", b"broken", crc=0),
        with_chunk(plain, b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
        with_chunk(plain, b"iCCP", b"\0\0\0"),
    ]
    assert all(np.array_equal(pixels(each), PIXELS) for each in files)
    jpeg = pixels(content(Image.fromarray(PIXELS), "JPEG", quality=100))
    segments = [
        b"\xff\xe1Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"\xff\xe2MPF\0MM\0*\0\0\0\x08\xff\xff",
        b"\xff\xedPhotoshop 3.0\0",
    ]
    assert all(np.array_equal(pixels(damaged_jpeg(each)), jpeg) for each in segments)
    with pytest.raises(OSError, match="cannot identify"):
        read_frames(b"\x89PNG\r\n\x1a\n" + bytes(40))


def test_long_pictures_are_cut_before_they_grow():
    """1×30,000 resized to cover 256×256 would have 7.7 million rows."""
    column = Image.new("RGB", (1, 30_000), (9, 9, 9))
    assert centre_crop(column, 256).shape == (3, 256, 256)
    assert centre_crop(column.transpose(Image.Transpose.ROTATE_90), (8, 16)).shape == (3, 8, 16)
    with pytest.raises(Image.DecompressionBombError):
        read_frames(content(Image.new("1", (20_000, 20_000)), "PNG"))


def test_the_digits_are_the_real_ones_with_captions():
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert (data.captions[7], data.classes[7]) == ("a handwritten seven", "7")


@pytest.fixture
def folder(tmp_path):
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
