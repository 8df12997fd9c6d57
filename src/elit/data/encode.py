"""Latent encoding: pictures or clips through an autoencoder, once, into shards that training maps into memory.

A shard is a fixed slice of the source, encoded in fixed batches and renamed into place when it is whole. So it does
not matter how many processes share the work, nor how often they are killed: what is there is right, what is missing is
made.

    OUT/encode.json        what was encoded and how, with the autoencoder's scale and shift
    OUT/shard-00000.arrow  one row a sample: the posterior's mean and std, and the label
    OUT/index.json         rows and SHA-256 of every shard: written last, after all of them have been checked
"""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from diffusers import AutoModel, ModelMixin
from torch import Tensor

from elit.data.images import centre_crop
from elit.data.source import Source
from elit.files import replacing, write_text
from elit.models.saved import check_hub_name, weights_digest
from elit.sampling.autoencoders import encode_moments, latent_normalization

FEATURES = Features({"row": Value("int64"), "label": Value("int64"), "mean": Value("binary"), "std": Value("binary")})
DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a source is encoded; all of it is in encode.json, and another one cannot share the folder."""

    vae: str
    """The autoencoder, any of diffusers': a hub name or a folder."""
    vae_subfolder: str | None = None
    """Where in that repository or folder the autoencoder is, such as vae in a pipeline's."""
    image_size: int | tuple[int, int]
    """Pixels along each axis, or (height, width), after ADM's centre crop."""
    frames: int = 1
    """Frames of a clip; 1 = images."""
    captions: bool = False
    """Labels number captions (metadata.jsonl, a text column) instead of classes."""
    skip_unreadable: bool = False
    """Leave unreadable pictures out instead of stopping at the first."""
    batch_size: int = 8
    """Samples at a time. Part of the encoding, since rounding may depend on it."""
    shard_size: int = 1024
    """Samples of a shard, the unit of work and of resuming."""

    def __post_init__(self) -> None:
        for name in ("image_size", "frames", "batch_size", "shard_size"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"{name}={value}: give at least 1")


def load_encoder(name: str, subfolder: str | None = None, *, device: torch.device | str = "cpu") -> ModelMixin:
    """Any diffusers autoencoder by hub name or folder. Raises ValueError where there is none."""
    check_hub_name("vae", name)
    try:
        with notes_after_success("diffusers", "huggingface_hub"):
            vae = AutoModel.from_pretrained(name, subfolder=subfolder)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(f"vae={name!r}: cannot be loaded ({reason})") from None
    latent_normalization(vae)  # refuses what is none, and what does not say
    return vae.eval().requires_grad_(False).to(device)


@contextmanager
def notes_after_success(*packages: str) -> Iterator[None]:
    """Inside the block what these packages log, and all warnings, wait; an error alone says what is wrong.

    Behind the block they come, in their order, where nothing was raised.
    """
    handlers = [handler for package in packages for handler in logging.getLogger(package).handlers]
    records: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if record not in records:  # each handler sees it
            records.append(record)
        return False

    for handler in handlers:
        handler.addFilter(hold)
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(hold)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    for record in records:
        logging.getLogger(record.name).handle(record)


