"""Pictures from settings: what `elit sample` and the playground run, so that one repeats the other bit for bit."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit._version import __version__
from elit.models.conditioning import Condition
from elit.models.text import encode_prompts
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode
from elit.sampling.sample import OnStep, sample
from elit.sampling.settings import SampleSettings

MOST = 64
"""Images of a run that does not say how many, at most."""


def draw(
    model: Transformer,
    settings: SampleSettings,
    *,
    conditions: Condition | None = None,
    row: int | None = None,
    compile: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The network's samples (B, C, ...) at `settings`, whose dtype the network has.

    conditions: of `conditions_of`, if they are at hand. row: that image alone, (1, C, ...): the batch that it was made
    in runs again, since rounding depends on it. compile, progress, on_step: as in `elit.sample`.
    Raises ValueError for settings that do not fit the network.
    """
    y = conditions
    if y is None:
        y = conditions_of(model, settings.labels, settings.prompts, settings.text_encoder)
    count = number_of_images(settings, y)
    y = y[torch.arange(count) % len(y)]
    if row is None:
        options: dict[str, Any] = {"seed": settings.seed, "batch_size": settings.batch_size, "progress": progress}
        return sample(model, y, compile=compile, on_step=on_step, **options, **settings.arguments())
    check_row(row, count)
    first = row // settings.batch_size * settings.batch_size
    batch = slice(first, min(first + settings.batch_size, count))
    options = {"seed": settings.seed + first, "compile": compile, "on_step": on_step}
    mine = replace(settings, sample_budgets=settings.sample_budgets[batch])
    return sample(model, y[batch], **options, **mine.arguments())[row - first : row - first + 1]


def check_row(row: int, count: int) -> None:
    """Whether there is an image `row` of `count`. Raises ValueError."""
    if not 0 <= row < count:
        raise ValueError(f"row={row}: there are {count} images; give 0 to {count - 1}")


def number_of_images(settings: SampleSettings, y: Condition) -> int:
    count = settings.count
    if count is None:
        count = len(settings.sample_budgets) or min(len(y), MOST)
    if count < 1:
        raise ValueError(f"count={count}: give at least 1")
    return count


def conditions_of(
    model: Transformer, labels: Sequence[str | int], prompts: Sequence[str], text_encoder: str | None = None
) -> Condition:
    """y of every label, by name or number, or of every prompt; of all classes where there are none.

    Raises ValueError where the model takes the other kind, or has no such class.
    """
    if not model.takes_text:
        if prompts:
            raise ValueError(f"prompts={prompts[0]!r}: this model takes classes; give labels")
        if text_encoder is not None:
            raise ValueError(f"text_encoder={text_encoder!r}: this model takes classes, and no text")
        return model.prepare_condition(list(labels) or range(model.config.num_classes))
    if labels:
        raise ValueError(f"labels={labels[0]}: this model takes text; give prompts")
    if not prompts:
        raise ValueError("prompts: none given; this model takes text, such as --prompts 'a handwritten seven'")
    encoder = text_encoder or model.config.text_encoder
    return encode_prompts(prompts, encoder, length=model.config.text_length, device=str(model.device))


@torch.no_grad()
def as_pixels(x: Tensor, vae: ModelMixin | None, batch_size: int) -> Tensor:
    """Samples as pixels in [-1, 1], through the autoencoder if there is one."""
    return torch.cat([decode(vae, part) for part in x.split(batch_size)])


@torch.no_grad()
def weights_fingerprint(model: ModelMixin) -> str:
    """Of a network's class and dtype and the first weights of every tensor: training changes all of them.

    Quick for a network of any size, on any device.
    """
    digest = hashlib.sha256(f"{type(model).__name__} {model.dtype}".encode())
    for name, value in sorted(model.state_dict().items()):
        first = value.flatten()[:64].float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]


def environment_of(device: torch.device, *, compile: bool = False) -> dict[str, str]:
    """What rounding depends on beside the settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    compiled = {"compile": "yes"} if compile else {}
    return {"elit": __version__, "torch": torch.__version__, "device": name} | threads | compiled
