"""The text inside a picture: all that it takes to make it again."""

import hashlib
import json
from dataclasses import dataclass, field, fields

import torch

from elit._version import __version__
from elit.config import require
from elit.files import Json
from elit.sampling.engine import Engine
from elit.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The samples to make: of which classes or prompts, and how many."""

    labels: tuple[str, ...] = ()
    """Classes, by number or name, in turn; default: all of the model's."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a model that takes text."""
    text_encoder: str | None = None
    """Hugging Face name or folder of the encoder that a network was trained with; default: as saved."""
    count: int | None = None
    """How many images; default: one a label or prompt, at most 64."""
    batch_size: int = 64
    """Images at a time; changes an image by rounding at most."""

    def __post_init__(self) -> None:
        for name in ("labels", "prompts"):
            texts = getattr(self, name)
            require(isinstance(texts, tuple) and all(isinstance(each, str) for each in texts), name, texts, "texts")
        require(isinstance(self.text_encoder, str | None), "text_encoder", self.text_encoder, "a name or a folder")
        for name, value in (("count", 1 if self.count is None else self.count), ("batch_size", self.batch_size)):
            require(type(value) is int and value >= 1, name, value, "at least 1")


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """How a picture was made."""

    model: str
    """Its folder, or the name of a model in the box."""
    weights: str
    """A digest."""
    sampling: Sampling
    subject: Subject
    row: int | None = None
    """Number of the one image that the picture shows; None: all of them."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions and device, on which rounding depends."""

    def to_text(self) -> str:
        """JSON, ASCII."""
        content = {name: getattr(self, name) for name in ("model", "weights", "row", "made_with")}
        settings = {each.name: getattr(self.subject, each.name) for each in fields(Subject)} | self.sampling.to_dict()
        return json.dumps(content | {"settings": settings}, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> "PictureRecord":
        """Reads the text of a picture of any version. Raises ValueError where it is damaged."""
        try:
            content = json.loads(text)
            settings = {name: tuple(v) if isinstance(v, list) else v for name, v in content.pop("settings").items()}
            subject: Json = {each.name: settings[each.name] for each in fields(Subject) if each.name in settings}
            unknown = sorted(set(settings) - set(subject) - KNOWN)
            require(not unknown, "settings", unknown, "known")
            record = cls(sampling=Sampling.from_dict(settings), subject=Subject(**subject), **content)
            strings = [record.model, record.weights, *record.made_with, *record.made_with.values()]
            row = record.row is None or (type(record.row) is int and record.row >= 0)
            if not all(isinstance(each, str) for each in strings) or not row:
                raise ValueError("model, weights, row or made_with is of the wrong kind")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"the settings in it are damaged: {' '.join(str(error).split())[:160]}") from None
        return record


KNOWN = {*Sampling().to_dict(), "scale", "guidance_budget", "guidance_interval"}


@torch.no_grad()
def make_record(engine: Engine, sampling: Sampling, subject: Subject) -> PictureRecord:
    """The record of samples that an engine makes; `weights` covers the first weights of every tensor."""
    network, device = engine.network, engine.network.device
    digest = hashlib.sha256(f"{type(network).__name__} {network.dtype}".encode())
    for name, value in sorted(network.state_dict().items()):
        first = value.flatten()[:64].float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode() + first.numpy().tobytes())
    made_with = {"elit": __version__, "torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        made_with["device"] = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        made_with["threads"] = str(torch.get_num_threads())
    if getattr(engine, "compile", False):
        made_with["compile"] = "yes"
    weights = digest.hexdigest()[:16]
    return PictureRecord(model=engine.name, weights=weights, sampling=sampling, subject=subject, made_with=made_with)
