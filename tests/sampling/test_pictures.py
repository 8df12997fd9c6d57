"""Pictures as files, with a text inside."""

import pytest
from PIL import Image

from elit.sampling.pictures import FORMATS, MOVING, encode_picture, read_text

FRAMES = [Image.new("RGB", (8, 6), (60 * i, 0, 99)) for i in range(3)]


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_every_format_keeps_the_text(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encode_picture(FRAMES[:1], suffix, '{"seed": 3}'))
    assert read_text(path) == '{"seed": 3}'
    with Image.open(path) as image:
        assert (image.format, image.size) == (FORMATS[suffix], (8, 6))
    path.write_bytes(encode_picture(FRAMES[:1], suffix))
    assert read_text(path) is None


@pytest.mark.parametrize("suffix", MOVING)
def test_clips_move_and_keep_the_text(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encode_picture(FRAMES, suffix, "text"))
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert read_text(path) == "text"


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    for name, message in (("a.png", "not a picture"), ("b.png", "no such file")):
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(ValueError, match="text: 70000 characters"):
        encode_picture(FRAMES[:1], ".png", "a" * 70000)
