"""Folders and tables of pictures: what is taken, what is not, numbers of labels, the order of a run."""

import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from elit.config import RunConfig
from elit.data import images
from elit.data.images import ImageFiles
from elit.data.loader import StepSampler, shuffled
from elit.data.source import Source, open_source


def png(size=(20, 16), mode="RGB", kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def write(path: Path, data: bytes | str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if data is None else data.encode() if isinstance(data, str) else data)


def written(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name)
    return root


def faults(source: Source) -> list[str]:
    found = []
    for index in range(len(source)):
        try:
            source.read(index)
        except ValueError as error:
            found.append(str(error))
    return found


def test_files_that_are_not_taken_are_counted_by_reason(tmp_path):
    taken = ["cat/0.png", "cat/1.JPG", "cat/deep/2.png", "dog/0.avif", "dog/1.jfif"]
    written(tmp_path, *taken, "stray.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png")
    for name in ("dog/notes.txt", "old.tar", ".text/prompts.safetensors"):
        write(tmp_path / name, "a")
    for link in ("again", "cat/circle"):
        (tmp_path / link).symlink_to(tmp_path)
    os.mkfifo(tmp_path / "cat/pipe.png")  # reading one waits for ever
    source = open_source(tmp_path)
    assert [Path(each.name).relative_to(tmp_path).as_posix() for each in source.pictures] == taken
    assert (source.classes, source.labels) == (("cat", "dog"), [0, 0, 0, 1, 1])
    assert {reason: len(names) for reason, names in source.left_out.items()} == {
        "links to folders": 2,
        "hidden files": 2,
        "pipes and devices": 1,
        ".txt files": 1,
        "archives beside pictures": 1,
        "pictures beside the classes' folders": 1,
    }
    loose = open_source(tmp_path, loose=True)
    assert (len(loose), loose.classes) == (6, ())


@pytest.mark.parametrize(("names", "labels"), [(("10", "3", "7"), [10, 3, 7]), (("3", "cat"), [0, 1])])
def test_folders_named_by_numbers_are_those_classes(tmp_path, names, labels):
    source = open_source(written(tmp_path, *(f"{name}/0.png" for name in names)))
    assert (source.labels, source.true_labels) == (list(range(len(names))), labels)


def test_a_flat_folder_is_one_class_named_as_it(tmp_path):
    source = open_source(written(tmp_path / "photos", "0.png", "1.png"))
    assert (source.labels, source.classes, source.not_taken()) == ([0, 0], ("photos",), [])
    assert open_source(tmp_path / "photos", captions=True).captions == ("photos",)


def test_a_summary_of_a_folder(tmp_path):
    written(tmp_path, "cat/0.png", "cat/1.png", "cat/2.png", "stray.png")
    write(tmp_path / "dog" / "0.png", png((8, 8), "RGBA"))
    assert ImageFiles(open_source(tmp_path), 16).summary() == [
        "data: 4 images of 8×8 to 20×16, 2 classes of 1 to 3",
        "data: 1 images are smaller than image_size=16 and are enlarged",
        "data: not taken: 1 pictures beside the classes' folders, 'stray.png' for one",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no pictures in it$"),
        (["a/.hidden/0.png"], "no pictures in it; 1 hidden files"),
    ],
)
def test_a_folder_without_pictures_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        open_source(written(tmp_path, *files))
    with pytest.raises(ValueError, match=r"must be a folder, a \.parquet or a \.tar"):
        open_source(tmp_path / "missing")


def test_what_was_found_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    write(tmp_path / "a" / "0.png")
    write(tmp_path / "a" / "1.png", "broken")
    with pytest.raises(ValueError, match=r"cannot read '.*1\.png'.*; 1 of 2 pictures are unreadable.*skip_unreadable"):
        ImageFiles(open_source(tmp_path), 16)
    monkeypatch.setattr("elit.data.source.read_frames", None)  # a second look decodes nothing
    data = ImageFiles(open_source(tmp_path), 16, skip_unreadable=True)
    assert (len(data), len(data.skipped)) == (1, 1)
    monkeypatch.undo()
    write(tmp_path / "a" / "1.png")
    assert len(ImageFiles(open_source(tmp_path), 16)) == 2
    write(tmp_path / "a" / "0.png", "broken")
    write(tmp_path / "a" / "1.png", "broken")
    with pytest.raises(ValueError, match="2 of 2 pictures are unreadable"):
        ImageFiles(open_source(tmp_path), 16, skip_unreadable=True)


