"""Encoded data as training reads it: Arrow shards mapped into memory, a fresh sample of the posterior every time."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elit.files import Json
from elit.sampling.autoencoders import LatentNormalization


class LatentSet:
    """The output of `elit encode`: moments (B, 2, C, ...), mean and std, that `posterior_sample` turns into latents.

    Raises ValueError where the folder is not whole.
    """

    def __init__(self, root: str | Path):
        from datasets import Dataset, concatenate_datasets  # most runs read none of these

        root = Path(root)
        index, self.settings = _read(root / "index.json"), _read(root / "encode.json")
        self.classes, self.captions = tuple(self.settings["classes"]), tuple(self.settings["caption_texts"])
        self.shape = tuple(self.settings["shape"])
        self.normalization = LatentNormalization.from_json(self.settings["autoencoder"])
        self.folder: Path | None = root
        self.stamp = hashlib.sha256(json.dumps(index).encode()).hexdigest()
        parts = []
        for shard in index["shards"]:
            path = str(root / shard["file"])
            try:
                parts.append(part := Dataset.from_file(path))
                if len(part) != shard["rows"]:
                    raise ValueError(f"{len(part)} rows, {shard['rows']} wanted")
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"data: {path!r} is damaged ({reason}); remove it and run elit encode") from None
            # A label without a class would be an assertion deep inside a GPU.
            labels = part.data.column("label").to_numpy()
            if len(wrong := np.flatnonzero((labels < 0) | (labels >= len(self.captions)))):
                found = f"label {labels[wrong[0]]} in row {wrong[0]}"
                raise ValueError(f"data: {path!r} has {found}; encode.json has 0 to {len(self.captions) - 1}")
        self.rows = concatenate_datasets(parts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """moments (B, 2, C, ...) float32, labels (B,) int64."""
        rows = self.rows[list(indices)]
        flat = (np.frombuffer(b"".join(rows[name]), np.float16).astype(np.float32) for name in ("mean", "std"))
        mean, std = (torch.from_numpy(values).view(len(indices), *self.shape) for values in flat)
        moments = self.normalization.normalize(mean), self.normalization.normalize_std(std)
        return torch.stack(moments, 1), torch.tensor(rows["label"])


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """moments (B, 2, C, ...) and standard normal noise (B, C, ...) -> latents (B, C, ...)."""
    mean, std = moments.unbind(1)
    return torch.addcmul(mean, std, noise)


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"data: cannot read {str(path)!r} ({error}); run elit encode to its end") from None
