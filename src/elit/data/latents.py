"""Encoded data as training reads it: Arrow shards mapped into memory, a fresh sample of the posterior every time."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from elit.sampling.autoencoders import LatentNormalization


class LatentSet:
    """What `elit encode` wrote: posterior means and standard deviations, scaled and shifted as the autoencoder says.

    `__getitems__` gives moments (B, 2, C, ...), mean and std, that `posterior_sample` turns into latents.
    Raises ValueError where the folder is not whole.
    """

    moments = True

    def __init__(self, root: str | Path):
        from datasets import Dataset, concatenate_datasets  # most runs read none of these

        root = Path(root)
        self.folder: Path | None = root
        index = _read(root / "index.json")
        self.stamp = hashlib.sha256(json.dumps(index).encode()).hexdigest()
        settings = _read(root / "encode.json")
        parts = []
        for shard in index["shards"]:
            path = root / shard["file"]
            try:
                part = Dataset.from_file(str(path))
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"data: {str(path)!r} is damaged ({reason}); remove it and run elit encode") from None
            if len(part) != shard["rows"]:
                raise ValueError(f"data: {str(path)!r} has {len(part)} rows, {shard['rows']} wanted; encode it again")
            _check_labels(path, part.data.column("label"), len(settings["caption_texts"]))
            parts.append(part)
        if not any(map(len, parts)):
            raise ValueError(f"data={str(root)!r}: holds no samples")
        self.rows = concatenate_datasets(parts)
        self.classes, self.captions = tuple(settings["classes"]), tuple(settings["caption_texts"])
        self.shape = tuple(settings["shape"])
        self.settings = settings
        self.normalization = LatentNormalization.from_json(settings["autoencoder"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """moments (B, 2, C, ...) float32, labels (B,) int64."""
        rows = self.rows[list(indices)]
        mean, std = (self._stacked(rows[name]) for name in ("mean", "std"))
        moments = self.normalization.normalize(mean), self.normalization.normalize_std(std)
        return torch.stack(moments, 1), torch.tensor(rows["label"])

    def _stacked(self, values: Sequence[bytes]) -> Tensor:
        flat = np.frombuffer(b"".join(values), dtype=np.float16).astype(np.float32)
        return torch.from_numpy(flat).view(len(values), *self.shape)


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """moments (B, 2, C, ...) and standard normal noise (B, C, ...) -> latents (B, C, ...)."""
    mean, std = moments.unbind(1)
    return torch.addcmul(mean, std, noise)


def _check_labels(path: Path, labels: pa.ChunkedArray, count: int) -> None:
    """Raises ValueError where a label has no class; on a GPU it would be a failed assertion deep inside."""
    wrong = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, count))
    if (row := pc.index(wrong, True).as_py()) >= 0:
        raise ValueError(
            f"data: {str(path)!r} has label {labels[row].as_py()} in row {row}; encode.json knows 0 to {count - 1}"
        )


def _read(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"data={str(path.parent)!r}: no {path.name} in it; run elit encode to its end")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise ValueError(f"data: {str(path)!r} is damaged; run elit encode again") from None