def test_what_was_found_in_a_folder_that_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch):
    def write_elsewhere(path, text):
        if path.parent == photos:
            raise PermissionError
        path.write_text(text)

    photos = written(tmp_path / "photos", "a/0.png")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(images, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(images, "write_text", write_elsewhere)
    assert len(ImageFiles(open_source(photos), 16)) == 1
    monkeypatch.setattr("elit.data.source.read_frames", None)
    assert len(ImageFiles(open_source(photos), 16)) == 1


LINES = [{"file_name": "a/0.png", "text": "a boat\u2028at sea"}, {"file_name": "a/1.png", "text": "two\x85lines"}]
JSONL = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES)
CSV = 'file_name,caption\na/0.png,"a boat\u2028at sea"\na/1.png,two\x85lines\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metadata.jsonl", JSONL),
        ("metadata.jsonl", JSONL.replace("\n", "\r\n") + "\r\n\n"),
        ("metadata.jsonl", JSONL.encode("utf-8-sig")),
        ("metadata.jsonl", JSONL.encode("utf-16")),
        ("metadata.csv", CSV),
        ("a/metadata.jsonl", JSONL.replace("a/", "")),
    ],
)
def test_captions_of_any_metadata_file(tmp_path, name, data):
    write(written(tmp_path, "a/0.png", "a/1.png", "a/2.png") / name, data)
    source = open_source(tmp_path, captions=True)
    assert source.captions == ("a boat\u2028at sea", "two\x85lines")
    assert not faults(source)
    assert source.left_out == {"pictures without a line of metadata": ["a/2.png"]}
    assert open_source(tmp_path).classes == ("a",)
    (tmp_path / name).unlink()
    assert open_source(tmp_path, captions=True).captions == ("a",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"file_name": "a/0.png", "text": "a"}\n{"file_na', r"cannot read '.*metadata\.jsonl', entry 2: must be"),
        ("\n", "no entries"),
        (b"\xff\x00", "must be UTF-8"),
    ],
)
def test_metadata_that_cannot_be_read_is_named(tmp_path, data, message):
    write(written(tmp_path, "a/0.png") / "metadata.jsonl", data)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, captions=True)


