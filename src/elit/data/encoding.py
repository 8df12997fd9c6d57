"""Settings of an encoding."""

from dataclasses import dataclass

from elit.config import require, require_counts


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a source is encoded; all of it is in encode.json, and another one cannot share the folder."""

    vae: str = ""
    """The autoencoder, any of diffusers': a hub name or a folder."""
    vae_subfolder: str | None = None
    """Where in that repository or folder the autoencoder is, such as vae in a pipeline's."""
    image_size: int | tuple[int, int] = 256
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
        require_counts(self, "frames", "batch_size", "shard_size")
        require(min(self.pixels) >= 1, "image_size", self.image_size, "1 or more")

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