def encode(
    source: Source,
    out: Path,
    vae: ModelMixin,
    encoding: Encoding,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes this process's shards, those that are not there yet: every `world`-th from `rank`.

    Call `prepare` before, in one process, and `finish` after all are through. progress: called with (samples done,
    samples of this process). Raises ValueError for a picture that cannot be read.
    """
    shards = range(math.ceil(len(source) / encoding.shard_size))
    mine = [shard for shard in shards if shard % world == rank]
    total, done = sum(len(shard_rows(source, encoding, shard)) for shard in mine), 0
    for shard in mine:
        path = shard_path(out, shard)
        if not path.is_file():
            write_shard(path, source, shard_rows(source, encoding, shard), vae, encoding)
        done += len(shard_rows(source, encoding, shard))
        if progress:
            progress(done, total)


def prepare(source: Source, out: Path, vae: ModelMixin, encoding: Encoding) -> None:
    """Writes encode.json, or checks that the one there says the same. Raises ValueError naming the difference."""
    if not len(source):
        raise ValueError("src: has no samples")
    settings: dict[str, Any] = {
        **asdict(encoding),
        "autoencoder": {
            "class": type(vae).__name__,
            "weights": weights_digest(vae),
            **latent_normalization(vae).to_json(),
        },
        "source": _digest(json.dumps(source.describe(), sort_keys=True).encode()),
        "count": len(source),
        "shape": list(encode_moments(vae, torch.zeros(1, *_pixel_shape(encoding)))[0].shape[1:]),
        "classes": list(source.classes),
        "caption_texts": list(source.captions),
    }
    path, settings = out / "encode.json", json.loads(json.dumps(settings))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in settings if settings[name] != before.get(name)]:
            raise ValueError(
                f"out={str(out)!r}: holds another encoding ({', '.join(changed)} differ); give a new folder"
            )
    elif out.exists() and any(not file.name.startswith(".") for file in out.iterdir()):
        raise ValueError(f"out={str(out)!r}: holds something else; give a new folder")
    else:
        write_text(path, json.dumps(settings, indent=2) + "\n")


def write_shard(path: Path, source: Source, rows: range, vae: ModelMixin, encoding: Encoding) -> None:
    """Encodes `rows` of the source into one Arrow file."""
    with replacing(path) as temporary, ArrowWriter(features=FEATURES, path=str(temporary)) as writer:
        for first in range(rows.start, rows.stop, encoding.batch_size):
            pixels, labels, rows_read = [], [], []
            for row in range(first, min(first + encoding.batch_size, rows.stop)):
                try:
                    example = source[row]
                    pixels.append(to_pixels(example.frames, encoding))
                except (OSError, ValueError, SyntaxError) as error:
                    if encoding.skip_unreadable:
                        continue
                    raise ValueError(
                        f"src: sample {row} cannot be read ({error}); mend it, or set skip_unreadable"
                    ) from None
                labels.append(example.label)
                rows_read.append(row)
            if not rows_read:
                continue
            for row, label, mean, std in zip(rows_read, labels, *encode_moments(vae, torch.stack(pixels)), strict=True):
                parts = {
                    name: value.to(DTYPE).cpu().numpy().tobytes() for name, value in (("mean", mean), ("std", std))
                }
                writer.write({"row": row, "label": label} | parts)
        writer.finalize()


def to_pixels(frames: list[Any], encoding: Encoding) -> Tensor:
    """An image (3, H, W), or the first frames of a clip (3, T, H, W), in [-1, 1]. Raises ValueError for too few."""
    if encoding.frames == 1:
        return centre_crop(frames[0], encoding.image_size)
    if len(frames) < encoding.frames:
        raise ValueError(f"{len(frames)} frames, {encoding.frames} wanted")
    return torch.stack([centre_crop(frame, encoding.image_size) for frame in frames[: encoding.frames]], 1)


def finish(source: Source, out: Path, encoding: Encoding) -> dict[str, Any]:
    """Checks every shard, writes index.json and returns it. Raises ValueError where a shard is missing or not whole."""
    shards: list[dict[str, Any]] = []
    skipped: list[int] = []
    for shard in range(math.ceil(len(source) / encoding.shard_size)):
        path, wanted = shard_path(out, shard), shard_rows(source, encoding, shard)
        if not path.is_file():
            raise ValueError(f"out={str(out)!r}: {path.name} is missing; run the command again")
        rows = list(Dataset.from_file(str(path))["row"])
        missing = sorted(set(wanted) - set(rows))
        if len(rows) != len(set(rows)) or set(rows) - set(wanted) or (missing and not encoding.skip_unreadable):
            raise ValueError(f"out={str(out)!r}: {path.name} does not hold its samples; remove it and run again")
        skipped += missing
        shards.append({"file": path.name, "rows": len(rows), "sha256": _digest(path.read_bytes())})
    index = {"count": sum(shard["rows"] for shard in shards), "skipped": skipped, "shards": shards}
    if index["count"] + len(skipped) != len(source):
        raise ValueError(f"out={str(out)!r}: {index['count']} samples of {len(source)}, {len(skipped)} left out")
    write_text(out / "index.json", json.dumps(index, indent=2) + "\n")
    return index


def shard_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:05d}.arrow"


def shard_rows(source: Source, encoding: Encoding, shard: int) -> range:
    """The samples of a shard."""
    return range(shard * encoding.shard_size, min((shard + 1) * encoding.shard_size, len(source)))


def _pixel_shape(encoding: Encoding) -> tuple[int, ...]:
    size = encoding.image_size if isinstance(encoding.image_size, tuple) else (encoding.image_size,) * 2
    return (3, *size) if encoding.frames == 1 else (3, encoding.frames, *size)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