def test_a_caption_that_is_no_text_costs_one_picture(tmp_path):
    lines = [{"file_name": "a/0.png", "text": ["a", "b"]}, {"file_name": "gone.png", "text": "a"}]
    lines += [{"file_name": "a/1.png", "text": "a_boat"}]
    write(written(tmp_path, "a/0.png", "a/1.png") / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    source = open_source(tmp_path, captions=True)
    first, second = faults(source)
    assert first == f"cannot read '{tmp_path / 'a' / '0.png'}': caption must be a text, got ['a', 'b']"
    assert "gone.png" in second
    assert source.captions == ("a", "a boat")
    data = ImageFiles(source, 8, skip_unreadable=True)
    assert (len(data), data.__getitems__([0])[1].tolist()) == (1, [1])


@pytest.mark.parametrize(
    ("lines", "captions", "count", "wrong"),
    [
        ([{"text": "a"}, {"text": "a"}], ("a",), 1, 0),
        ([{"text": "a"}, {"text": "b"}, {"text": "a"}], ("a", "b"), 2, 0),
        ([{"text": None, "caption": "a"}], ("a",), 1, 0),
        *(([{"text": value}], (), 1, 1) for value in (float("nan"), None, True, {})),
        ([{"text": 3}], ("3",), 1, 0),
        ([{"text": "a \ud800"}], ("a \\ud800",), 1, 0),
    ],
)
def test_a_caption_counts_once_and_may_stand_in_any_of_its_fields(tmp_path, lines, captions, count, wrong):
    rows = [{"file_name": "0.png"} | line for line in lines]
    write(written(tmp_path, "a/0.png") / "a" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    source = open_source(tmp_path, captions=True)
    assert (source.captions, len(source), len(faults(source))) == (captions, count, wrong)


def table(path: Path, column: str, values: list, images: list | None = None) -> Source:
    images = images or [{"bytes": png(), "path": None}] * len(values)
    features = {"image": datasets.Image()} | ({column: datasets.Value("string")} if not any(values) else {})
    rows = datasets.Dataset.from_dict({"image": images, column: values}).cast_column("image", features["image"])
    rows.to_parquet(path / "0.parquet")
    return open_source(path, captions=column == "text")


@pytest.mark.parametrize(
    ("column", "values", "classes", "labels", "wrong"),
    [
        ("label", ["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1], 0),
        ("label", [0, 2, 0], ("0", "1", "2"), [0, 2, 0], 0),
        ("label", [0, None, 1], ("0", "1"), [0, 0, 1], 1),
        ("label", [0.0, float("nan"), 1.0], ("0", "1"), [0, 0, 1], 1),
        ("label", [-1, 0, 1], ("0", "1"), [0, 0, 1], 1),
        ("cls", ["a", None, "b"], ("a", "b"), [0, 0, 1], 1),
        ("text", ["b", None, "a"], ("b", "a"), [0, 0, 1], 1),
        ("text", [["b", "a"], [], ["a"]], (), [0, 0, 0], 3),
    ],
)
def test_labels_of_a_table(tmp_path, column, values, classes, labels, wrong):
    source = table(tmp_path, column, values)
    assert (source.classes, source.labels) == (classes, labels)
    assert len(faults(source)) == wrong
    assert all("0.parquet" not in line or "row" in line for line in faults(source))


def test_a_row_without_a_picture_and_a_broken_table_are_named(tmp_path):
    source = table(tmp_path, "label", [0, 1], [{"bytes": png(), "path": None}, None])
    assert faults(source) == [f"cannot read '{tmp_path}, row 1': no picture in this row"]
    content = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot read '.*': .*[Pp]arquet"):
        open_source(tmp_path)


def test_tables_leave_out_other_archives_and_a_saved_set_nothing(tmp_path):
    assert table(tmp_path, "label", [0, 1]).left_out == {}
    write(tmp_path / "more" / "1.parquet", (tmp_path / "0.parquet").read_bytes())
    tar(tmp_path / "2.tar", {"0.png": png(), "0.cls": b"1"})
    source, reason = open_source(tmp_path), "archives of another kind or in sub-folders"
    assert (len(source), source.left_out) == (2, {reason: ["2.tar", "more/1.parquet"]})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}], "label": [0]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    assert open_source(tmp_path / "saved").left_out == {}


def test_pictures_alone_need_no_labels(tmp_path):
    table(tmp_path, "text", ["a", "b"])
    tar(tmp_path / "tars" / "0.tar", {"0.png": png(), "0.txt": b"a boat"})
    for path, count in ((tmp_path / "0.parquet", 2), (tmp_path / "tars", 1)):
        with pytest.raises(ValueError, match="label"):
            open_source(path)
        source = open_source(path, loose=True)
        assert (len(source), source.classes, faults(source)) == (count, (), [])


def tar(path: Path, members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    write(path, file.getvalue())
    return file.getvalue()


def test_shards_may_mix_formats_and_miss_members(tmp_path):
    first = {"a/0.png": png(), "a/0.cls": b"1", "a/1.JPG": png(kind="JPEG"), "a/1.cls": b"0\n", "a/._1.jpg": b"x"}
    tar(tmp_path / "0.tar", first)
    tar(tmp_path / "1.tar", {"0.seg.webp": png(kind="WEBP"), "0.cls": b"2", "1.png": png(), "2.cls": b"1"})
    source = open_source(tmp_path)
    assert (source.classes, source.labels) == (("0", "1", "2"), [1, 0, 2, 0, 1])
    assert faults(source) == [
        f"cannot read '{tmp_path / '1.tar'}, 1': label must be from 0 to 2, got None",
        f"cannot read '{tmp_path / '1.tar'}, 2': no picture of this name",
    ]
    tar(tmp_path / "texts" / "0.tar", {"0.png": png(), "0.txt": "\ufeffa boat\n".encode()})
    assert open_source(tmp_path / "texts" / "0.tar", captions=True).captions == ("a boat",)
    with pytest.raises(ValueError, match=r"must have members \.label, \.cls, \.class"):
        open_source(tmp_path / "texts")


@pytest.mark.parametrize("cut", [100, 512 + 40, 1024, 1024 + 300, 2048, -512 * 20])
def test_a_tar_that_is_cut_anywhere_is_named(tmp_path, cut):
    whole = tar(tmp_path / "0.tar", {"0.png": png(), "0.cls": b"1", "1.png": png(), "1.cls": b"0"})
    assert len(open_source(tmp_path)) == 2
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "0.tar").write_bytes(whole[: cut if cut > 0 else end])
    with pytest.raises(ValueError, match=r"cannot read '.*0\.tar': "):
        open_source(tmp_path)


def steps(length=10, parts=1, seed=0, **share):
    config = RunConfig(batch_size=4, gradient_accumulation=parts, steps=5, seed=seed)
    return list(StepSampler(length, config, **share))


def flat(parts):
    return [index for part in parts for index in part]


def test_every_epoch_shows_every_image_once_in_a_new_order():
    row = flat(steps())
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10))
    assert row[:10] != row[10:]
    assert row != flat(steps(seed=1))


def test_the_order_does_not_depend_on_processes_micro_batches_or_resuming():
    whole = steps()
    assert steps(start=3) == whole[3:]
    ranks = [steps(rank=rank, world=2, parts=2) for rank in (0, 1)]
    for step, right in enumerate(whole):
        micro = [ranks[rank][2 * step + part] for part in (0, 1) for rank in (0, 1)]
        assert flat(micro) == right
    sampler = StepSampler(10, RunConfig(batch_size=4, gradient_accumulation=2, steps=5))
    every = list(sampler)
    sampler.start, sampler.part = 2, 1
    assert list(sampler) == every[5:]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 6 \(3 processes × 2 accumulated.*got 4"):
        steps(parts=2, world=3)
    with pytest.raises(ValueError, match="no samples"):
        steps(length=0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_the_shuffle_is_a_permutation(length):
    order = shuffled(np.arange(length), length, seed=0, epoch=0)
    assert sorted(order.tolist()) == list(range(length))
    assert shuffled(np.array([length - 1]), length, 0, 0)[0] == order[-1]
