"""Latent encoding, once, into shards: fixed slices of the source, in fixed batches, renamed into place when whole."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from diffusers import AutoModel, ModelMixin
from torch import Tensor

from elit.config import require_counts
from elit.data.reader import centre_crop
from elit.data.source import Source
from elit.files import Json, replacing, write_text
from elit.models.saved import check_hub_name, quiet_loading, weights_digest
from elit.sampling.autoencoders import encode_moments, latent_normalization

FEATURES = Features({"row": Value("int64"), "label": Value("int64"), "mean": Value("binary"), "std": Value("binary")})
DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The settings of an encoding; all are in encode.json, and another encoding cannot share the folder."""

    vae: str = ""  # The autoencoder, any of diffusers': a hub name or a folder.
    vae_subfolder: str | None = None  # The autoencoder's folder in there, such as vae in a pipeline's.
    image_size: int | tuple[int, int] = 256  # Pixels along each axis, or (height, width), after ADM's centre crop.
    frames: int = 1  # Frames of a clip; 1 = images.
    captions: bool = False  # Labels number captions (metadata.jsonl, a text column) instead of classes.
    skip_unreadable: bool = False  # Leave unreadable pictures out instead of stopping at the first.
    batch_size: int = 8  # Samples at a time. Part of the encoding, since rounding may depend on it.
    shard_size: int = 1024  # Samples of a shard, the unit of work and of resuming.

    def __post_init__(self) -> None:
        require_counts(self, "image_size", "frames", "batch_size", "shard_size")


def load_encoder(name: str, subfolder: str | None = None, *, device: torch.device | str = "cpu") -> ModelMixin:
    """Any diffusers autoencoder by hub name or folder. Raises ValueError where there is none."""
    check_hub_name("vae", name)
    try:
        with quiet_loading():
            vae = AutoModel.from_pretrained(name, subfolder=subfolder)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(f"vae={name!r}: cannot be loaded ({reason})") from None
    latent_normalization(vae)  # refuses other networks, and unknown normalization
    return vae.eval().requires_grad_(False).to(device)


def encode(
    source: Source,
    out: Path,
    vae: ModelMixin,
    encoding: Encoding,
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """Writes the shards that are not there yet, of `world` processes each every `world`-th; returns index.json."""
    if rank == 0:
        _write_settings(source, out, vae, encoding)
    wait()
    count, size = len(source), encoding.shard_size
    rows_of = [range(first, min(first + size, count)) for first in range(0, count, size)]
    shards = [(out / f"shard-{number:05d}.arrow", rows) for number, rows in enumerate(rows_of)]
    mine = shards[rank::world]
    for done, (path, rows) in enumerate(mine, 1):
        if not path.is_file():
            _write_shard(path, source, rows, vae, encoding)
        if progress:
            progress(done, len(mine))
    wait()
    if rank == 0:
        entries, skipped = [], []
        for path, wanted in shards:
            rows = list(Dataset.from_file(str(path))["row"])
            skipped += sorted(set(wanted) - set(rows))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries.append({"file": path.name, "rows": len(rows), "sha256": digest})
        if len(skipped) == len(source):
            raise ValueError(f"out={str(out)!r}: none of {len(source)} samples could be encoded")
        index = {"count": len(source) - len(skipped), "skipped": skipped, "shards": entries}
        write_text(out / "index.json", json.dumps(index, indent=2) + "\n")
    wait()
    return json.loads((out / "index.json").read_text(encoding="utf-8"))


def _write_settings(source: Source, out: Path, vae: ModelMixin, encoding: Encoding) -> None:
    size = encoding.image_size if isinstance(encoding.image_size, tuple) else (encoding.image_size,) * 2
    pixels = torch.zeros(1, 3, *size) if encoding.frames == 1 else torch.zeros(1, 3, encoding.frames, *size)
    normalization = latent_normalization(vae).to_json()
    settings: Json = {
        **{each.name: getattr(encoding, each.name) for each in fields(Encoding)},
        "autoencoder": {"class": type(vae).__name__, "weights": weights_digest(vae), **normalization},
        **source.identity,
        "shape": list(encode_moments(vae, pixels)[0].shape[1:]),
        "classes": list(source.classes),
        "caption_texts": list(source.captions),
    }
    path, settings = out / "encode.json", json.loads(json.dumps(settings))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if "stamp" not in before:  # of a version whose sources had other digests
            before |= {name: settings[name] for name in ("source", "stamp")}
        if changed := [name for name in settings if settings[name] != before.get(name)]:
            differ = ", ".join(changed)
            raise ValueError(f"out={str(out)!r}: holds another encoding ({differ} differ); give a new folder")
    elif out.exists() and any(not file.name.startswith(".") for file in out.iterdir()):
        raise ValueError(f"out={str(out)!r}: holds something else; give a new folder")
    else:
        write_text(path, json.dumps(settings, indent=2) + "\n")


def _write_shard(path: Path, source: Source, rows: range, vae: ModelMixin, encoding: Encoding) -> None:
    with replacing(path) as temporary, ArrowWriter(features=FEATURES, path=str(temporary)) as writer:
        for first in range(0, len(rows), encoding.batch_size):
            pixels: dict[int, Tensor] = {}
            for row in rows[first : first + encoding.batch_size]:
                try:
                    frames = [centre_crop(frame, encoding.image_size) for frame in source.read(row, encoding.frames)]
                except ValueError as error:
                    if not encoding.skip_unreadable:
                        raise ValueError(f"{error}; mend it, or set skip_unreadable") from None
                else:
                    pixels[row] = frames[0] if encoding.frames == 1 else torch.stack(frames, 1)
            if not pixels:
                continue
            moments = (each.to(DTYPE).cpu() for each in encode_moments(vae, torch.stack(list(pixels.values()))))
            for row, mean, std in zip(pixels, *moments, strict=True):
                if mean.isfinite().all() and std.isfinite().all():
                    parts = {"mean": mean.numpy().tobytes(), "std": std.numpy().tobytes()}
                    writer.write({"row": row, "label": source.labels[row]} | parts)
                elif not encoding.skip_unreadable:
                    name = source.pictures[row].name
                    raise ValueError(f"cannot encode {name!r}: its latents are not finite in {DTYPE}")
        writer.finalize()
