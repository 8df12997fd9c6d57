"""What a folder of images is said to hold before it is trained on."""

import pytest
from PIL import Image

from elit.data.images import ImageFolder
from elit.data.summary import summary


def picture(path, size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def test_what_is_out_of_the_ordinary_is_said(tmp_path):
    for number in range(3):
        picture(tmp_path / "cat" / f"{number}.png")
    picture(tmp_path / "dog" / "0.png", (8, 8), "RGBA")
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "stray.png")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    picture(outside / "0.png")
    (tmp_path / "elsewhere").symlink_to(outside)
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "cat" / "circle").symlink_to(tmp_path)
    data = ImageFolder(tmp_path, 16)
    assert data.classes == ("cat", "dog")
    assert len(data) == 4
    assert summary(data, 8) == [
        "data: 4 images, cat 3, dog 1; 8×8 to 20×16",
        "data: no images in 'empty', so that they are no classes",
        "data: links to folders are not followed: 'again', 'elsewhere'",
        "data: 1 images beside the classes' folders are left out, 'stray.png' for one",
        "data: 1 images are transparent, '0.png' for one: what is behind that is trained on, and elit evaluate refuses "
        "them",
        "data: 1 images are smaller than image_size=16 and are enlarged",
        "data: 4 images are fewer than a batch of 8, so that some repeat in it",
    ]


def test_an_ordinary_folder_has_one_line(tmp_path):
    for label in range(9):
        for number in range(1 + label):
            picture(tmp_path / f"c{label}" / f"{number}.png")
    assert summary(ImageFolder(tmp_path, 16), 8) == ["data: 45 images, 9 classes, from 1 (c0) to 9 (c8); all 20×16"]


def test_links_alone_are_no_data(tmp_path):
    picture(tmp_path / "outside" / "0.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"no images in its sub-folders; .* links are not followed"):
        ImageFolder(tmp_path / "data", 16)
